// Python's entry points to the kernels of conv_module; zipformer_kernels/ops/conv_module/native.py calls them.
#pragma once

#include "common/bind.h"
#include "conv_module/conv_module.h"
#include "linear/linear.h"

namespace zk {

// Addresses of: a, s, padding, weight, bias, causal_weight, causal_bias, edge_scale.
using ConvAddresses = std::array<uintptr_t, 8>;
// frames, batch, channels, frame_stride, batch_stride, kernel, chunk.
using ConvSizes = std::array<int64_t, 7>;

static ConvModuleInputs inputs(const ConvAddresses& in, const ConvSizes& n, int x_dtype, int y_dtype, int threads) {
  return {pointer(in[0]), pointer(in[1]), static_cast<const uint8_t*>(pointer(in[2])),
          pointer(in[3]), pointer(in[4]), pointer(in[5]),
          pointer(in[6]), pointer(in[7]), {n[0], n[1], n[2], n[3], n[4], n[5], n[6]},
          DType(x_dtype), DType(y_dtype), threads,
          nullptr,        nullptr};
}

static ConvModuleForward forward_args(const ConvAddresses& in, uintptr_t y, const ConvSizes& sizes, int x_dtype,
                                      int y_dtype, int threads) {
  return {inputs(in, sizes, x_dtype, y_dtype, threads), pointer(y), nullptr, false};
}

static ConvModuleForward infer_args(const ConvAddresses& in, uintptr_t y, uintptr_t projection_bias, uintptr_t left,
                                    uintptr_t next, const ConvSizes& sizes, int dtype, int threads) {
  ConvModuleForward args = forward_args(in, y, sizes, dtype, dtype, threads);
  args.in.projection_bias = pointer(projection_bias);
  args.in.left = pointer(left);
  args.next = pointer(next);
  args.swoosh = true;
  return args;
}

static ConvModuleBackward backward_args(const ConvAddresses& in, uintptr_t dy, uintptr_t da, uintptr_t ds,
                                        uintptr_t partials, int64_t parts, const ConvSizes& sizes, int x_dtype,
                                        int y_dtype, int threads) {
  return {
      inputs(in, sizes, x_dtype, y_dtype, threads), pointer(dy), pointer(da), pointer(ds), pointer(partials), parts};
}

// Addresses of: src, in_weight, out_weight, out_bias, y.
using Around = std::array<uintptr_t, 5>;

// y = src + the whole module of src, for few rows: `middle` lacks its input and output.
static void stream(const Around& around, ConvModuleForward middle) {
  auto [src, in_weight, out_weight, out_bias, y] = around;
  ConvModuleInputs& in = middle.in;
  int64_t channels = in.shape.channels, rows = in.shape.frames * in.shape.batch;
  std::unique_ptr<double[]> buffers(new double[3 * rows * channels]);  // large enough for either dtype
  middle.y = buffers.get() + 2 * rows * channels;
  linear_cpu({pointer(src), pointer(in_weight), nullptr, nullptr, buffers.get(), rows, channels, 2 * channels,
              in.x_dtype, Activation::none, in.threads});
  in.a = buffers.get();
  in.s = static_cast<const char*>(in.a) + channels * (in.x_dtype == DType::f64 ? 8 : 4);
  conv_module_forward_cpu(middle);
  linear_cpu({middle.y, pointer(out_weight), pointer(out_bias), pointer(src), pointer(y), rows, channels, channels,
              in.x_dtype, Activation::none, in.threads});
}

inline void bind_conv_module(pybind11::module_& m) {
  m.def(
      "conv_module_forward_cpu",
      [](const ConvAddresses& in, uintptr_t y, const ConvSizes& sizes, int x_dtype, int y_dtype, int threads) {
        conv_module_forward_cpu(forward_args(in, y, sizes, x_dtype, y_dtype, threads));
      },
      release_gil());
  m.def(
      "conv_module_infer_cpu",
      [](const ConvAddresses& in, uintptr_t y, uintptr_t projection_bias, uintptr_t left, uintptr_t next,
         const ConvSizes& sizes, int dtype, int threads) {
        conv_module_forward_cpu(infer_args(in, y, projection_bias, left, next, sizes, dtype, threads));
      },
      release_gil());
  m.def(
      "conv_module_backward_cpu",
      [](const ConvAddresses& in, uintptr_t dy, uintptr_t da, uintptr_t ds, uintptr_t partials, int64_t parts,
         int64_t step, const ConvSizes& sizes, int x_dtype, int y_dtype, int threads) {
        auto args = backward_args(in, dy, da, ds, partials, parts, sizes, x_dtype, y_dtype, threads);
        args.gradient_step = step;
        conv_module_backward_cpu(args);
      },
      release_gil());
  m.def(
      "conv_module_stream_cpu",
      [](const Around& around, const ConvAddresses& in, uintptr_t projection_bias, uintptr_t left, uintptr_t next,
         const ConvSizes& sizes, int dtype,
         int threads) { stream(around, infer_args(in, 0, projection_bias, left, next, sizes, dtype, threads)); },
      release_gil());
#if ZK_WITH_CUDA
  m.def("conv_module_forward_cuda",
        [](const ConvAddresses& in, uintptr_t y, const ConvSizes& sizes, int x_dtype, int y_dtype, uintptr_t stream) {
          conv_module_forward_cuda(forward_args(in, y, sizes, x_dtype, y_dtype, 0), pointer(stream));
        });
  m.def("conv_module_backward_cuda",
        [](const ConvAddresses& in, uintptr_t dy, uintptr_t da, uintptr_t ds, uintptr_t partials, int64_t parts,
           const ConvSizes& sizes, int x_dtype, int y_dtype, uintptr_t stream) {
          conv_module_backward_cuda(backward_args(in, dy, da, ds, partials, parts, sizes, x_dtype, y_dtype, 0),
                                    pointer(stream));
        });
#endif
}

}  // namespace zk
