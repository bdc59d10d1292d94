// The formulas of ScaledAdam, for host and device. S is the type of a group's statistics, W that of an element's
// arithmetic; t counts the steps applied before this one.
#pragma once

#include <cmath>

#include "common/math.h"
#include "scaled_adam/scaled_adam.h"

namespace zk {

constexpr double adam_max_scale_move = 0.1;
constexpr double adam_corrected_below = 0.99;
constexpr double adam_early_slack = 2.0;

// Plain sqrt may be the one of doubles only.
ZK_HD float adam_sqrt(float x) { return sqrtf(x); }
ZK_HD double adam_sqrt(double x) { return sqrt(x); }

ZK_HD bool adam_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
ZK_HD bool adam_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// 1 - base^exponent, without the cancellation that a base near 1 brings. `log_base` is -infinity for base 0.
ZK_HD float adam_one_minus_power(float log_base, int64_t exponent) { return -expm1f(float(exponent) * log_base); }
ZK_HD double adam_one_minus_power(double log_base, int64_t exponent) { return -expm1(double(exponent) * log_base); }

template <class S>
ZK_HD S adam_min(S a, S b) {
  return a < b ? a : b;
}

template <class S>
ZK_HD S adam_max(S a, S b) {
  return a > b ? a : b;
}

// What a tensor adds to the square of the gradient norm.
template <class S>
ZK_HD S adam_contribution(S rms, bool single, S scalar_lr_scale, S sum_g_squared, S inverse_loss_scale) {
  S weight = (single ? scalar_lr_scale : rms) * inverse_loss_scale;
  return weight * weight * sum_g_squared;
}

// When the clipping threshold is set, and which of the norms in ascending order is the median then.
struct AdamEstimate {
  bool early;
  bool due;
  int64_t rank;
};

ZK_HD AdamEstimate adam_estimate(int64_t t, int64_t period) {
  bool early = t < period && (t == 10 || t == 20 || t == 40);
  int64_t count = early ? t : period;  // slots not yet filled hold 0 and are sorted to the front
  int64_t half = count / 4 * 2;
  return {early, early || (t > 0 && t % period == 0), period - count + (half < count - 1 ? half : count - 1)};
}

// The place of norms[i] in ascending order; equal ones keep their order.
template <class S>
ZK_HD int64_t adam_rank(const S* norms, int64_t period, int64_t i) {
  int64_t rank = 0;
  for (int64_t j = 0; j < period; ++j) rank += norms[j] < norms[i] || (norms[j] == norms[i] && j < i);
  return rank;
}

template <class S>
ZK_HD S adam_learning_rate(const AdamGroup& group) {
  return group.lr_tensor ? *static_cast<const S*>(group.lr_tensor) : S(group.lr);
}

// Factor k on v under the root.
template <class S>
ZK_HD S adam_variance_scale(S log_beta2, int64_t t) {
  S bias = adam_one_minus_power(log_beta2, t + 1);
  return bias < S(adam_corrected_below) ? S(1) / bias : S(1);
}

// Advances the statistics of tensor i of its group by one step, and plans its update. `grad_scale` is c / K.
template <class S>
ZK_HD AdamTensorPlan<S> adam_plan_tensor(const AdamGroup& group, int64_t i, int64_t t, S sum_p_squared, S sum_p_g,
                                         S grad_scale, S lr, S log_beta2) {
  int64_t period = group.size_period;
  S* scale_grads = static_cast<S*>(group.scale_grads) + i;
  S& rms = static_cast<S*>(group.rms)[i];
  bool single = group.single[i];
  scale_grads[t % period * group.count] = grad_scale * sum_p_g;

  S move = 0;
  if (t % period == period - 1) {
    rms = adam_sqrt(sum_p_squared / static_cast<const S*>(group.numel)[i]);
    if (t > 0) {
      S sum = 0, squares = 0;
      for (int64_t k = 0; k < period; ++k) {
        S gradient = scale_grads[k * group.count];
        sum += gradient;
        squares += gradient * gradient;
      }
      S log_decay = log_beta2 * S(period);
      S fresh = adam_one_minus_power(log_decay, 1);
      S& u = static_cast<S*>(group.scale_exp_avg_sq)[i];
      u = (S(1) - fresh) * u + fresh * (squares / S(period));
      if (!single) {
        S correction = adam_sqrt(adam_one_minus_power(log_decay, (t + 1) / period));
        move = -lr * S(group.scalar_lr_scale) * correction * sum / (adam_sqrt(u) + S(group.eps));
        if (rms < S(group.param_min_rms)) move = 0;
        move = adam_max(adam_min(move, S(adam_max_scale_move)), -S(adam_max_scale_move));
        move = adam_min(move, (S(group.param_max_rms) - rms) / rms);
      }
    }
  }
  S size = single ? S(group.scalar_lr_scale) : adam_max(rms, S(group.param_min_rms));
  return {-lr * size, move};
}

// One element's update.
template <class W>
struct AdamUpdate {
  W beta1, new1;  // new = 1 - beta
  W beta2, new2;
  W eps, grad_scale, variance_scale, step_size, scale_move;
  W bound;  // on the parameter's magnitude

  template <class Real>
  ZK_HD AdamUpdate(const AdamGroup& group, bool single, const AdamGroupPlan<Real>& of_group,
                   const AdamTensorPlan<Real>& of_tensor)
      : beta1(W(group.beta1)),
        new1(W(1 - group.beta1)),
        beta2(W(group.beta2)),
        new2(W(1 - group.beta2)),
        eps(W(group.eps)),
        grad_scale(W(of_group.grad_scale)),
        variance_scale(W(of_group.variance_scale)),
        step_size(W(of_tensor.step_size)),
        scale_move(W(of_tensor.scale_move)),
        bound(single ? W(group.scalar_max) : W(INFINITY)) {}

  ZK_HD void operator()(W& p, W g, W& v, W& m) const {
    g *= grad_scale;
    v = beta2 * v + new2 * (g * g);
    W d = step_size * ratio(g, root(variance_scale * v) + eps) + scale_move * p;
    m = beta1 * m + new1 * d;
    p = p + m;
    p = p > bound ? bound : p;
    p = p < -bound ? -bound : p;
  }
};

}  // namespace zk
