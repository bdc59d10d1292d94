// Python's entry points to branches in one call; the launchers of the ops that stand in their middles call them.
#pragma once

#include "branch/branch.h"
#include "common/bind.h"

namespace zk {

inline void bind_branch(pybind11::module_& m) {
  bind_cpu(m, "feed_forward_branch_cpu", feed_forward_branch_cpu);
  bind_cpu(m, "convolution_branch_cpu", convolution_branch_cpu);
  bind_cpu(m, "average_branch_cpu", average_branch_cpu);
}

}  // namespace zk
