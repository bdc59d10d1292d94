// BiasNorm: y = x exp(log_scale) / rms(x - bias), one row of channels at a time.
//
// With r = 1 / rms(x - bias), s = exp(log_scale) r, C channels and q = sum_c dy_c x_c r, the gradients are
//   dx_c = s dy_c - t_c,   dbias_c = sum over rows of t_c,   dlog_scale = exp(log_scale) sum over rows of q,
//   t_c = r (x_c - bias_c) (s q / C).
// In this form every factor is of the size of a result: nothing overflows that need not.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace zk {

// r, from sum(scale) = sum_c (scale (x_c - bias_c))^2. Where the plain sum leaves the range in which squares are exact
// to rounding, it is taken once more with a scale, so that r is right for every row whose rms is a normal number.
template <class T, class Sum>
ZK_HD T inverse_rms(int64_t channels, Sum sum) {
  T mean = sum(T(1)) / T(channels);
  if (mean >= T(1e-30) && mean <= T(1e30)) return T(1) / std::sqrt(mean);
  T scale = mean < T(1) ? T(0x1p100) : T(0x1p-100);
  return scale / std::sqrt(sum(scale) / T(channels));
}

// What backward needs of one row besides its elements.
template <class T>
struct BiasNormRow {
  T r, s, u;  // u = s q / C

  ZK_HD T through_rms(T x, T bias) const { return (x - bias) * r * u; }  // t_c
};

}  // namespace zk
