// Python's entry points to the attention kernels; cpu.py and cuda.py in zipformer_kernels/ops/attention call them.
#pragma once

#include "attention/attention.h"
#include "common/bind.h"

namespace zk {

inline void bind_attention(pybind11::module_& m) {
  bind_struct<AttentionRows>(m, "AttentionRows");
  bind_struct<AttentionWeights>(m, "AttentionWeights");
  bind_struct<AttentionUse>(m, "AttentionUse");
  bind_cpu(m, "attention_softmax_cpu", attention_softmax_cpu);
  bind_cpu(m, "attention_forward_cpu", attention_forward_cpu);
  bind_cpu(m, "attention_backward_cpu", attention_backward_cpu);
  bind_cpu(m, "attention_weights_forward_cpu", attention_weights_forward_cpu);
#if ZK_WITH_CUDA
  bind_struct<AttentionChannels>(m, "AttentionChannels");
  bind_struct<AttentionPackedUse>(m, "AttentionPackedUse");
  bind_cuda(m, "attention_softmax_cuda", attention_softmax_cuda);
  bind_cuda(m, "attention_forward_cuda", attention_forward_cuda);
  bind_cuda(m, "attention_gated_forward_cuda", attention_gated_forward_cuda);
  bind_cuda(m, "attention_values_gradient_cuda", attention_values_gradient_cuda);
  bind_cuda(m, "attention_by_sources_cuda", attention_by_sources_cuda);
  bind_cuda(m, "attention_by_targets_cuda", attention_by_targets_cuda);
  bind_cuda(m, "attention_pack_cuda", attention_pack_cuda);
  bind_cuda(m, "attention_offsets_cuda", attention_offsets_cuda);
#endif
}

}  // namespace zk
