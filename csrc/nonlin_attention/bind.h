// Python's entry points to the gates of NonlinAttention; infer.py and kept.py in zipformer_kernels/ops/nonlin_attention
// call them.
#pragma once

#include "common/bind.h"
#include "nonlin_attention/nonlin_attention.h"

namespace zk {

using Strided = std::array<int64_t, 3>;  // address, strides of frames and sequences

static NonlinRows strided(const Strided& x) { return {pointer(x[0]), x[1], x[2]}; }

inline void bind_nonlin_attention(pybind11::module_& m) {
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
  m.def(
      "nonlin_attention_open_backward_cpu",
      [](uintptr_t projected, const Strided& dvalues, uintptr_t dprojected, int64_t frames, int64_t sequences,
         int64_t channels, int dtype, int threads) {
        nonlin_attention_open_backward_cpu({pointer(projected),
                                            strided(dvalues),
                                            {},
                                            {},
                                            pointer(dprojected),
                                            frames,
                                            sequences,
                                            channels,
                                            DType(dtype),
                                            threads});
      },
      release_gil());
  m.def(
      "nonlin_attention_close_backward_cpu",
      [](uintptr_t projected, const Strided& grad, const Strided& average, const Strided& inner, uintptr_t dprojected,
         int64_t frames, int64_t sequences, int64_t channels, int dtype, int threads) {
        nonlin_attention_close_backward_cpu({pointer(projected), strided(grad), strided(average), strided(inner),
                                             pointer(dprojected), frames, sequences, channels, DType(dtype), threads});
      },
      release_gil());
}

}  // namespace zk
