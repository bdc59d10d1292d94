// BiasNorm on the CPU: rows split over threads, loops over channels that vectorise. A row stays in the first-level
// cache between its two readings.
#include <algorithm>

#include "bias_norm/bias_norm.h"
#include "common/parallel.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 1 << 14;  // elements

// Row functions are not inlined: compiled once, a row gets the same bits on one thread and on several.
#define ZK_ROW __attribute__((noinline))

// sum_c (scale (x_c - bias_c))^2.
template <class X, class W = Wide<X>>
ZK_ROW W sum_of_squares(const X* __restrict x, const W* __restrict bias, W scale, int64_t channels) {
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < channels; ++c) {
    W d = (widen(x[c]) - bias[c]) * scale;
    sum += d * d;
  }
  return sum;
}

template <class X, class Y, class W = Wide<X>>
ZK_ROW void forward_row(const X* __restrict x, W s, Y* __restrict y, int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) y[c] = narrow<Y>(widen(x[c]) * s);
}

// q of the row: sum_c dy_c x_c r.
template <class X, class Y, class W = Wide<X>>
ZK_ROW W projection(const Y* __restrict dy, const X* __restrict x, W r, int64_t channels) {
  W q = 0;
#pragma omp simd reduction(+ : q)
  for (int64_t c = 0; c < channels; ++c) q += widen(dy[c]) * (widen(x[c]) * r);
  return q;
}

template <class X, class Y, class W = Wide<X>>
ZK_ROW void backward_row(const Y* __restrict dy, const X* __restrict x, const W* __restrict bias, BiasNormRow<W> row,
                         X* __restrict dx, int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    W wide = widen(x[c]);
    dx[c] = narrow<X>(row.s * widen(dy[c]) - row.through_rms(wide, bias[c]));
  }
}

template <class X, class W = Wide<X>>
ZK_ROW void add_bias_row(const X* __restrict x, const W* __restrict bias, BiasNormRow<W> row, W* __restrict dbias,
                         int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) dbias[c] += row.through_rms(widen(x[c]), bias[c]);
}

// Adds all rows of `partials`, (parts, columns), to the first.
template <class W>
void add_parts(W* partials, int64_t parts, int64_t columns) {
  for (int64_t part = 1; part < parts; ++part) {
    const W* share = partials + part * columns;
    for (int64_t c = 0; c < columns; ++c) partials[c] += share[c];
  }
}

const auto dispatch = [](DType dtype, auto&& f) { dispatch_cpu(dtype, f); };

}  // namespace

void bias_norm_forward(const BiasNormForward& args) {
  dispatch_bias_norm(dispatch, args.x_dtype, args.y_dtype, [&](auto x_element, auto y_element) {
    using X = decltype(x_element);
    using Y = decltype(y_element);
    using W = Wide<X>;
    auto x = static_cast<const X*>(args.x);
    auto y = static_cast<Y*>(args.y);
    auto bias = static_cast<const W*>(args.bias);
    auto r = static_cast<W*>(args.inverse_rms);
    W gain = std::exp(*static_cast<const W*>(args.log_scale));
    int64_t channels = args.channels;
    parallel_for(args.rows, 1 + grain / channels, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const X* x_row = x + row * channels;
        r[row] = inverse_rms<W>(channels, [&](W scale) { return sum_of_squares(x_row, bias, scale, channels); });
        forward_row(x_row, gain * r[row], y + row * channels, channels);
      }
    });
  });
}

void bias_norm_backward(const BiasNormBackward& args) {
  dispatch_bias_norm(dispatch, args.x_dtype, args.y_dtype, [&](auto x_element, auto y_element) {
    using X = decltype(x_element);
    using Y = decltype(y_element);
    using W = Wide<X>;
    auto dy = static_cast<const Y*>(args.dy);
    auto x = static_cast<const X*>(args.x);
    auto dx = static_cast<X*>(args.dx);
    auto bias = static_cast<const W*>(args.bias);
    auto inverse_rms = static_cast<const W*>(args.inverse_rms);
    auto partials = static_cast<W*>(args.partials);
    int64_t channels = args.channels, parts = args.parts;
    W gain = std::exp(*static_cast<const W*>(args.log_scale));

    parallel_for(parts, 1, args.threads, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        W* share = partials ? partials + part * (channels + 1) : nullptr;
        W* dbias = args.dbias ? share : nullptr;
        if (share) std::fill_n(share, channels, W(0));
        W total = 0;
        for (int64_t i = args.rows * part / parts; i < args.rows * (part + 1) / parts; ++i) {
          const X* x_row = x + i * channels;
          const Y* dy_row = dy + i * channels;
          W r = inverse_rms[i], s = gain * r;
          W q = projection(dy_row, x_row, r, channels);
          BiasNormRow<W> row{r, s, s * q / W(channels)};
          total += q;
          if (dx) backward_row(dy_row, x_row, bias, row, dx + i * channels, channels);
          if (dbias) add_bias_row(x_row, bias, row, dbias, channels);
        }
        if (share) share[channels] = gain * total;
      }
    });
    if (!partials) return;
    add_parts(partials, parts, channels + 1);
    if (args.dbias) std::copy_n(partials, channels, static_cast<W*>(args.dbias));
    if (args.dlog_scale) *static_cast<W*>(args.dlog_scale) = partials[channels];
  });
}

}  // namespace zk::ZK_ISA
