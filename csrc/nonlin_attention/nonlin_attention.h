// Arguments of the gates of NonlinAttention around weights that are stored, and their entry points.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"

namespace zk {

// Rows of channels next to each other, (frames, sequences, channels); strides in elements.
struct NonlinRows {
  void* data;
  int64_t frame, sequence;

  ZK_FIELDS(data, frame, sequence)
};

// With s, x, y the thirds of rows of a projection, and its bias: values = x tanh(s) before the average over frames, and
// out = average y after it.
struct NonlinGates {
  const void* projected;  // (frames, sequences, 3 channels)
  const void* bias;       // (3 channels), or null
  NonlinRows average;     // of `close`; without data elsewhere
  void* out;              // (frames, sequences, channels): values, or the average times y
  int64_t frames, sequences, channels;
  DType dtype;  // of everything: float32 or float64
  int threads;

  ZK_FIELDS(projected, bias, average, out, frames, sequences, channels, dtype)
};

// Their gradients. close: inner = grad y and dy = grad average; open, where grad is that of the values: ds = grad x (1
// - tanh(s)^2) and dx = grad tanh(s). ds, dx and dy are the thirds of `dprojected`.
struct NonlinGatesBackward {
  const void* projected;  // (frames, sequences, 3 channels)
  NonlinRows grad;
  NonlinRows average, inner;  // of `close`; without data elsewhere
  void* dprojected;           // (frames, sequences, 3 channels)
  int64_t frames, sequences, channels;
  DType dtype;  // of everything: float32 or float64
  int threads;

  ZK_FIELDS(projected, grad, average, inner, dprojected, frames, sequences, channels, dtype)
};

// The gates on the GPU, element by element:
//
//   open             (s, x) -> x tanh(s)
//   close            (average, y) -> average y
//   open_backward    (dvalues, s, x) -> ds, dx
//   close_backward   (grad, average, y) -> the gradient of the average, dy
//
// What a gate does not have is without data.
struct NonlinMap {
  NonlinRows first, second, third, out, other;
  int64_t frames, sequences, channels;
  DType dtype;  // of everything

  ZK_FIELDS(first, second, third, out, other, frames, sequences, channels, dtype)
};

ZK_DECLARE_CPU(nonlin_attention_open_backward, NonlinGatesBackward)
ZK_DECLARE_CPU(nonlin_attention_close_backward, NonlinGatesBackward)
ZK_DECLARE_CPU(nonlin_attention_open, NonlinGates)
ZK_DECLARE_CPU(nonlin_attention_close, NonlinGates)

// `stream` is a cudaStream_t. No float64.
void nonlin_attention_open_cuda(const NonlinMap& args, void* stream);
void nonlin_attention_close_cuda(const NonlinMap& args, void* stream);
void nonlin_attention_open_backward_cuda(const NonlinMap& args, void* stream);
void nonlin_attention_close_backward_cuda(const NonlinMap& args, void* stream);

}  // namespace zk
