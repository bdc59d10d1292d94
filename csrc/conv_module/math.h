// The convolution module between its projections, per sequence and channel, at frame t:
//   x_t = a_t sigmoid(s_t), zero where t is padding or outside of the sequence
//   y_t = b + sum_k w_k x_(t + k - H),   k = 0 .. K - 1,   H = (K - 1) / 2
// In chunks of S frames, with t at position p = t mod S of its chunk:
//   y_t = b' + sum_(k <= H) w'_k x_(t + k - H) + e_p (b + sum_k w_k x_(t + k - H)), the last sum inside t's chunk only,
//   e_p = 1 + left_p + right_(p - S + K), where p < K and p >= S - K.
//
// With d = dy, and e d in place of dy for w and b where there are chunks:
//   dx_u = sum_k w_k d_(u + H - k),   dw_k = sum_t d_t x_(t + k - H),   db = sum_t d_t,   de_p = sum dy_t (b + sum_k
//   ...)
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/math.h"

namespace zk {

template <class W>
ZK_HD W gated(W a, W s) {
  return a * sigmoid(s);
}

// The gradients of a and s from that of a sigmoid(s).
template <class W>
ZK_HD void gate_gradients(W a, W s, W dx, W& da, W& ds) {
  W gate = sigmoid(s);
  da = dx * gate;
  ds = da * a * (W(1) - gate);
}

// e_p of one channel; `left` and `right` are its K corrections.
template <class W>
ZK_HD W edge_factor(const W* left, const W* right, int64_t p, int64_t chunk, int64_t kernel) {
  W factor = 1;
  if (p < kernel) factor += left[p];
  if (p >= chunk - kernel) factor += right[p - chunk + kernel];
  return factor;
}

}  // namespace zk
