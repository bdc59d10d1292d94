// Arguments of the Balancer's kernels, and their entry points. The maths: zipformer_kernels/ops/balancer/__init__.py.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"

namespace zk {

// Mean and variance, by N, of each channel of x, (rows, channels), dense. Results and partial sums are double for
// float64 and float for the others. `partials` is (parts, 2, channels): each of `parts` groups of rows leaves its mean
// and its sum of squared deviations there, and they are merged in order: results do not depend on the threads.
struct BalancerMoments {
  const void* x;
  void *mean, *variance;  // (channels,)
  void* partials;
  int64_t rows, channels, parts;
  DType dtype;
  int threads;

  ZK_FIELDS(x, mean, variance, partials, rows, channels, parts, dtype)
};

struct BalancerLimits {
  double min_mean, max_mean, min_rms, max_rms, grad_scale;

  ZK_FIELDS(min_mean, max_mean, min_rms, max_rms, grad_scale)
};

// out = grad + |grad| (level + slope (x - mean)), level and slope of each channel from its moments and the limits.
struct BalancerGradient {
  const void *grad, *x;  // (rows, channels), dense
  const void *mean, *variance;
  void* out;
  BalancerLimits limits;
  int64_t rows, channels;
  DType dtype;
  int threads;

  ZK_FIELDS(grad, x, mean, variance, out, limits, rows, channels, dtype)
};

ZK_DECLARE_CPU(balancer_moments, BalancerMoments)
ZK_DECLARE_CPU(balancer_gradient, BalancerGradient)

}  // namespace zk
