// Python's entry points to swoosh_linear's kernels; zipformer_kernels/ops/swoosh_linear/native.py calls them.
#pragma once

#include "common/bind.h"
#include "swoosh_linear/swoosh_linear.h"

namespace zk {

inline void bind_swoosh_linear(pybind11::module_& m) {
  bind_cpu(m, "swoosh_linear_forward_cpu", swoosh_linear_forward_cpu);
  bind_cpu(m, "swoosh_linear_backward_cpu", swoosh_linear_backward_cpu);
#if ZK_WITH_CUDA
  bind_cuda(m, "swoosh_linear_forward_cuda", swoosh_linear_forward_cuda);
  bind_cuda(m, "swoosh_linear_backward_cuda", swoosh_linear_backward_cuda);
#endif
}

}  // namespace zk
