// Python's entry points to the ScaledAdam kernels; zipformer_kernels/ops/scaled_adam/native.py calls them.
#pragma once

#include "common/bind.h"
#include "common/fields.h"
#include "scaled_adam/rows.h"
#include "scaled_adam/scaled_adam.h"

namespace zk {

// The tables, the number of their rows, and one buffer, `plans`, for those of all tensors and then
// those of all groups.
struct AdamArguments {
  void* tensors;
  int64_t tensor_count;
  void* groups;
  int64_t group_count;
  int64_t chunks, chunk_elements;
  void *partials, *sums, *plans, *loss_scale, *found_inf;
  int threads;

  ZK_FIELDS(tensors, tensor_count, groups, group_count, chunks, chunk_elements, partials, sums, plans, loss_scale,
            found_inf)

  template <class Real>
  AdamStep<Real> step() const {
    auto tensor_plans = static_cast<AdamTensorPlan<Real>*>(plans);
    return {static_cast<const AdamTensor*>(tensors),
            tensor_count,
            static_cast<const AdamGroup*>(groups),
            group_count,
            chunks,
            chunk_elements,
            static_cast<Real*>(partials),
            static_cast<Real*>(sums),
            tensor_plans,
            reinterpret_cast<AdamGroupPlan<Real>*>(tensor_plans + tensor_count),
            static_cast<const float*>(loss_scale),
            static_cast<const float*>(found_inf),
            threads};
  }
};

template <void (*run)(const AdamStep<double>&)>
void adam_cpu(const AdamArguments& args) {
  run(args.step<double>());
}

template <void (*run)(const AdamStep<float>&, void*)>
void adam_cuda(const AdamArguments& args, void* stream) {
  run(args.step<float>(), stream);
}

inline void bind_scaled_adam(pybind11::module_& m) {
  bind_rows(m);
  m.def("scaled_adam_chunk", [](uintptr_t tensors, int64_t count, int64_t chunk_elements, int64_t index) {
    AdamChunk chunk = adam_chunk(static_cast<const AdamTensor*>(pointer(tensors)), count, chunk_elements, index);
    return pybind11::make_tuple(chunk.tensor, chunk.begin, chunk.end);
  });
  bind_cpu(m, "scaled_adam_partials_cpu", adam_cpu<scaled_adam_partials_cpu>);
  bind_cpu(m, "scaled_adam_sums_cpu", adam_cpu<scaled_adam_sums_cpu>);
  bind_cpu(m, "scaled_adam_plan_cpu", adam_cpu<scaled_adam_plan_cpu>);
  bind_cpu(m, "scaled_adam_update_cpu", adam_cpu<scaled_adam_update_cpu>);
#if ZK_WITH_CUDA
  bind_cuda(m, "scaled_adam_partials_cuda", adam_cuda<scaled_adam_partials_cuda>);
  bind_cuda(m, "scaled_adam_sums_cuda", adam_cuda<scaled_adam_sums_cuda>);
  bind_cuda(m, "scaled_adam_plan_cuda", adam_cuda<scaled_adam_plan_cuda>);
  bind_cuda(m, "scaled_adam_update_cuda", adam_cuda<scaled_adam_update_cuda>);
#endif
}

}  // namespace zk
