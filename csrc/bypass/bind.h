// Python's entry points to the bypass kernels; zipformer_kernels/ops/bypass/cpu.py calls them.
#pragma once

#include "bypass/bypass.h"
#include "common/bind.h"

namespace zk {

inline void bind_bypass(pybind11::module_& m) {
  bind_cpu(m, "bypass_forward_cpu", bypass_forward_cpu);
  bind_cpu(m, "bypass_backward_cpu", bypass_backward_cpu);
}

}  // namespace zk
