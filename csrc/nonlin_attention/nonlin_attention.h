// Arguments of the gates of NonlinAttention around an average over frames, and their entry points.
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

// The gates of a projection's thirds s, x, y, of which each may lie anywhere: values = x tanh(s) before the average
// over frames, and out = average y after it. Biases are null or added first. On the CPU everything is float32 or
// float64.
struct NonlinOpen {
  NonlinRows s, x;
  const void* bias;  // (2 channels): of s, then of x
  void* values;      // (frames, sequences, channels)
  int64_t frames, sequences, channels;
  DType dtype;
  int threads;

  ZK_FIELDS(s, x, bias, values, frames, sequences, channels, dtype)
};

struct NonlinClose {
  NonlinRows average, y;
  const void* bias;  // (channels), of y
  void* out;         // (frames, sequences, channels)
  int64_t frames, sequences, channels;
  DType dtype;
  int threads;

  ZK_FIELDS(average, y, bias, out, frames, sequences, channels, dtype)
};

// Their gradients. close: inner = grad y and dy = grad average.
struct NonlinCloseBackward {
  NonlinRows grad, average, y, inner, dy;
  int64_t frames, sequences, channels;
  DType dtype;
  int threads;

  ZK_FIELDS(grad, average, y, inner, dy, frames, sequences, channels, dtype)
};

// open: ds = grad x (1 - tanh(s)^2) and dx = grad tanh(s), where grad is that of the values.
struct NonlinOpenBackward {
  NonlinRows grad, s, x, ds, dx;
  int64_t frames, sequences, channels;
  DType dtype;
  int threads;

  ZK_FIELDS(grad, s, x, ds, dx, frames, sequences, channels, dtype)
};

// The gates on the GPU, element by element:
//
//   open             (s, x) -> x tanh(s)
//   close            (average, y) -> average y
//   open_backward    (dvalues, s, x) -> ds, dx, and the values x tanh(s) where they are given room
//   close_backward   (grad, average, y) -> the gradient of the average, dy
//
// What a gate does not have is without data.
struct NonlinMap {
  NonlinRows first, second, third, out, other, values;
  int64_t frames, sequences, channels;
  DType dtype;  // of everything

  ZK_FIELDS(first, second, third, out, other, values, frames, sequences, channels, dtype)
};

ZK_DECLARE_CPU(nonlin_attention_open, NonlinOpen)
ZK_DECLARE_CPU(nonlin_attention_close, NonlinClose)
ZK_DECLARE_CPU(nonlin_attention_open_backward, NonlinOpenBackward)
ZK_DECLARE_CPU(nonlin_attention_close_backward, NonlinCloseBackward)

// `stream` is a cudaStream_t. No float64.
void nonlin_attention_open_cuda(const NonlinMap& args, void* stream);
void nonlin_attention_close_cuda(const NonlinMap& args, void* stream);
void nonlin_attention_open_backward_cuda(const NonlinMap& args, void* stream);
void nonlin_attention_close_backward_cuda(const NonlinMap& args, void* stream);

}  // namespace zk
