// Python's entry points to the bypass kernels; cpu.py and cuda.py in zipformer_kernels/ops/bypass call them.
#pragma once

#include "bypass/bypass.h"
#include "common/bind.h"

namespace zk {

inline void bind_bypass(pybind11::module_& m) {
  bind_cpu(m, "bypass_forward_cpu", bypass_forward_cpu);
  bind_cpu(m, "bypass_backward_cpu", bypass_backward_cpu);
#if ZK_WITH_CUDA
  bind_cuda(m, "bypass_forward_cuda", bypass_forward_cuda);
  bind_cuda(m, "bypass_backward_cuda", bypass_backward_cuda);
#endif
}

}  // namespace zk
