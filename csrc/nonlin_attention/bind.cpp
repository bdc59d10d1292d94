// Python's entry points to the gates of NonlinAttention; zipformer_kernels/ops/nonlin_attention/infer.py calls them.
#include "nonlin_attention/nonlin_attention.h"

#include "common/bind.h"

namespace zk {

void bind_nonlin_attention(pybind11::module_& m) {
  m.def(
      "nonlin_attention_open_cpu",
      [](uintptr_t projected, uintptr_t bias, uintptr_t values, int64_t frames, int64_t sequences, int64_t channels,
         int dtype, int threads) {
        nonlin_attention_open_cpu({pointer(projected), pointer(bias), nullptr, 0, 0, pointer(values), frames, sequences,
                                   channels, DType(dtype), threads});
      },
      release_gil());
  m.def(
      "nonlin_attention_close_cpu",
      [](uintptr_t projected, uintptr_t bias, uintptr_t average, int64_t average_frame, int64_t average_sequence,
         uintptr_t out, int64_t frames, int64_t sequences, int64_t channels, int dtype, int threads) {
        nonlin_attention_close_cpu({pointer(projected), pointer(bias), pointer(average), average_frame,
                                    average_sequence, pointer(out), frames, sequences, channels, DType(dtype),
                                    threads});
      },
      release_gil());
}

}  // namespace zk
