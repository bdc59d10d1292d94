// ScaledAdam on the GPU: four launches for any number of tensors. Blocks find their chunk in a table on the device; one
// block plans the step, from sums that many have taken; nothing is added up in an order that could change.
#include <cmath>

#include "common/reduce.h"
#include "common/vectors.h"
#include "scaled_adam/math.h"

namespace zk {

namespace {

constexpr int threads = 256;
constexpr int plan_threads = 512;
constexpr int wide = 4;  // elements a thread handles at once: 16 bytes of floats

// Calls f with a value of the element type.
template <class F>
__device__ __forceinline__ void with_element(int64_t dtype, F f) {
  switch (DType(dtype)) {
    case DType::f16: return f(half{});
    case DType::bf16: return f(bfloat16{});
    default: return f(float{});
  }
}

__device__ __forceinline__ bool aligned(const void* a) { return reinterpret_cast<uintptr_t>(a) % 16 == 0; }

// Calls body(std::integral_constant<int, N>, i) for i in [begin, end), N elements at a time: `wide` where `packs`, and
// one for what is left.
template <class Body>
__device__ __forceinline__ void for_each_element(int64_t begin, int64_t end, bool packs, Body body) {
  int64_t rest = packs ? end - (end - begin) % wide : begin;
  for (int64_t i = begin + threadIdx.x * wide; i < rest; i += threads * wide) {
    body(std::integral_constant<int, wide>{}, i);
  }
  for (int64_t i = rest + threadIdx.x; i < end; i += threads) body(std::integral_constant<int, 1>{}, i);
}

template <class G, int N>
__device__ __forceinline__ void load_gradient(const G* g, int64_t i, float (&values)[N]) {
  if (g != nullptr) return load(g + i, values);
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = 0.0f;
}

__global__ void __launch_bounds__(threads) partials_kernel(const AdamStep<float> args) {
  __shared__ float scratch[threads / 32];
  AdamChunk chunk = adam_chunk(args.tensors, args.tensor_count, args.chunk_elements, blockIdx.x);
  const AdamTensor tensor = args.tensors[chunk.tensor];
  bool packs = aligned(tensor.p) && aligned(tensor.g);
  float sums[3] = {0.0f, 0.0f, 0.0f};
  with_element(tensor.p_dtype, [&](auto p_element) {
    with_element(tensor.g_dtype, [&](auto g_element) {
      auto all_p = static_cast<const decltype(p_element)*>(tensor.p);
      auto all_g = static_cast<const decltype(g_element)*>(tensor.g);
      for_each_element(chunk.begin, chunk.end, packs, [&](auto width, int64_t i) {
        float p[width.value], g[width.value];
        load(all_p + i, p);
        load_gradient(all_g, i, g);
#pragma unroll
        for (int j = 0; j < width.value; ++j) {
          sums[0] += p[j] * p[j];
          sums[1] += p[j] * g[j];
          sums[2] += g[j] * g[j];
        }
      });
    });
  });
  for (int k = 0; k < 3; ++k) {
    float sum = block_sum(sums[k], scratch);
    if (threadIdx.x == 0) args.partials[k * args.chunks + blockIdx.x] = sum;
  }
}

// The sums of each tensor over its chunks, p^2, p g and g^2 by blockIdx.y, a warp for each: the loads of all are in
// flight at once.
__global__ void __launch_bounds__(threads) sums_kernel(const AdamStep<float> args) {
  int64_t i = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32, k = blockIdx.y;
  if (i >= args.tensor_count) return;
  int64_t begin = args.tensors[i].first_chunk;
  int64_t end = i + 1 < args.tensor_count ? args.tensors[i + 1].first_chunk : args.chunks;
  double sum = 0;
  for (int64_t c = begin + threadIdx.x % 32; c < end; c += 32) sum += args.partials[k * args.chunks + c];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) args.sums[k * args.tensor_count + i] = float(sum);
}

// The group's gradient norm, the same in every thread.
__device__ float measure(const AdamStep<float>& args, const AdamGroup& group, float inverse_loss_scale,
                         double* scratch) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < group.count; i += plan_threads) {
    float contribution =
        adam_contribution(static_cast<const float*>(group.rms)[i], group.single[i], float(group.scalar_lr_scale),
                          args.sums[2 * args.tensor_count + group.first_tensor + i], inverse_loss_scale);
    static_cast<float*>(group.contributions)[i] = contribution;
    total += contribution;
  }
  return sqrtf(float(block_sum(total, scratch)));
}

// Records the norm, sets the clipping threshold when it is due, and returns c, the same in every thread.
__device__ float clip(const AdamGroup& group, int64_t t, float norm) {
  if (group.clipping_scale == 0) return 1.0f;
  int64_t period = group.clipping_period;
  float* norms = static_cast<float*>(group.norms);
  float* threshold = static_cast<float*>(group.threshold);
  if (threadIdx.x == 0 && t > 0) norms[t % period] = norm;
  __syncthreads();
  AdamEstimate estimate = adam_estimate(t, period);
  if (estimate.due) {
    for (int64_t i = threadIdx.x; i < period; i += plan_threads) {
      if (adam_rank(norms, period, i) != estimate.rank) continue;
      *threshold = float(group.clipping_scale) * norms[i] * (estimate.early ? float(adam_early_slack) : 1.0f);
    }
    __syncthreads();
  }
  float factor = adam_min(*threshold / (norm + 1e-20f), 1.0f);
  if (threadIdx.x == 0) *group.clipped = (estimate.due ? 0 : *group.clipped) + (factor < 1.0f);
  return factor;
}

__device__ void plan_group(const AdamStep<float>& args, const AdamGroup& group, AdamGroupPlan<float>& plan, float norm,
                           float inverse_loss_scale) {
  int64_t t = *group.step;
  float log_beta2 = float(log(group.beta2));
  float lr = adam_learning_rate<float>(group);
  float grad_scale = clip(group, t, norm) * inverse_loss_scale;
  for (int64_t i = threadIdx.x; i < group.count; i += plan_threads) {
    const float* sums = args.sums + group.first_tensor + i;
    args.tensor_plans[group.first_tensor + i] =
        adam_plan_tensor(group, i, t, sums[0], sums[args.tensor_count], grad_scale, lr, log_beta2);
  }
  __syncthreads();  // all have read the norm, which stands in the plan, and t
  if (threadIdx.x == 0) {
    plan = {1.0f, grad_scale, adam_variance_scale(log_beta2, t)};
    *group.step = t + 1;
  }
}

// One block.
__global__ void __launch_bounds__(plan_threads) plan_kernel(const AdamStep<float> args) {
  __shared__ double scratch[plan_threads / 32];
  float inverse_loss_scale = args.loss_scale ? 1.0f / *args.loss_scale : 1.0f;
  bool ok = args.found_inf == nullptr || *args.found_inf == 0.0f;
  for (int64_t k = 0; k < args.group_count; ++k) {
    float norm = measure(args, args.groups[k], inverse_loss_scale, scratch);
    ok = ok && adam_finite(norm);
    if (threadIdx.x == 0) args.group_plans[k].grad_scale = norm;  // until its plan takes the place
  }
  __syncthreads();
  for (int64_t k = 0; k < args.group_count; ++k) {
    const AdamGroup& group = args.groups[k];
    if (ok) {
      plan_group(args, group, args.group_plans[k], args.group_plans[k].grad_scale, inverse_loss_scale);
    } else if (threadIdx.x == 0) {
      *group.skipped += 1;
      args.group_plans[k] = {0.0f, 0.0f, 0.0f};
    }
  }
}

__global__ void __launch_bounds__(threads) update_kernel(const AdamStep<float> args) {
  AdamChunk chunk = adam_chunk(args.tensors, args.tensor_count, args.chunk_elements, blockIdx.x);
  const AdamTensor tensor = args.tensors[chunk.tensor];
  const AdamGroupPlan<float> of_group = args.group_plans[tensor.group];
  if (of_group.ok == 0.0f) return;
  const AdamGroup& group = args.groups[tensor.group];
  bool single = group.single[chunk.tensor - group.first_tensor];
  const AdamUpdate<float> update(group, single, of_group, args.tensor_plans[chunk.tensor]);
  bool packs = aligned(tensor.p) && aligned(tensor.g) && aligned(tensor.v) && aligned(tensor.m);
  with_element(tensor.p_dtype, [&](auto p_element) {
    with_element(tensor.g_dtype, [&](auto g_element) {
      auto all_p = static_cast<decltype(p_element)*>(tensor.p);
      auto all_g = static_cast<const decltype(g_element)*>(tensor.g);
      auto all_v = static_cast<float*>(tensor.v);
      auto all_m = static_cast<float*>(tensor.m);
      for_each_element(chunk.begin, chunk.end, packs, [&](auto width, int64_t i) {
        float p[width.value], g[width.value], v[width.value], m[width.value];
        load(all_p + i, p);
        load_gradient(all_g, i, g);
        load(all_v + i, v);
        load(all_m + i, m);
#pragma unroll
        for (int j = 0; j < width.value; ++j) update(p[j], g[j], v[j], m[j]);
        store(all_p + i, p);
        store(all_v + i, v);
        store(all_m + i, m);
      });
    });
  });
}

}  // namespace

void scaled_adam_partials_cuda(const AdamStep<float>& args, void* stream) {
  launch("scaled_adam partials", partials_kernel, grid_size(args.chunks), threads, 0, stream, args);
}

void scaled_adam_sums_cuda(const AdamStep<float>& args, void* stream) {
  dim3 blocks(grid_size(ceil_div(args.tensor_count, threads / 32)), 3);
  launch("scaled_adam sums", sums_kernel, blocks, threads, 0, stream, args);
}

void scaled_adam_plan_cuda(const AdamStep<float>& args, void* stream) {
  launch("scaled_adam plan", plan_kernel, 1, plan_threads, 0, stream, args);
}

void scaled_adam_update_cuda(const AdamStep<float>& args, void* stream) {
  launch("scaled_adam update", update_kernel, grid_size(args.chunks), threads, 0, stream, args);
}

}  // namespace zk
