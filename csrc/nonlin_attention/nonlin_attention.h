// Arguments of the gates of NonlinAttention in inference, and their entry points.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/isa.h"

namespace zk {

// With s, x, y the thirds of rows of a projection, and its bias: values = x tanh(s) before the average over frames, and
// out = average y after it.
struct NonlinGates {
  const void* projected;  // (frames, sequences, 3 channels)
  const void* bias;       // (3 channels), or null
  const void* average;    // (frames, sequences, channels) of these strides; of `close` only
  int64_t average_frame, average_sequence;
  void* out;  // (frames, sequences, channels): values, or the average times y
  int64_t frames, sequences, channels;
  DType dtype;  // of everything: float32 or float64
  int threads;
};

ZK_DECLARE_CPU(nonlin_attention_open, NonlinGates)
ZK_DECLARE_CPU(nonlin_attention_close, NonlinGates)

}  // namespace zk
