// The gates of NonlinAttention: one pass each, which also adds the projection's bias.
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

// Calls f(row, frame, sequence) for all rows.
template <class F>
void each_row(const NonlinGates& args, F f) {
  parallel_for(args.frames * args.sequences, 1 + grain / args.channels, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row, row / args.sequences, row % args.sequences);
  });
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
  auto average = static_cast<const W*>(args.average);
  auto out = static_cast<W*>(args.out);
  each_row(args, [&](int64_t row, int64_t t, int64_t b) {
    const W* from = average + t * args.average_frame + b * args.average_sequence;
    close_row(from, y + row * 3 * channels, bias, channels, out + row * channels);
  });
}

}  // namespace

void nonlin_attention_open(const NonlinGates& args) {
  args.dtype == DType::f64 ? open<double>(args) : open<float>(args);
}

void nonlin_attention_close(const NonlinGates& args) {
  args.dtype == DType::f64 ? close<double>(args) : close<float>(args);
}

}  // namespace zk::ZK_ISA
