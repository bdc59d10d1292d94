// The bypass on the CPU: one pass forward, one backward, in which a stretch of a row stays in the first-level cache
// between the gradients that are taken from it.
#include "bypass/bypass.h"

#include <algorithm>

#include "common/parallel.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 1 << 14;  // elements
constexpr int64_t block = 1 << 10;  // channels

// Not inlined: compiled once, a row gets the same bits on one thread and on several.
#define ZK_ROW __attribute__((noinline))

template <class X>
ZK_ROW void forward_row(const X* __restrict a, const X* __restrict b, const X* __restrict c, X* __restrict y,
                        int64_t channels) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) {
    y[i] = narrow<X>(widen(a[i]) + (widen(b[i]) - widen(a[i])) * widen(c[i]));
  }
}

template <class X>
ZK_ROW void da_row(const X* __restrict g, const X* __restrict c, X* __restrict da, int64_t channels) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) da[i] = narrow<X>(widen(g[i]) - widen(g[i]) * widen(c[i]));
}

template <class X>
ZK_ROW void db_row(const X* __restrict g, const X* __restrict c, X* __restrict db, int64_t channels) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) db[i] = narrow<X>(widen(g[i]) * widen(c[i]));
}

template <class X, class W = Wide<X>>
ZK_ROW void add_dc_row(const X* __restrict g, const X* __restrict a, const X* __restrict b, W* __restrict dc,
                       int64_t channels) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) dc[i] += widen(g[i]) * (widen(b[i]) - widen(a[i]));
}

// The gradients in the rows of a part, for a block of channels from `first` on.
template <class X, class W = Wide<X>>
void backward_block(const BypassBackward& n, int64_t part, int64_t first) {
  auto g = static_cast<const X*>(n.g), a = static_cast<const X*>(n.a), b = static_cast<const X*>(n.b);
  auto c = static_cast<const X*>(n.c) + first;
  auto da = static_cast<X*>(n.da), db = static_cast<X*>(n.db);
  W* dc = n.dc ? static_cast<W*>(n.partials) + part * n.channels + first : nullptr;
  int64_t count = std::min(block, n.channels - first);
  if (dc) std::fill_n(dc, count, W(0));
  for (int64_t row = n.rows * part / n.parts; row < n.rows * (part + 1) / n.parts; ++row) {
    int64_t at = row * n.channels + first;
    if (da) da_row(g + at, c, da + at, count);
    if (db) db_row(g + at, c, db + at, count);
    if (dc) add_dc_row(g + at, a + at, b + at, dc, count);
  }
}

// Adds up all parts of some channels of dc, in order, in the place of the first.
template <class X, class W = Wide<X>>
void add_parts(const BypassBackward& n, int64_t begin, int64_t end) {
  W* sums = static_cast<W*>(n.partials);
  for (int64_t part = 1; part < n.parts; ++part) {
    const W* share = sums + part * n.channels;
    for (int64_t i = begin; i < end; ++i) sums[i] += share[i];
  }
  for (int64_t i = begin; i < end; ++i) static_cast<X*>(n.dc)[i] = narrow<X>(sums[i]);
}

}  // namespace

void bypass_forward(const BypassForward& args) {
  dispatch_cpu(args.dtype, [&](auto element) {
    using X = decltype(element);
    auto a = static_cast<const X*>(args.a), b = static_cast<const X*>(args.b), c = static_cast<const X*>(args.c);
    auto y = static_cast<X*>(args.y);
    int64_t channels = args.channels;
    parallel_for(args.rows, 1 + grain / channels, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * channels; at < end * channels; at += channels) {
        forward_row(a + at, b + at, c, y + at, channels);
      }
    });
  });
}

void bypass_backward(const BypassBackward& args) {
  dispatch_cpu(args.dtype, [&](auto element) {
    using X = decltype(element);
    int64_t blocks = (args.channels + block - 1) / block;
    parallel_for(args.parts * blocks, 1, args.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) backward_block<X>(args, i / blocks, i % blocks * block);
    });
    if (!args.dc) return;
    parallel_for(args.channels, block, args.threads,
                 [&](int64_t begin, int64_t end) { add_parts<X>(args, begin, end); });
  });
}

}  // namespace zk::ZK_ISA
