// SwooshL and SwooshR: y = log(1 + exp(x - shift)) - 0.08 x - offset, dy/dx = sigmoid(x - shift) - 0.08.
#pragma once

#include "common/math.h"

namespace zk {

enum class SwooshKind : int { l = 0, r = 1 };

template <SwooshKind kind, class T>
struct Swoosh {
  static constexpr T shift = kind == SwooshKind::l ? T(4) : T(1);
  static constexpr T offset = kind == SwooshKind::l ? T(0.035) : T(0.313261687);
  static constexpr T slope = T(0.08);

  static ZK_HD T value(T x) { return softplus(x - shift) - slope * x - offset; }
  static ZK_HD T derivative(T x) { return sigmoid(x - shift) - slope; }
};

}  // namespace zk
