// Python's entry points to the Balancer's kernels; zipformer_kernels/ops/balancer/cpu.py calls them.
#pragma once

#include "balancer/balancer.h"
#include "common/bind.h"

namespace zk {

inline void bind_balancer(pybind11::module_& m) {
  bind_struct<BalancerLimits>(m, "BalancerLimits");
  bind_cpu(m, "balancer_moments_cpu", balancer_moments_cpu);
  bind_cpu(m, "balancer_gradient_cpu", balancer_gradient_cpu);
}

}  // namespace zk
