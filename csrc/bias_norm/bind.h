// Python's entry points to the BiasNorm kernels; zipformer_kernels/ops/bias_norm/native.py calls them.
#pragma once

#include "bias_norm/bias_norm.h"
#include "common/bind.h"

namespace zk {

static BiasNormForward forward_args(uintptr_t x, uintptr_t bias, uintptr_t log_scale, uintptr_t y,
                                    uintptr_t inverse_rms, int64_t rows, int64_t channels, int x_dtype, int y_dtype,
                                    int threads) {
  return {pointer(x), pointer(bias), pointer(log_scale), pointer(y),     pointer(inverse_rms),
          rows,       channels,      DType(x_dtype),     DType(y_dtype), threads};
}

static BiasNormBackward backward_args(uintptr_t dy, uintptr_t x, uintptr_t bias, uintptr_t log_scale,
                                      uintptr_t inverse_rms, uintptr_t dx, uintptr_t dbias, uintptr_t dlog_scale,
                                      uintptr_t partials, int64_t rows, int64_t channels, int64_t parts, int x_dtype,
                                      int y_dtype, int threads) {
  return {pointer(dy), pointer(x),     pointer(bias),       pointer(log_scale), pointer(inverse_rms),
          pointer(dx), pointer(dbias), pointer(dlog_scale), pointer(partials),  rows,
          channels,    parts,          DType(x_dtype),      DType(y_dtype),     threads};
}

inline void bind_bias_norm(pybind11::module_& m) {
  m.def(
      "bias_norm_forward_cpu",
      [](uintptr_t x, uintptr_t bias, uintptr_t log_scale, uintptr_t y, uintptr_t inverse_rms, int64_t rows,
         int64_t channels, int x_dtype, int y_dtype, int threads) {
        bias_norm_forward_cpu(
            forward_args(x, bias, log_scale, y, inverse_rms, rows, channels, x_dtype, y_dtype, threads));
      },
      release_gil());
  m.def(
      "bias_norm_backward_cpu",
      [](uintptr_t dy, uintptr_t x, uintptr_t bias, uintptr_t log_scale, uintptr_t inverse_rms, uintptr_t dx,
         uintptr_t dbias, uintptr_t dlog_scale, uintptr_t partials, int64_t rows, int64_t channels, int64_t parts,
         int x_dtype, int y_dtype, int threads) {
        bias_norm_backward_cpu(backward_args(dy, x, bias, log_scale, inverse_rms, dx, dbias, dlog_scale, partials, rows,
                                             channels, parts, x_dtype, y_dtype, threads));
      },
      release_gil());
#if ZK_WITH_CUDA
  m.def("bias_norm_forward_cuda",
        [](uintptr_t x, uintptr_t bias, uintptr_t log_scale, uintptr_t y, uintptr_t inverse_rms, int64_t rows,
           int64_t channels, int x_dtype, int y_dtype, uintptr_t stream) {
          bias_norm_forward_cuda(forward_args(x, bias, log_scale, y, inverse_rms, rows, channels, x_dtype, y_dtype, 0),
                                 pointer(stream));
        });
  m.def("bias_norm_backward_cuda",
        [](uintptr_t dy, uintptr_t x, uintptr_t bias, uintptr_t log_scale, uintptr_t inverse_rms, uintptr_t dx,
           uintptr_t dbias, uintptr_t dlog_scale, uintptr_t partials, int64_t rows, int64_t channels, int64_t parts,
           int x_dtype, int y_dtype, uintptr_t stream) {
          bias_norm_backward_cuda(backward_args(dy, x, bias, log_scale, inverse_rms, dx, dbias, dlog_scale, partials,
                                                rows, channels, parts, x_dtype, y_dtype, 0),
                                  pointer(stream));
        });
#endif
}

}  // namespace zk
