// Python's entry points to swoosh_linear's kernels; zipformer_kernels/ops/swoosh_linear/native.py calls them.
#pragma once

#include "common/bind.h"
#include "linear/linear.h"
#include "swoosh_linear/swoosh_linear.h"

namespace zk {

static SwooshLinearForward forward_args(uintptr_t x, uintptr_t mask, uintptr_t a, int64_t outer, int64_t shared,
                                        int64_t inner, int x_dtype, int a_dtype, int kind, int threads) {
  return {pointer(x),     pointer(mask),  pointer(a),       {outer, shared, inner},
          DType(x_dtype), DType(a_dtype), SwooshKind(kind), threads};
}

static SwooshLinearBackward backward_args(uintptr_t da, uintptr_t x, uintptr_t mask, uintptr_t dx, uintptr_t a,
                                          int64_t outer, int64_t shared, int64_t inner, int x_dtype, int a_dtype,
                                          int kind, int threads) {
  return {pointer(da),    pointer(x),     pointer(mask),    pointer(dx), pointer(a), {outer, shared, inner},
          DType(x_dtype), DType(a_dtype), SwooshKind(kind), threads};
}

inline void bind_swoosh_linear(pybind11::module_& m) {
  m.def(
      "swoosh_linear_forward_cpu",
      [](uintptr_t x, uintptr_t mask, uintptr_t a, int64_t outer, int64_t shared, int64_t inner, int x_dtype,
         int a_dtype, int kind, int threads) {
        swoosh_linear_forward_cpu(forward_args(x, mask, a, outer, shared, inner, x_dtype, a_dtype, kind, threads));
      },
      release_gil());
  m.def(
      "swoosh_linear_backward_cpu",
      [](uintptr_t da, uintptr_t x, uintptr_t mask, uintptr_t dx, uintptr_t a, int64_t outer, int64_t shared,
         int64_t inner, int x_dtype, int a_dtype, int kind, int threads) {
        swoosh_linear_backward_cpu(
            backward_args(da, x, mask, dx, a, outer, shared, inner, x_dtype, a_dtype, kind, threads));
      },
      release_gil());
  m.def(
      "swoosh_linear_infer_cpu",
      [](uintptr_t src, uintptr_t in_weight, uintptr_t in_bias, uintptr_t out_weight, uintptr_t out_bias, uintptr_t y,
         int64_t rows, int64_t channels, int64_t hidden, int dtype, int kind, int threads) {
        std::unique_ptr<double[]> middle(new double[rows * hidden]);  // large enough for either dtype
        linear_cpu({pointer(src), pointer(in_weight), pointer(in_bias), nullptr, middle.get(), rows, channels, hidden,
                    DType(dtype), Activation(kind), threads});
        linear_cpu({middle.get(), pointer(out_weight), pointer(out_bias), pointer(src), pointer(y), rows, hidden,
                    channels, DType(dtype), Activation::none, threads});
      },
      release_gil());
#if ZK_WITH_CUDA
  m.def("swoosh_linear_forward_cuda", [](uintptr_t x, uintptr_t mask, uintptr_t a, int64_t outer, int64_t shared,
                                         int64_t inner, int x_dtype, int a_dtype, int kind, uintptr_t stream) {
    swoosh_linear_forward_cuda(forward_args(x, mask, a, outer, shared, inner, x_dtype, a_dtype, kind, 0),
                               pointer(stream));
  });
  m.def("swoosh_linear_backward_cuda",
        [](uintptr_t da, uintptr_t x, uintptr_t mask, uintptr_t dx, uintptr_t a, int64_t outer, int64_t shared,
           int64_t inner, int x_dtype, int a_dtype, int kind, uintptr_t stream) {
          swoosh_linear_backward_cuda(
              backward_args(da, x, mask, dx, a, outer, shared, inner, x_dtype, a_dtype, kind, 0), pointer(stream));
        });
#endif
}

}  // namespace zk
