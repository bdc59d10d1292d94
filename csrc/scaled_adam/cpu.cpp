// ScaledAdam on the CPU: chunks of all tensors are handed to threads as these become free, and each chunk is worked
// through in blocks that fit the first-level cache. Sums are taken in a fixed order, whatever thread took which chunk.
#include <cmath>

#include "common/parallel.h"
#include "scaled_adam/math.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t block_elements = 1024;  // lanes add up this many products in W before going on in double
constexpr int chunks_at_a_time = 4;

template <class W, class T>
const W* widened_from(const T* from, int64_t n, W* buffer) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = W(widen(from[i]));
  return buffer;
}

// Elements [first, first + n) in the type of arithmetic: where they are, or else in `buffer`. No pointer: zeros.
template <class W>
const W* widened(const void* from, int64_t dtype, int64_t first, int64_t n, W* buffer) {
  if (from == nullptr) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = W(0);
    return buffer;
  }
  const W* found = nullptr;
  dispatch_cpu(DType(dtype), [&](auto element) {
    using T = decltype(element);
    auto elements = static_cast<const T*>(from) + first;
    if constexpr (std::is_same_v<T, W>) {
      found = elements;
    } else {
      found = widened_from(elements, n, buffer);
    }
  });
  return found;
}

template <class W>
void narrow_to(void* to, int64_t dtype, int64_t first, int64_t n, const W* from) {
  dispatch_cpu(DType(dtype), [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Wide<T>, W>) {
      auto elements = static_cast<T*>(to) + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) elements[i] = narrow<T>(from[i]);
    }
  });
}

template <class W>
void sums_of_chunk(const AdamTensor& tensor, AdamChunk chunk, double (&sums)[3]) {
  alignas(64) W p_buffer[block_elements], g_buffer[block_elements];
  for (int64_t first = chunk.begin; first < chunk.end; first += block_elements) {
    int64_t n = chunk.end - first < block_elements ? chunk.end - first : block_elements;
    const W* p = widened(tensor.p, tensor.p_dtype, first, n, p_buffer);
    const W* g = widened(tensor.g, tensor.g_dtype, first, n, g_buffer);
    W pp = 0, pg = 0, gg = 0;
#pragma omp simd reduction(+ : pp, pg, gg)
    for (int64_t i = 0; i < n; ++i) {
      pp += p[i] * p[i];
      pg += p[i] * g[i];
      gg += g[i] * g[i];
    }
    sums[0] += pp;
    sums[1] += pg;
    sums[2] += gg;
  }
}

template <class W>
void update_block(const AdamUpdate<W> update, W* __restrict p, const W* __restrict g, W* __restrict v, W* __restrict m,
                  int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) update(p[i], g[i], v[i], m[i]);
}

template <class W>
void update_chunk(const AdamTensor& tensor, AdamChunk chunk, const AdamUpdate<W>& update) {
  alignas(64) W p_buffer[block_elements], g_buffer[block_elements];
  for (int64_t first = chunk.begin; first < chunk.end; first += block_elements) {
    int64_t n = chunk.end - first < block_elements ? chunk.end - first : block_elements;
    W* p = const_cast<W*>(widened(tensor.p, tensor.p_dtype, first, n, p_buffer));
    const W* g = widened(tensor.g, tensor.g_dtype, first, n, g_buffer);
    update_block(update, p, g, static_cast<W*>(tensor.v) + first, static_cast<W*>(tensor.m) + first, n);
    if (p == p_buffer) narrow_to(tensor.p, tensor.p_dtype, first, n, p);
  }
}

template <class Body>
void for_each_chunk(const AdamStep<double>& args, Body body) {
  int threads = team_size(args.chunks, args.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, chunks_at_a_time)
  for (int64_t index = 0; index < args.chunks; ++index) body(index);
}

AdamChunk place(const AdamStep<double>& args, int64_t index) {
  return adam_chunk(args.tensors, args.tensor_count, args.chunk_elements, index);
}

// The group's gradient norm.
template <class S>
S measure(const AdamStep<double>& args, const AdamGroup& group, S inverse_loss_scale) {
  double total = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    S squares = S(args.sums[2 * args.tensor_count + group.first_tensor + i]);
    S contribution = adam_contribution(static_cast<const S*>(group.rms)[i], group.single[i], S(group.scalar_lr_scale),
                                       squares, inverse_loss_scale);
    static_cast<S*>(group.contributions)[i] = contribution;
    total += contribution;
  }
  return std::sqrt(S(total));
}

// Records the norm, sets the clipping threshold when it is due, and returns c.
template <class S>
S clip(const AdamGroup& group, int64_t t, S norm) {
  if (group.clipping_scale == 0) return S(1);
  int64_t period = group.clipping_period;
  S* norms = static_cast<S*>(group.norms);
  S& threshold = *static_cast<S*>(group.threshold);
  if (t > 0) norms[t % period] = norm;
  AdamEstimate estimate = adam_estimate(t, period);
  if (estimate.due) {
    for (int64_t i = 0; i < period; ++i) {
      if (adam_rank(norms, period, i) != estimate.rank) continue;
      threshold = S(group.clipping_scale) * norms[i] * (estimate.early ? S(adam_early_slack) : S(1));
    }
    *group.clipped = 0;
  }
  S factor = adam_min(threshold / (norm + S(1e-20)), S(1));
  *group.clipped += factor < S(1);
  return factor;
}

template <class S>
void plan_group(const AdamStep<double>& args, const AdamGroup& group, AdamGroupPlan<double>& plan, S norm,
                S inverse_loss_scale) {
  int64_t t = *group.step;
  S log_beta2 = S(std::log(group.beta2));
  S lr = adam_learning_rate<S>(group);
  S grad_scale = clip(group, t, norm) * inverse_loss_scale;
  for (int64_t i = 0; i < group.count; ++i) {
    const double* sums = args.sums + group.first_tensor + i;
    AdamTensorPlan<S> tensor =
        adam_plan_tensor(group, i, t, S(sums[0]), S(sums[args.tensor_count]), grad_scale, lr, log_beta2);
    args.tensor_plans[group.first_tensor + i] = {tensor.step_size, tensor.scale_move};
  }
  plan = {1, grad_scale, adam_variance_scale(log_beta2, t)};
  *group.step = t + 1;
}

// Calls f with a value of the type of the group's statistics.
template <class F>
void with_statistics(const AdamGroup& group, F f) {
  if (DType(group.dtype) == DType::f64) return f(double{});
  f(float{});
}

}  // namespace

void scaled_adam_partials(const AdamStep<double>& args) {
  for_each_chunk(args, [&](int64_t index) {
    AdamChunk chunk = place(args, index);
    const AdamTensor& tensor = args.tensors[chunk.tensor];
    double sums[3] = {0, 0, 0};
    auto run = DType(tensor.p_dtype) == DType::f64 ? sums_of_chunk<double> : sums_of_chunk<float>;
    run(tensor, chunk, sums);
    for (int k = 0; k < 3; ++k) args.partials[k * args.chunks + index] = sums[k];
  });
}

void scaled_adam_sums(const AdamStep<double>& args) {
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    int64_t end = i + 1 < args.tensor_count ? args.tensors[i + 1].first_chunk : args.chunks;
    for (int k = 0; k < 3; ++k) {
      double sum = 0;
      for (int64_t c = args.tensors[i].first_chunk; c < end; ++c) sum += args.partials[k * args.chunks + c];
      args.sums[k * args.tensor_count + i] = sum;
    }
  }
}

void scaled_adam_plan(const AdamStep<double>& args) {
  double inverse_loss_scale = args.loss_scale ? 1.0 / *args.loss_scale : 1.0;
  bool ok = args.found_inf == nullptr || *args.found_inf == 0;
  for (int64_t k = 0; k < args.group_count; ++k) {
    with_statistics(args.groups[k], [&](auto element) {
      auto norm = measure(args, args.groups[k], decltype(element)(inverse_loss_scale));
      ok = ok && adam_finite(norm);
      args.group_plans[k].grad_scale = norm;  // until its plan takes the place
    });
  }
  for (int64_t k = 0; k < args.group_count; ++k) {
    const AdamGroup& group = args.groups[k];
    AdamGroupPlan<double>& plan = args.group_plans[k];
    with_statistics(group, [&](auto element) {
      using S = decltype(element);
      if (ok) {
        plan_group(args, group, plan, S(plan.grad_scale), S(inverse_loss_scale));
      } else {
        *group.skipped += 1;
        plan = {0, 0, 0};
      }
    });
  }
}

void scaled_adam_update(const AdamStep<double>& args) {
  if (args.group_plans[0].ok == 0) return;
  for_each_chunk(args, [&](int64_t index) {
    // What pass 1 read last may still be in the cache.
    AdamChunk chunk = place(args, args.chunks - 1 - index);
    const AdamTensor& tensor = args.tensors[chunk.tensor];
    const AdamGroup& group = args.groups[tensor.group];
    bool single = group.single[chunk.tensor - group.first_tensor];
    const auto& of_group = args.group_plans[tensor.group];
    const auto& of_tensor = args.tensor_plans[chunk.tensor];
    if (DType(tensor.p_dtype) == DType::f64) {
      update_chunk(tensor, chunk, AdamUpdate<double>(group, single, of_group, of_tensor));
    } else {
      update_chunk(tensor, chunk, AdamUpdate<float>(group, single, of_group, of_tensor));
    }
  });
}

}  // namespace zk::ZK_ISA
