// Python's entry points to the Balancer's kernels; zipformer_kernels/training/balancer_native.py calls them.
#pragma once

#include "balancer/balancer.h"
#include "common/bind.h"

namespace zk {

inline void bind_balancer(pybind11::module_& m) {
  m.def(
      "balancer_moments_cpu",
      [](uintptr_t x, uintptr_t mean, uintptr_t variance, uintptr_t partials, int64_t rows, int64_t channels,
         int64_t parts, int dtype, int threads) {
        balancer_moments_cpu({pointer(x), pointer(mean), pointer(variance), pointer(partials), rows, channels, parts,
                              DType(dtype), threads});
      },
      release_gil());
  m.def(
      "balancer_gradient_cpu",
      [](uintptr_t grad, uintptr_t x, uintptr_t mean, uintptr_t variance, uintptr_t out,
         const std::array<double, 5>& limits, int64_t rows, int64_t channels, int dtype, int threads) {
        balancer_gradient_cpu({pointer(grad), pointer(x), pointer(mean), pointer(variance), pointer(out),
                               BalancerLimits{limits[0], limits[1], limits[2], limits[3], limits[4]}, rows, channels,
                               DType(dtype), threads});
      },
      release_gil());
}

}  // namespace zk
