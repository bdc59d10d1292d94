// Python's entry points to the Swoosh kernels; zipformer_kernels/ops/swoosh/native.py calls them.
#pragma once

#include "common/bind.h"
#include "swoosh/swoosh.h"

namespace zk {

static SwooshForward forward_args(uintptr_t x, uintptr_t y, int64_t n, int dtype, int kind, int threads) {
  return {pointer(x), pointer(y), n, DType(dtype), SwooshKind(kind), threads, nullptr, 1};
}

static SwooshBackward backward_args(uintptr_t dy, uintptr_t x, uintptr_t dx, int64_t n, int dtype, int kind,
                                    int threads) {
  return {pointer(dy), pointer(x), pointer(dx), n, DType(dtype), SwooshKind(kind), threads};
}

inline void bind_swoosh(pybind11::module_& m) {
  m.def(
      "swoosh_forward_cpu",
      [](uintptr_t x, uintptr_t y, int64_t n, int dtype, int kind, int threads) {
        swoosh_forward_cpu(forward_args(x, y, n, dtype, kind, threads));
      },
      release_gil());
  m.def(
      "swoosh_overwrite_cpu",
      [](uintptr_t x, uintptr_t bias, int64_t n, int64_t channels, int dtype, int kind, int threads) {
        SwooshForward args = forward_args(x, x, n, dtype, kind, threads);
        args.bias = pointer(bias);
        args.channels = channels;
        swoosh_forward_cpu(args);
      },
      release_gil());
  m.def(
      "swoosh_backward_cpu",
      [](uintptr_t dy, uintptr_t x, uintptr_t dx, int64_t n, int dtype, int kind, int threads) {
        swoosh_backward_cpu(backward_args(dy, x, dx, n, dtype, kind, threads));
      },
      release_gil());
  m.def(
      "swoosh_overwrite_backward_cpu",
      [](uintptr_t dy, uintptr_t x, uintptr_t bias, int64_t n, int64_t channels, int dtype, int kind, int threads) {
        SwooshBackward args = backward_args(dy, x, dy, n, dtype, kind, threads);
        args.y = pointer(x);
        args.bias = pointer(bias);
        args.channels = channels;
        swoosh_backward_cpu(args);
      },
      release_gil());
#if ZK_WITH_CUDA
  m.def("swoosh_forward_cuda", [](uintptr_t x, uintptr_t y, int64_t n, int dtype, int kind, uintptr_t stream) {
    swoosh_forward_cuda(forward_args(x, y, n, dtype, kind, 0), pointer(stream));
  });
  m.def("swoosh_backward_cuda",
        [](uintptr_t dy, uintptr_t x, uintptr_t dx, int64_t n, int dtype, int kind, uintptr_t stream) {
          swoosh_backward_cuda(backward_args(dy, x, dx, n, dtype, kind, 0), pointer(stream));
        });
#endif
}

}  // namespace zk
