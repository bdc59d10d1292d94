// Arguments of the attention kernels, and their entry points. The maths: zipformer_kernels/ops/attention/reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtypes.h"
#include "common/isa.h"

namespace zk {

// A tensor (frames, sequences, heads, channels): its strides in elements, channels next to each other.
struct AttentionRows {
  void* data;  // null: not given, or not wanted
  int64_t frame, sequence, head;
};

// The weights: queries against keys, with relative positions and masks. Of position projections there are
// targets + sources - 1 "frames"; their sequence stride is 0 where all sequences share them.
struct AttentionWeights {
  AttentionRows q, k, p, e;
  void* softmax;           // (heads, sequences, targets) of SoftmaxRow
  const uint8_t* padding;  // (sequences, sources), nonzero where masked; or null
  const uint8_t* mask;     // (targets, sources) of these strides, nonzero where masked; or null
  int64_t mask_frame, mask_sequence;
  int64_t targets, sources, sequences, heads, query_channels, position_channels;
  int64_t chunk, left_chunks;  // chunk <= 0: no rule; left_chunks < 0: all
  DType dtype;
  int threads;
};

// W itself, (heads, sequences, targets, sources), contiguous. `weights.softmax` is not read.
struct AttentionDense {
  AttentionWeights weights;
  void* w;
};

// out = W v. `out` is contiguous.
struct AttentionForward {
  AttentionWeights weights;
  AttentionRows v;
  void* out;
  int64_t channels;
};

// One use of the weights, out = W v, and the gradient of its result.
struct AttentionUse {
  AttentionRows v, out, grad;
  int64_t channels;
};

// Gradients from those of the results of uses; without data where not wanted. dp and de come together. The gradient
// of the scores gains penalty sign(s) where |s| > limit. With w, as of AttentionDense, nothing is computed again; the
// gradient of W may then have a part of its own, dw, or null, and dv, which only one use has, is not wanted.
struct AttentionBackward {
  AttentionWeights weights;
  const void *w, *dw;
  std::vector<AttentionUse> uses;
  AttentionRows dq, dk, dp, de, dv;
  double penalty, limit;
};

// A module that averages over a chunk of a stream and its left context, whole, for few rows:
//
//     v = src W1^T + b1, or x tanh(s) of its thirds s, x, g
//     joined = the left context, then v
//     y = src + (W joined, for each head; times g where there is one) W2^T + b2
struct AttentionStream {
  const void* src;                    // (targets, sequences, channels)
  const void *in_weight, *in_bias;    // W1 (values, or 3 values, channels), b1 or null
  const void* context;                // (sources - targets, sequences, values)
  const void* w;                      // (heads, sequences, targets, sources), contiguous
  const void *out_weight, *out_bias;  // W2 (channels, values), b2 or null
  void* joined;                       // (sources, sequences, values)
  void* y;                            // (targets, sequences, channels)
  int64_t targets, sources, sequences, channels, heads, values;
  bool gated;
  DType dtype;  // float32 or float64
  int threads;
};

ZK_DECLARE_CPU(attention_stream, AttentionStream)
ZK_DECLARE_CPU(attention_softmax, AttentionWeights)
ZK_DECLARE_CPU(attention_weights_forward, AttentionDense)
ZK_DECLARE_CPU(attention_forward, AttentionForward)
ZK_DECLARE_CPU(attention_backward, AttentionBackward)

}  // namespace zk
