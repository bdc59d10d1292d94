// Arguments of the kernels of conv_module, and their entry points. The maths is in math.h.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"

namespace zk {

// y, dy, da and ds are (frames, batch, channels), dense but for da and ds on the CPU. a and s have the strides given,
// in elements, and 1 for channels. Parameters and their gradients are dense and of the wide type: double for float64,
// float for the others.
struct ConvModuleShape {
  int64_t frames, batch, channels;
  int64_t frame_stride, batch_stride;
  int64_t kernel;  // K, odd
  int64_t chunk;   // frames of a chunk; `frames` where there are none

  int64_t half() const { return kernel / 2; }

  ZK_FIELDS(frames, batch, channels, frame_stride, batch_stride, kernel, chunk)
};

struct ConvModuleInputs {
  const void* a;
  const void* s;
  const uint8_t* padding;     // (batch, frames), not 0 where padding; or null
  const void* weight;         // (channels, K)
  const void* bias;           // (channels), or null
  const void* causal_weight;  // (channels, K / 2 + 1); null for the form without chunks
  const void* causal_bias;    // (channels), or null
  const void* edge_scale;     // (2, channels, K); with causal_weight
  ConvModuleShape shape;
  DType x_dtype, y_dtype;  // of a and s; of y: the same, or float32
  int threads;             // on the CPU
  // In inference only, null elsewhere:
  const void* left = nullptr;  // (batch, channels, H), gated input before the first frame; or null for zeros;
                               // on the CPU
  const void* projection_bias = nullptr;  // (2, channels), added to a and to s, of x_dtype; or null

  bool chunked() const { return causal_weight != nullptr; }
};

struct ConvModuleForward : ConvModuleInputs {
  void* y;
  // On the CPU, in inference only:
  void* next = nullptr;  // `left` for the frames to come; or null
  bool swoosh = false;   // y goes through SwooshR
  // On the GPU only; y may be null beside it:
  void* activated = nullptr;  // SwooshR(y), of y's type; or null

  ZK_FIELDS(a, s, padding, weight, bias, causal_weight, causal_bias, edge_scale, shape, x_dtype, y_dtype, y)
};

struct ConvModuleInfer : ConvModuleForward {
  ZK_FIELDS(a, s, padding, weight, bias, causal_weight, causal_bias, edge_scale, shape, x_dtype, y_dtype, y, left,
            projection_bias, next, swoosh)
};

// On the GPU.
struct ConvModuleActivated : ConvModuleForward {
  ZK_FIELDS(a, s, padding, weight, bias, causal_weight, causal_bias, edge_scale, shape, x_dtype, y_dtype, y, activated,
            projection_bias)
};

// Null outputs are not computed; da and ds only both. `partials` is (parts, P): each of `parts` groups of frames leaves
// its share of the gradients of all P parameters there, in the order of ParameterOffsets.
struct ConvModuleBackward : ConvModuleInputs {
  const void* dy;
  void* da;
  void* ds;
  void* partials;
  int64_t parts;
  int64_t gradient_step = 0;  // elements of da and ds from a row of channels to the next

  ZK_FIELDS(a, s, padding, weight, bias, causal_weight, causal_bias, edge_scale, shape, x_dtype, y_dtype, dy, da, ds,
            partials, parts, gradient_step)
};

// On the GPU, which adds up the parts too.
struct ConvModuleGradients : ConvModuleBackward {
  // As the forward pass returned it, of y_dtype; then dy is the gradient of SwooshR(y). Or null.
  const void* y = nullptr;
  void* activated = nullptr;  // SwooshR(y) again, with y
  // (P,), float: the parameters' gradients, then, with da, the sums of da and of ds over rows; with partials, whose
  // rows are as long. Where da or the parameters are not wanted, they have no place there.
  void* sums = nullptr;
  bool parameters = false;  // whether they are wanted

  ZK_FIELDS(a, s, padding, weight, bias, causal_weight, causal_bias, edge_scale, shape, x_dtype, y_dtype, dy, da, ds,
            partials, parts, gradient_step, y, activated, sums, parameters)
};

// Where the gradient of each parameter begins in a row of `partials`.
struct ParameterOffsets {
  int64_t bias, causal_weight, causal_bias, edge_scale, total;  // weight is at 0

  ParameterOffsets(const ConvModuleShape& shape, bool chunked)
      : bias(shape.channels * shape.kernel),
        causal_weight(bias + shape.channels),
        causal_bias(causal_weight + shape.channels * (shape.half() + 1)),
        edge_scale(causal_bias + shape.channels),
        total(chunked ? edge_scale + 2 * shape.channels * shape.kernel : causal_weight) {}
};

// Calls f with a value of x's element type and one of y's, with `dispatch` being dispatch_cpu or dispatch_gpu.
template <class Dispatch, class F>
void dispatch_conv_module(Dispatch dispatch, DType x_dtype, DType y_dtype, F&& f) {
  if (y_dtype != x_dtype && y_dtype != DType::f32) throw std::invalid_argument("y must be of x's dtype or float32");
  dispatch(x_dtype, [&](auto x) {
    if (y_dtype == x_dtype) return f(x, x);
    if constexpr (sizeof(x) == 2) return f(x, float{});
    throw std::invalid_argument("y must not be narrower than x");
  });
}

ZK_DECLARE_CPU(conv_module_forward, ConvModuleForward)
ZK_DECLARE_CPU(conv_module_backward, ConvModuleBackward)

// `stream` is a cudaStream_t. No float64.
void conv_module_forward_cuda(const ConvModuleActivated& args, void* stream);
void conv_module_backward_cuda(const ConvModuleGradients& args, void* stream);

}  // namespace zk
