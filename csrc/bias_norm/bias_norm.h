// Arguments of the BiasNorm kernels, and their entry points.
#pragma once

#include <cstdint>

#include "bias_norm/math.h"
#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"

namespace zk {

// x and y are (rows, channels), dense, y of x's dtype or float32. Everything else is in the wide type of x: double for
// float64, float for the others.
struct BiasNormForward {
  const void* x;
  const void* bias;       // (channels)
  const void* log_scale;  // a scalar
  void* y;
  void* inverse_rms;  // (rows): 1 / rms(x - bias)
  int64_t rows, channels;
  DType x_dtype, y_dtype;
  int threads;  // on the CPU

  ZK_FIELDS(x, bias, log_scale, y, inverse_rms, rows, channels, x_dtype, y_dtype)
};

// Null outputs are not computed. `partials` is (parts, channels + 1) of the wide type, and is null if neither dbias nor
// dlog_scale is wanted: each of `parts` groups of rows leaves its share of dbias there, and in the last column its
// share of dlog_scale; then the groups are added up in order. So results do not depend on the number of threads.
struct BiasNormBackward {
  const void* dy;  // of y's dtype
  const void* x;
  const void* bias;
  const void* log_scale;
  const void* inverse_rms;
  void* dx;  // of x's dtype
  void* dbias;
  void* dlog_scale;
  void* partials;
  int64_t rows, channels, parts;
  DType x_dtype, y_dtype;
  int threads;  // on the CPU

  ZK_FIELDS(dy, x, bias, log_scale, inverse_rms, dx, dbias, dlog_scale, partials, rows, channels, parts, x_dtype,
            y_dtype)
};

// And the bypass after it: y = src_orig + (x exp(log_scale) / rms(x - bias) - src_orig) scale, on the GPU alone. Rows
// are frames times sequences, in this order; scale is (sequences, channels) in float, with one sequence where all share
// it. Channels must be a multiple of 16 bytes of x, 1024 at most, and all tensors aligned to 16 bytes.
struct BiasNormBypassForward {
  const void* x;
  const void* bias;
  const void* log_scale;
  const void* src_orig;  // of y's dtype
  const void* scale;
  void* y;
  void* inverse_rms;
  int64_t frames, sequences, channels;
  DType x_dtype, y_dtype;

  ZK_FIELDS(x, bias, log_scale, src_orig, scale, y, inverse_rms, frames, sequences, channels, x_dtype, y_dtype)
};

// Null outputs are not computed. `partials` is (parts, sequences, 2 channels + partial_line) floats, and null if no
// parameter's gradient is wanted: dscale, dbias and dlog_scale of some frames of a sequence.
constexpr int64_t partial_line = 16;
struct BiasNormBypassBackward {
  const void* dy;
  const void* x;
  const void* bias;
  const void* log_scale;
  const void* src_orig;
  const void* scale;
  const void* inverse_rms;
  void* dx;
  void* dbias;
  void* dlog_scale;
  void* dsrc_orig;
  void* dscale;
  void* partials;
  int64_t frames, sequences, channels, parts;
  DType x_dtype, y_dtype;

  ZK_FIELDS(dy, x, bias, log_scale, src_orig, scale, inverse_rms, dx, dbias, dlog_scale, dsrc_orig, dscale, partials,
            frames, sequences, channels, parts, x_dtype, y_dtype)
};

// Calls f with a value of x's element type and one of y's, with `dispatch` being dispatch_cpu or dispatch_gpu.
template <class Dispatch, class F>
void dispatch_bias_norm(Dispatch dispatch, DType x_dtype, DType y_dtype, F&& f) {
  if (y_dtype != x_dtype && y_dtype != DType::f32) throw std::invalid_argument("y must be of x's dtype or float32");
  dispatch(x_dtype, [&](auto x) {
    if (y_dtype == x_dtype) return f(x, x);
    if constexpr (sizeof(x) == 2) return f(x, float{});
    throw std::invalid_argument("y must not be narrower than x");
  });
}

ZK_DECLARE_CPU(bias_norm_forward, BiasNormForward)
ZK_DECLARE_CPU(bias_norm_backward, BiasNormBackward)

// `stream` is a cudaStream_t. No float64.
void bias_norm_forward_cuda(const BiasNormForward& args, void* stream);
void bias_norm_backward_cuda(const BiasNormBackward& args, void* stream);
void bias_norm_bypass_forward_cuda(const BiasNormBypassForward& args, void* stream);
void bias_norm_bypass_backward_cuda(const BiasNormBypassBackward& args, void* stream);

}  // namespace zk
