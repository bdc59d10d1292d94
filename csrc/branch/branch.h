// Residual branches of few rows, each in one call, for a stream's chunk: reading their weights takes the time.
//
//     y = src + W2 middle(W1 src + b1) + b2
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"
#include "swoosh/math.h"

namespace zk {

// Rows are those of frames and sequences: (frames, sequences, channels), dense.
struct Branch {
  const void* src;                    // (rows, channels)
  const void *in_weight, *in_bias;    // W1 (of the middle's input, channels), b1 or null
  const void *out_weight, *out_bias;  // W2 (channels, of the middle's output), b2 or null
  void* y;                            // (rows, channels); not src
  int64_t channels;
  DType dtype;  // of everything: float32 or float64
  int threads;
};

// The middle is Swoosh.
struct FeedForwardBranch : Branch {
  int64_t rows, hidden;
  SwooshKind kind;

  ZK_FIELDS(src, in_weight, in_bias, out_weight, out_bias, y, channels, dtype, rows, hidden, kind)
};

// The middle of halves a, s is that of conv_module, in one chunk, and SwooshR: see conv_module/math.h.
struct ConvolutionBranch : Branch {
  int64_t frames, sequences, kernel;
  const uint8_t* padding;                   // (sequences, frames), not 0 where padding; or null
  const void *weight, *bias;                // (channels, K); (channels), or null
  const void *causal_weight, *causal_bias;  // (channels, K / 2 + 1); (channels), or null
  const void* edge_scale;                   // (2, channels, K)
  const void* left;                         // (sequences, channels, K / 2), gated input before the frames
  void* next;                               // `left` for the frames to come

  ZK_FIELDS(src, in_weight, in_bias, out_weight, out_bias, y, channels, dtype, frames, sequences, kernel, padding,
            weight, bias, causal_weight, causal_bias, edge_scale, left, next)
};

// The middle is an average over the frames of a left context and these, with given weights:
//
//     v = its input, or x tanh(s) of its thirds s, x, g where it is gated
//     joined = the left context, then v
//     output = weights joined, for each head; times g where it is gated
struct AverageBranch : Branch {
  int64_t targets, sources, sequences, heads, values;
  bool gated;
  const void* context;  // (sources - targets, sequences, values)
  const void* weights;  // (heads, sequences, targets, sources)
  void* joined;         // (sources, sequences, values)

  ZK_FIELDS(src, in_weight, in_bias, out_weight, out_bias, y, channels, dtype, targets, sources, sequences, heads,
            values, gated, context, weights, joined)
};

ZK_DECLARE_CPU(feed_forward_branch, FeedForwardBranch)
ZK_DECLARE_CPU(convolution_branch, ConvolutionBranch)
ZK_DECLARE_CPU(average_branch, AverageBranch)

}  // namespace zk
