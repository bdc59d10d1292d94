// Python's entry points to the attention kernels; zipformer_kernels/ops/attention/native.py calls them.
#pragma once

#include "attention/attention.h"
#include "common/bind.h"

namespace zk {

using Rows = std::array<int64_t, 4>;   // address and strides of frames, sequences, heads
using Masks = std::array<int64_t, 4>;  // addresses of padding and mask, the mask's strides of frames, sequences
using AttentionSizes = std::array<int64_t, 8>;  // targets ... position_channels, chunk, left_chunks

using Use = std::tuple<Rows, Rows, Rows, int64_t>;  // values, result, its gradient; channels

static AttentionRows rows(const Rows& x) { return {pointer(x[0]), x[1], x[2], x[3]}; }

static AttentionWeights weights(const std::array<Rows, 4>& scores, uintptr_t softmax, const Masks& masks,
                                const AttentionSizes& sizes, int dtype, int threads) {
  auto bytes = [](int64_t address) { return static_cast<const uint8_t*>(pointer(address)); };
  return {rows(scores[0]), rows(scores[1]), rows(scores[2]), rows(scores[3]), pointer(softmax),
          bytes(masks[0]), bytes(masks[1]), masks[2],        masks[3],        sizes[0],
          sizes[1],        sizes[2],        sizes[3],        sizes[4],        sizes[5],
          sizes[6],        sizes[7],        DType(dtype),    threads};
}

static std::vector<AttentionUse> uses(const std::vector<Use>& given) {
  std::vector<AttentionUse> found;
  for (const auto& [v, out, grad, channels] : given) found.push_back({rows(v), rows(out), rows(grad), channels});
  return found;
}

inline void bind_attention(pybind11::module_& m) {
  using Scores = std::array<Rows, 4>;
  m.def(
      "attention_softmax_cpu",
      [](const Scores& scores, uintptr_t softmax, const Masks& masks, const AttentionSizes& sizes, int dtype,
         int threads) { attention_softmax_cpu(weights(scores, softmax, masks, sizes, dtype, threads)); },
      release_gil());
  m.def(
      "attention_forward_cpu",
      [](const Scores& scores, uintptr_t softmax, const Masks& masks, const AttentionSizes& sizes, int dtype,
         const Rows& v, uintptr_t out, int64_t channels, int threads) {
        attention_forward_cpu(
            {weights(scores, softmax, masks, sizes, dtype, threads), rows(v), pointer(out), channels});
      },
      release_gil());
  m.def(
      "attention_backward_cpu",
      [](const Scores& scores, uintptr_t softmax, const Masks& masks, const AttentionSizes& sizes, int dtype,
         const Use& use, const std::array<Rows, 5>& gradients, double penalty, double limit, int threads) {
        attention_backward_cpu({weights(scores, softmax, masks, sizes, dtype, threads), nullptr, nullptr, uses({use}),
                                rows(gradients[0]), rows(gradients[1]), rows(gradients[2]), rows(gradients[3]),
                                rows(gradients[4]), penalty, limit});
      },
      release_gil());
  m.def(
      "attention_stream_cpu",
      [](const std::array<uintptr_t, 9>& in, const std::array<int64_t, 6>& n, bool gated, int dtype, int threads) {
        attention_stream_cpu({pointer(in[0]), pointer(in[1]), pointer(in[2]), pointer(in[3]), pointer(in[4]),
                              pointer(in[5]), pointer(in[6]), pointer(in[7]), pointer(in[8]), n[0], n[1], n[2], n[3],
                              n[4], n[5], gated, DType(dtype), threads});
      },
      release_gil());
  m.def(
      "attention_weights_forward_cpu",
      [](const Scores& scores, uintptr_t w, const Masks& masks, const AttentionSizes& sizes, int dtype, int threads) {
        attention_weights_forward_cpu({weights(scores, 0, masks, sizes, dtype, threads), pointer(w)});
      },
      release_gil());
  m.def(
      "attention_weights_backward_cpu",
      [](const Scores& scores, uintptr_t w, const Masks& masks, const AttentionSizes& sizes, int dtype, uintptr_t dw,
         const std::vector<Use>& given, const std::array<Rows, 4>& gradients, double penalty, double limit,
         int threads) {
        attention_backward_cpu({weights(scores, 0, masks, sizes, dtype, threads),
                                pointer(w),
                                pointer(dw),
                                uses(given),
                                rows(gradients[0]),
                                rows(gradients[1]),
                                rows(gradients[2]),
                                rows(gradients[3]),
                                {},
                                penalty,
                                limit});
      },
      release_gil());
}

}  // namespace zk
