// Python's entry points to the Swoosh kernels; zipformer_kernels/ops/swoosh/native.py calls them.
#pragma once

#include "common/bind.h"
#include "swoosh/swoosh.h"

namespace zk {

inline void bind_swoosh(pybind11::module_& m) {
  bind_cpu(m, "swoosh_forward_cpu", swoosh_forward_cpu);
  bind_cpu(m, "swoosh_backward_cpu", swoosh_backward_cpu);
  bind_cpu<SwooshBiasForward>(m, "swoosh_bias_forward_cpu", [](const auto& args) { swoosh_forward_cpu(args); });
  bind_cpu<SwooshBiasBackward>(m, "swoosh_bias_backward_cpu", [](const auto& args) { swoosh_backward_cpu(args); });
#if ZK_WITH_CUDA
  bind_cuda(m, "swoosh_forward_cuda", swoosh_forward_cuda);
  bind_cuda(m, "swoosh_backward_cuda", swoosh_backward_cuda);
#endif
}

}  // namespace zk
