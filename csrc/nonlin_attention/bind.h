// Python's entry points to the gates of NonlinAttention; cpu.py, stored.py and cuda.py in
// zipformer_kernels/ops/nonlin_attention call them.
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
#if ZK_WITH_CUDA
  bind_cuda(m, "nonlin_attention_open_cuda", nonlin_attention_open_cuda);
  bind_cuda(m, "nonlin_attention_close_cuda", nonlin_attention_close_cuda);
  bind_cuda(m, "nonlin_attention_open_backward_cuda", nonlin_attention_open_backward_cuda);
  bind_cuda(m, "nonlin_attention_close_backward_cuda", nonlin_attention_close_backward_cuda);
#endif
}

}  // namespace zk
