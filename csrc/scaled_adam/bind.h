// Python's entry points to the ScaledAdam kernels; zipformer_kernels/ops/scaled_adam/native.py calls them.
#pragma once

#include "common/bind.h"
#include "scaled_adam/scaled_adam.h"

namespace zk {

// The tables, the number of their rows, and one buffer that holds partial sums, sums and plans in turn.
template <class Real>
static AdamStep<Real> step_args(uintptr_t tensors, int64_t tensor_count, uintptr_t groups, int64_t group_count,
                                int64_t chunks, int64_t chunk_elements, uintptr_t partials, uintptr_t sums,
                                uintptr_t plans, uintptr_t loss_scale, uintptr_t found_inf, int threads) {
  auto tensor_plans = static_cast<AdamTensorPlan<Real>*>(pointer(plans));
  return {static_cast<const AdamTensor*>(pointer(tensors)),
          tensor_count,
          static_cast<const AdamGroup*>(pointer(groups)),
          group_count,
          chunks,
          chunk_elements,
          static_cast<Real*>(pointer(partials)),
          static_cast<Real*>(pointer(sums)),
          tensor_plans,
          reinterpret_cast<AdamGroupPlan<Real>*>(tensor_plans + tensor_count),
          static_cast<const float*>(pointer(loss_scale)),
          static_cast<const float*>(pointer(found_inf)),
          threads};
}

inline void bind_scaled_adam(pybind11::module_& m) {
  m.def("scaled_adam_chunk", [](uintptr_t tensors, int64_t count, int64_t chunk_elements, int64_t index) {
    AdamChunk chunk = adam_chunk(static_cast<const AdamTensor*>(pointer(tensors)), count, chunk_elements, index);
    return pybind11::make_tuple(chunk.tensor, chunk.begin, chunk.end);
  });
  auto cpu = [&](const char* name, void (*run)(const AdamStep<double>&)) {
    m.def(
        name,
        [run](uintptr_t tensors, int64_t tensor_count, uintptr_t groups, int64_t group_count, int64_t chunks,
              int64_t chunk_elements, uintptr_t partials, uintptr_t sums, uintptr_t plans, uintptr_t loss_scale,
              uintptr_t found_inf, int threads) {
          run(step_args<double>(tensors, tensor_count, groups, group_count, chunks, chunk_elements, partials, sums,
                                plans, loss_scale, found_inf, threads));
        },
        release_gil());
  };
  cpu("scaled_adam_partials_cpu", scaled_adam_partials_cpu);
  cpu("scaled_adam_sums_cpu", scaled_adam_sums_cpu);
  cpu("scaled_adam_plan_cpu", scaled_adam_plan_cpu);
  cpu("scaled_adam_update_cpu", scaled_adam_update_cpu);
#if ZK_WITH_CUDA
  auto cuda = [&](const char* name, void (*run)(const AdamStep<float>&, void*)) {
    m.def(name, [run](uintptr_t tensors, int64_t tensor_count, uintptr_t groups, int64_t group_count, int64_t chunks,
                      int64_t chunk_elements, uintptr_t partials, uintptr_t sums, uintptr_t plans, uintptr_t loss_scale,
                      uintptr_t found_inf, uintptr_t stream) {
      run(step_args<float>(tensors, tensor_count, groups, group_count, chunks, chunk_elements, partials, sums, plans,
                           loss_scale, found_inf, 0),
          pointer(stream));
    });
  };
  cuda("scaled_adam_partials_cuda", scaled_adam_partials_cuda);
  cuda("scaled_adam_sums_cuda", scaled_adam_sums_cuda);
  cuda("scaled_adam_plan_cuda", scaled_adam_plan_cuda);
  cuda("scaled_adam_update_cuda", scaled_adam_update_cuda);
#endif
}

}  // namespace zk
