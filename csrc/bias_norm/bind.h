// Python's entry points to the BiasNorm kernels; zipformer_kernels/ops/bias_norm/native.py calls them.
#pragma once

#include "bias_norm/bias_norm.h"
#include "common/bind.h"

namespace zk {

inline void bind_bias_norm(pybind11::module_& m) {
  bind_cpu(m, "bias_norm_forward_cpu", bias_norm_forward_cpu);
  bind_cpu(m, "bias_norm_backward_cpu", bias_norm_backward_cpu);
#if ZK_WITH_CUDA
  bind_cuda(m, "bias_norm_forward_cuda", bias_norm_forward_cuda);
  bind_cuda(m, "bias_norm_backward_cuda", bias_norm_backward_cuda);
  bind_cuda(m, "bias_norm_bypass_forward_cuda", bias_norm_bypass_forward_cuda);
  bind_cuda(m, "bias_norm_bypass_backward_cuda", bias_norm_bypass_backward_cuda);
#endif
}

}  // namespace zk
