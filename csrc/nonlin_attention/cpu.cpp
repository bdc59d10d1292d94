// The gates of NonlinAttention: one pass each, which in inference also adds the projection's bias.
#include "common/math.h"
#include "common/parallel.h"
#include "nonlin_attention/nonlin_attention.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 1 << 13;  // elements

template <class W>
void open_row(const W* __restrict projected, const W* __restrict bias, int64_t channels, W* __restrict to) {
  const W *s = projected, *x = projected + channels;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    to[c] = (x[c] + (bias ? bias[channels + c] : W(0))) * tanh_of(s[c] + (bias ? bias[c] : W(0)));
  }
}

template <class W>
void close_row(const W* __restrict average, const W* __restrict y, const W* __restrict bias, int64_t channels,
               W* __restrict to) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) to[c] = average[c] * (y[c] + (bias ? bias[c] : W(0)));
}

template <class W>
void open_row_backward(const W* __restrict projected, const W* __restrict dvalues, int64_t channels,
                       W* __restrict gradients) {
  const W *s = projected, *x = projected + channels;
  W *ds = gradients, *dx = gradients + channels;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    W gate = tanh_of(s[c]);
    ds[c] = dvalues[c] * x[c] * (W(1) - gate * gate);
    dx[c] = dvalues[c] * gate;
  }
}

template <class W>
void close_row_backward(const W* __restrict grad, const W* __restrict average, const W* __restrict y, int64_t channels,
                        W* __restrict inner, W* __restrict dy) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    inner[c] = grad[c] * y[c];
    dy[c] = grad[c] * average[c];
  }
}

// Calls f(row, frame, sequence) for all rows.
template <class Args, class F>
void each_row(const Args& args, F f) {
  parallel_for(args.frames * args.sequences, 1 + grain / args.channels, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row, row / args.sequences, row % args.sequences);
  });
}

template <class W>
W* at(const NonlinRows& x, int64_t t, int64_t b) {
  return static_cast<W*>(x.data) + t * x.frame + b * x.sequence;
}

template <class W>
void open(const NonlinGates& args) {
  auto projected = static_cast<const W*>(args.projected), bias = static_cast<const W*>(args.bias);
  auto out = static_cast<W*>(args.out);
  int64_t channels = args.channels;
  each_row(args, [&](int64_t row, int64_t, int64_t) {
    open_row(projected + row * 3 * channels, bias, channels, out + row * channels);
  });
}

template <class W>
void close(const NonlinGates& args) {
  int64_t channels = args.channels;
  auto y = static_cast<const W*>(args.projected) + 2 * channels;
  auto bias = args.bias ? static_cast<const W*>(args.bias) + 2 * channels : nullptr;
  auto out = static_cast<W*>(args.out);
  each_row(args, [&](int64_t row, int64_t t, int64_t b) {
    close_row<W>(at<W>(args.average, t, b), y + row * 3 * channels, bias, channels, out + row * channels);
  });
}

template <class W>
void open_backward(const NonlinGatesBackward& args) {
  auto projected = static_cast<const W*>(args.projected);
  auto gradients = static_cast<W*>(args.dprojected);
  int64_t width = 3 * args.channels;
  each_row(args, [&](int64_t row, int64_t t, int64_t b) {
    open_row_backward(projected + row * width, at<W>(args.grad, t, b), args.channels, gradients + row * width);
  });
}

template <class W>
void close_backward(const NonlinGatesBackward& args) {
  int64_t width = 3 * args.channels;
  auto y = static_cast<const W*>(args.projected) + 2 * args.channels;
  auto dy = static_cast<W*>(args.dprojected) + 2 * args.channels;
  each_row(args, [&](int64_t row, int64_t t, int64_t b) {
    close_row_backward(at<W>(args.grad, t, b), at<W>(args.average, t, b), y + row * width, args.channels,
                       at<W>(args.inner, t, b), dy + row * width);
  });
}

}  // namespace

void nonlin_attention_open_backward(const NonlinGatesBackward& args) {
  args.dtype == DType::f64 ? open_backward<double>(args) : open_backward<float>(args);
}

void nonlin_attention_close_backward(const NonlinGatesBackward& args) {
  args.dtype == DType::f64 ? close_backward<double>(args) : close_backward<float>(args);
}

void nonlin_attention_open(const NonlinGates& args) {
  args.dtype == DType::f64 ? open<double>(args) : open<float>(args);
}

void nonlin_attention_close(const NonlinGates& args) {
  args.dtype == DType::f64 ? close<double>(args) : close<float>(args);
}

}  // namespace zk::ZK_ISA
