// Arguments of the attention kernels, and their entry points. The maths: zipformer_kernels/ops/attention/reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"

namespace zk {

// A tensor (frames, sequences, heads, channels): its strides in elements, channels next to each other.
struct AttentionRows {
  void* data;  // null: not given, or not wanted
  int64_t frame, sequence, head;

  ZK_FIELDS(data, frame, sequence, head)
};

// A target's weights are exp(s - largest) scale.
template <class W>
struct SoftmaxRow {
  W largest, scale;
};

// What masked scores are set to. Where the largest score lies above `visible_limit`, their weights vanish in every
// dtype.
template <class W>
constexpr W masked_score = W(-1000);
template <class W>
constexpr W visible_limit = W(-200);

// The weights: queries against keys, with relative positions and masks. Of position projections there are
// targets + sources - 1 "frames"; their sequence stride is 0 where all sequences share them.
struct AttentionWeights {
  AttentionRows q, k, p, e;
  void* softmax;           // (heads, sequences, targets) of SoftmaxRow
  const uint8_t* padding;  // (sequences, sources) of these strides, nonzero where masked; or null. CPU: contiguous
  int64_t padding_frame, padding_sequence;
  const uint8_t* mask;  // (targets, sources) of these strides, nonzero where masked; or null
  int64_t mask_frame, mask_sequence;
  int64_t targets, sources, sequences, heads, query_channels, position_channels;
  int64_t chunk, left_chunks;  // chunk <= 0: no rule; left_chunks < 0: all
  DType dtype;

  ZK_FIELDS(q, k, p, e, softmax, padding, padding_frame, padding_sequence, mask, mask_frame, mask_sequence, targets,
            sources, sequences, heads, query_channels, position_channels, chunk, left_chunks, dtype)
};

// The softmax rows, which `weights.softmax` points to.
struct AttentionSoftmax {
  AttentionWeights weights;
  int threads;

  ZK_FIELDS(weights)
};

// W itself, (heads, sequences, targets, sources), contiguous. `weights.softmax` is not read.
struct AttentionDense {
  AttentionWeights weights;
  void* w;
  int threads;

  ZK_FIELDS(weights, w)
};

// out = W v. `out` is contiguous.
struct AttentionForward {
  AttentionWeights weights;
  AttentionRows v;
  void* out;
  int64_t channels;
  int threads;

  ZK_FIELDS(weights, v, out, channels)
};

// Also gated = out y, contiguous; not where y is without data.
struct AttentionGated : AttentionForward {
  AttentionRows y;
  void* gated;

  ZK_FIELDS(weights, v, out, channels, y, gated)
};

// One use of the weights, out = W v, and the gradient of its result. For dv alone v and out are not read.
struct AttentionUse {
  AttentionRows v, out, grad;
  int64_t channels;

  ZK_FIELDS(v, out, grad, channels)
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
  int threads;

  ZK_FIELDS(weights, w, dw, uses, dq, dk, dp, de, dv, penalty, limit)
};

// dv = W^T grad, the gradient of the values of one use.
struct AttentionValuesGradient {
  AttentionWeights weights;
  AttentionRows grad, dv;
  int64_t channels;

  ZK_FIELDS(weights, grad, dv, channels)
};

// Channels of all uses, of some heads: those of one use are read where they lie, a multiple of 8 in rows of 16 bytes,
// or it is without data; those of the others lie side by side in `values` (heads, sequences, sources, packed) and
// `grads`, of targets, contiguous. `packed` is a multiple of 8, or 0. `delta` (heads, sequences, targets), float, is
// the sum of grad out over all channels.
struct AttentionChannels {
  AttentionRows v, grad;
  int64_t channels;
  const void *values, *grads;
  int64_t packed;
  const void* delta;

  ZK_FIELDS(v, grad, channels, values, grads, packed, delta)
};

// The gradients of q, k, p and e of all uses at once; without data where not wanted. `offsets` (heads, sequences,
// parts, rows, 8), float, takes what each part, `share` blocks of 64 targets, adds to de; see `PartOfTargets`.
struct AttentionScoresGradients {
  AttentionWeights weights;
  AttentionChannels uses;
  AttentionRows dq, dk, dp;
  void* offsets;
  int64_t parts, share;
  float penalty, limit;

  ZK_FIELDS(weights, uses, dq, dk, dp, offsets, parts, share, penalty, limit)
};

// A use, which heads it has, and where its channels go in packed rows: to `first` up to `end`, with zeros behind its
// own, and zeros alone for other heads. Nowhere if both are 0.
struct AttentionPackedUse {
  AttentionUse use;
  int64_t first_head, heads, first, end;

  ZK_FIELDS(use, first_head, heads, first, end)
};

// Fills `values`, `grads` and `delta` as `AttentionChannels` has them, of all heads.
struct AttentionPack {
  std::vector<AttentionPackedUse> uses;
  void *values, *grads, *delta;
  int64_t targets, sources, sequences, heads, width;
  DType dtype;

  ZK_FIELDS(uses, values, grads, delta, targets, sources, sequences, heads, width, dtype)
};

// de from `offsets`: sums over sequences and parts.
struct AttentionOffsets {
  const void* offsets;
  AttentionRows de;
  int64_t targets, sources, sequences, heads, parts, share;
  DType dtype;

  ZK_FIELDS(offsets, de, targets, sources, sequences, heads, parts, share, dtype)
};

ZK_DECLARE_CPU(attention_softmax, AttentionSoftmax)
ZK_DECLARE_CPU(attention_weights_forward, AttentionDense)
ZK_DECLARE_CPU(attention_forward, AttentionForward)
ZK_DECLARE_CPU(attention_backward, AttentionBackward)

// `stream` is a cudaStream_t. Rows of q and k are aligned to 16 bytes, those of p, e and v to 4 elements; up to 32
// query channels, a multiple of 8, and 4 position channels; e for all sequences; no float64.
void attention_softmax_cuda(const AttentionSoftmax& args, void* stream);
void attention_forward_cuda(const AttentionForward& args, void* stream);
void attention_gated_forward_cuda(const AttentionGated& args, void* stream);
void attention_values_gradient_cuda(const AttentionValuesGradient& args, void* stream);
void attention_by_sources_cuda(const AttentionScoresGradients& args, void* stream);
void attention_by_targets_cuda(const AttentionScoresGradients& args, void* stream);
void attention_pack_cuda(const AttentionPack& args, void* stream);
void attention_offsets_cuda(const AttentionOffsets& args, void* stream);

}  // namespace zk
