// The gates of NonlinAttention: one pass each, which in inference also adds the projection's bias.
#include "common/math.h"
#include "common/parallel.h"
#include "nonlin_attention/nonlin_attention.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 1 << 13;  // elements

template <class W>
void open_row(const W* __restrict s, const W* __restrict x, const W* __restrict bias, int64_t channels,
              W* __restrict values) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    values[c] = (x[c] + (bias ? bias[channels + c] : W(0))) * tanh_of(s[c] + (bias ? bias[c] : W(0)));
  }
}

template <class W>
void close_row(const W* __restrict average, const W* __restrict y, const W* __restrict bias, int64_t channels,
               W* __restrict out) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) out[c] = average[c] * (y[c] + (bias ? bias[c] : W(0)));
}

template <class W>
void open_row_backward(const W* __restrict grad, const W* __restrict s, const W* __restrict x, int64_t channels,
                       W* __restrict ds, W* __restrict dx) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    W gate = tanh_of(s[c]);
    ds[c] = grad[c] * x[c] * (W(1) - gate * gate);
    dx[c] = grad[c] * gate;
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
void open(const NonlinOpen& args) {
  auto bias = static_cast<const W*>(args.bias);
  auto values = static_cast<W*>(args.values);
  each_row(args, [&](int64_t row, int64_t t, int64_t b) {
    open_row(at<W>(args.s, t, b), at<W>(args.x, t, b), bias, args.channels, values + row * args.channels);
  });
}

template <class W>
void close(const NonlinClose& args) {
  auto bias = static_cast<const W*>(args.bias);
  auto out = static_cast<W*>(args.out);
  each_row(args, [&](int64_t row, int64_t t, int64_t b) {
    close_row(at<W>(args.average, t, b), at<W>(args.y, t, b), bias, args.channels, out + row * args.channels);
  });
}

template <class W>
void open_backward(const NonlinOpenBackward& args) {
  each_row(args, [&](int64_t, int64_t t, int64_t b) {
    open_row_backward(at<W>(args.grad, t, b), at<W>(args.s, t, b), at<W>(args.x, t, b), args.channels,
                      at<W>(args.ds, t, b), at<W>(args.dx, t, b));
  });
}

template <class W>
void close_backward(const NonlinCloseBackward& args) {
  each_row(args, [&](int64_t, int64_t t, int64_t b) {
    close_row_backward(at<W>(args.grad, t, b), at<W>(args.average, t, b), at<W>(args.y, t, b), args.channels,
                       at<W>(args.inner, t, b), at<W>(args.dy, t, b));
  });
}

}  // namespace

void nonlin_attention_open_backward(const NonlinOpenBackward& args) {
  args.dtype == DType::f64 ? open_backward<double>(args) : open_backward<float>(args);
}

void nonlin_attention_close_backward(const NonlinCloseBackward& args) {
  args.dtype == DType::f64 ? close_backward<double>(args) : close_backward<float>(args);
}

void nonlin_attention_open(const NonlinOpen& args) {
  args.dtype == DType::f64 ? open<double>(args) : open<float>(args);
}

void nonlin_attention_close(const NonlinClose& args) {
  args.dtype == DType::f64 ? close<double>(args) : close<float>(args);
}

}  // namespace zk::ZK_ISA
