// Python's entry points to the gates of NonlinAttention; zipformer_kernels/ops/nonlin_attention/cpu.py calls them.
#pragma once

#include "common/bind.h"
#include "nonlin_attention/nonlin_attention.h"

namespace zk {

inline void bind_nonlin_attention(pybind11::module_& m) {
  bind_struct<NonlinRows>(m, "NonlinRows");
  bind_cpu(m, "nonlin_attention_open_cpu", nonlin_attention_open_cpu);
  bind_cpu(m, "nonlin_attention_close_cpu", nonlin_attention_close_cpu);
  bind_cpu(m, "nonlin_attention_open_backward_cpu", nonlin_attention_open_backward_cpu);
  bind_cpu(m, "nonlin_attention_close_backward_cpu", nonlin_attention_close_backward_cpu);
}

}  // namespace zk
