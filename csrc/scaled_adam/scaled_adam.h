// Arguments of the ScaledAdam kernels, and their entry points. zipformer_kernels/ops/scaled_adam/reference.py is the
// specification; the names here are those of its docstring.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/isa.h"
#include "common/macros.h"

namespace zk {

// One tensor, as zipformer_kernels/ops/scaled_adam/table.py lays it out: 64-bit words, in this order.
struct AdamTensor {
  void* p;
  const void* g;  // null where the gradient is missing
  void* v;        // v and m are float, or double where p is
  void* m;
  int64_t numel;
  int64_t first_chunk;  // chunks of all tensors before this one
  int64_t group;
  int64_t p_dtype;
  int64_t g_dtype;
};

// One group: its statistics, in float or double, and its options.
struct AdamGroup {
  int64_t dtype;         // of the statistics
  int64_t first_tensor;  // tensors of all groups before this one
  int64_t count;         // of its tensors
  int64_t size_period;
  int64_t clipping_period;
  int64_t* step;
  int64_t* skipped;
  int64_t* clipped;
  void* norms;
  void* threshold;
  void* rms;
  void* scale_exp_avg_sq;
  void* scale_grads;
  void* contributions;
  const void* numel;  // of whole tensors, of which this process may hold a shard
  const bool* single;
  const void* lr_tensor;  // null where `lr` holds
  double lr;
  double clipping_scale;  // 0: no clipping
  double beta1;
  double beta2;
  double scalar_lr_scale;
  double eps;
  double param_min_rms;
  double param_max_rms;
  double scalar_max;
};

static_assert(sizeof(AdamTensor) == 9 * 8, "table.py writes nine words");
static_assert(sizeof(AdamGroup) == 26 * 8, "table.py writes twenty-six words");

// What pass 2 tells pass 3 of a tensor: a and move; and of a group: whether to step at all, c / K, and k.
template <class Real>
struct AdamTensorPlan {
  Real step_size;
  Real scale_move;
};

template <class Real>
struct AdamGroupPlan {
  Real ok;
  Real grad_scale;
  Real variance_scale;
};

// A step over all tensors of all groups. Real is double on the CPU, float on the GPU.
template <class Real>
struct AdamStep {
  const AdamTensor* tensors;
  int64_t tensor_count;
  const AdamGroup* groups;
  int64_t group_count;
  int64_t chunks;          // of all tensors together
  int64_t chunk_elements;  // every chunk of a tensor but its last
  Real* partials;          // (3, chunks): sums over chunks of p^2, p g, g^2
  Real* sums;              // (3, tensor_count)
  AdamTensorPlan<Real>* tensor_plans;
  AdamGroupPlan<Real>* group_plans;
  const float* loss_scale;  // null: 1
  const float* found_inf;   // null: 0
  int threads;              // on the CPU
};

struct AdamChunk {
  int64_t tensor;
  int64_t begin;  // elements of its tensor
  int64_t end;
};

// Where chunk `index` lies: in the last tensor whose first chunk is not after it, which passes over empty tensors.
ZK_HD AdamChunk adam_chunk(const AdamTensor* tensors, int64_t count, int64_t chunk_elements, int64_t index) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    int64_t middle = low + (high - low + 1) / 2;
    if (tensors[middle].first_chunk <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  int64_t begin = (index - tensors[low].first_chunk) * chunk_elements;
  int64_t end = begin + chunk_elements;
  return {low, begin, end < tensors[low].numel ? end : tensors[low].numel};
}

ZK_DECLARE_CPU(scaled_adam_partials, AdamStep<double>)  // pass 1, over chunks
ZK_DECLARE_CPU(scaled_adam_sums, AdamStep<double>)      // its sums over tensors; those of other machines may be added
ZK_DECLARE_CPU(scaled_adam_plan, AdamStep<double>)      // pass 2
ZK_DECLARE_CPU(scaled_adam_update, AdamStep<double>)    // pass 3

// The same, one launch each; `stream` is a cudaStream_t.
void scaled_adam_partials_cuda(const AdamStep<float>& args, void* stream);
void scaled_adam_sums_cuda(const AdamStep<float>& args, void* stream);
void scaled_adam_plan_cuda(const AdamStep<float>& args, void* stream);
void scaled_adam_update_cuda(const AdamStep<float>& args, void* stream);

}  // namespace zk
