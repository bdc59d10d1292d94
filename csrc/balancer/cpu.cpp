// The Balancer on the CPU: the moments of each channel in one pass, the changed gradient in another.
#include "balancer/balancer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 1 << 14;       // elements
constexpr int64_t block_channels = 256;  // a block of rows of so many channels
constexpr int64_t block_rows = 32;       // stays in the first-level cache
constexpr double tiny = 1e-20;           // below it a variance or mean square counts as constant

// Not inlined: compiled once, a row gets the same bits on one thread and on several.
#define ZK_ROW __attribute__((noinline))

// Mean of `rows` rows, and the sum of squared deviations.
template <class X, class W = Wide<X>>
ZK_ROW void moments_of(const X* x, int64_t rows, int64_t step, int64_t channels, W* __restrict mean,
                       W* __restrict square) {
  std::fill_n(mean, channels, W(0));
  std::fill_n(square, channels, W(0));
  for (int64_t i = 0; i < rows; ++i) {
    const X* row = x + i * step;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) mean[c] += widen(row[c]);
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= W(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const X* row = x + i * step;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) square[c] += (widen(row[c]) - mean[c]) * (widen(row[c]) - mean[c]);
  }
}

// Adds the moments of `more` rows to those of `rows` rows (Chan, Golub and LeVeque, 1979): nothing cancels.
template <class W>
ZK_ROW void merge(int64_t rows, W* __restrict mean, W* __restrict square, int64_t more, const W* __restrict other_mean,
                  const W* __restrict other_square, int64_t channels) {
  W share = W(more) / W(rows + more), weight = share * W(rows);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    W difference = other_mean[c] - mean[c];
    mean[c] += share * difference;
    square[c] += other_square[c] + weight * difference * difference;
  }
}

// The moments of one part, for a block of channels from `first` on.
template <class X, class W = Wide<X>>
void sum_part(const BalancerMoments& n, int64_t part, int64_t first) {
  int64_t channels = std::min(block_channels, n.channels - first);
  W* mean = static_cast<W*>(n.partials) + part * 2 * n.channels + first;
  W* square = mean + n.channels;
  W block_mean[block_channels], block_square[block_channels];
  std::fill_n(mean, channels, W(0));
  std::fill_n(square, channels, W(0));
  int64_t begin = n.rows * part / n.parts, end = n.rows * (part + 1) / n.parts;
  for (int64_t row = begin; row < end; row += block_rows) {
    int64_t rows = std::min(block_rows, end - row);
    const X* x = static_cast<const X*>(n.x) + row * n.channels + first;
    moments_of(x, rows, n.channels, channels, block_mean, block_square);
    merge(row - begin, mean, square, rows, block_mean, block_square, channels);
  }
}

template <class X, class W = Wide<X>>
void find_moments(const BalancerMoments& n) {
  int64_t blocks = (n.channels + block_channels - 1) / block_channels;
  int threads = n.rows * n.channels < grain ? 1 : n.threads;
  parallel_for(n.parts * blocks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum_part<X>(n, i / blocks, i % blocks * block_channels);
  });
  W *mean = static_cast<W*>(n.mean), *variance = static_cast<W*>(n.variance);
  std::fill_n(mean, n.channels, W(0));
  std::fill_n(variance, n.channels, W(0));
  for (int64_t part = 0; part < n.parts; ++part) {
    int64_t begin = n.rows * part / n.parts, end = n.rows * (part + 1) / n.parts;
    const W* from = static_cast<const W*>(n.partials) + part * 2 * n.channels;
    merge(begin, mean, variance, end - begin, from, from + n.channels, n.channels);
  }
  for (int64_t c = 0; c < n.channels; ++c) variance[c] /= W(n.rows);
}

template <class W>
W sign(W x) {
  return W((x > 0) - (x < 0));
}

// As torch.clamp: the upper limit wins where they cross, and NaN stays.
template <class W>
W clamp(W x, double low, double high) {
  return std::min(std::max(x, W(low)), W(high));
}

// What is added to a gradient g: |g| (level + slope (x - mean)).
template <class W>
void push(W mean, W variance, const BalancerLimits& limits, W& level, W& slope) {
  W square = variance + mean * mean;
  W stddev = std::sqrt(std::max(variance, W(tiny))), rms = std::sqrt(std::max(square, W(tiny)));
  W ratio = mean / stddev, part = stddev / rms;
  W mean_push = sign(ratio - clamp(ratio, limits.min_mean, limits.max_mean));
  W rms_push = sign(clamp(rms, limits.min_rms, limits.max_rms) - rms) * (part * part);
  if (!(square >= W(tiny))) rms_push = 0;
  level = mean_push - rms_push * ratio;
  slope = (variance >= W(tiny) ? -mean_push * ratio : W(0)) - rms_push;
  W norm = std::sqrt(level * level + slope * slope * (variance / (stddev * stddev)));
  W scale = W(limits.grad_scale) / std::max(norm, W(tiny));
  level *= scale;
  slope *= scale / stddev;
}

template <class X, class W = Wide<X>>
ZK_ROW void change_row(const X* __restrict grad, const X* __restrict x, const W* __restrict mean,
                       const W* __restrict level, const W* __restrict slope, X* __restrict out, int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    W g = widen(grad[c]);
    out[c] = narrow<X>(g + (g < 0 ? -g : g) * (level[c] + slope[c] * (widen(x[c]) - mean[c])));
  }
}

template <class X, class W = Wide<X>>
void change(const BalancerGradient& n) {
  auto mean = static_cast<const W*>(n.mean), variance = static_cast<const W*>(n.variance);
  std::vector<W> level(n.channels), slope(n.channels);
  for (int64_t c = 0; c < n.channels; ++c) push(mean[c], variance[c], n.limits, level[c], slope[c]);
  auto grad = static_cast<const X*>(n.grad), x = static_cast<const X*>(n.x);
  auto out = static_cast<X*>(n.out);
  parallel_for(n.rows, 1 + grain / n.channels, n.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * n.channels; i < end * n.channels; i += n.channels) {
      change_row(grad + i, x + i, mean, level.data(), slope.data(), out + i, n.channels);
    }
  });
}

}  // namespace

void balancer_moments(const BalancerMoments& args) {
  dispatch_cpu(args.dtype, [&](auto element) { find_moments<decltype(element)>(args); });
}

void balancer_gradient(const BalancerGradient& args) {
  dispatch_cpu(args.dtype, [&](auto element) { change<decltype(element)>(args); });
}

}  // namespace zk::ZK_ISA
