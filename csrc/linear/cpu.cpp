// Threads share out the columns of y. W is read once, in the layout that linear layers have: sums run along its rows,
// in the lanes of registers, and the lanes are added up at the end, a register's worth of sums at a time.
#include "linear/linear.h"

#include <algorithm>
#include <memory>

#include "common/parallel.h"
#include "common/transpose.h"
#include "swoosh/math.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 64;  // columns

// A register whose lane i is the sum of the lanes of sums[i].
template <class W>
Register<W> add_lanes(Register<W>* sums) {
  Register<W> low, high;
#pragma GCC unroll 4
  for (int count = lanes<W> / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      interleave<W>(sums[i], sums[i + count], low, high);
      sums[i] = low + high;
    }
  }
  return sums[0];
}

// y[m * lanes<W> + n] = sum_k x[m * depth + k] w[n * depth + k], m < rows, n < lanes<W>. If w has fewer than lanes<W>
// rows, `columns`, the others repeat the last.
template <int rows, class W>
void product_block(int64_t depth, const W* x, const W* w, int64_t columns, W* y) {
  using V = Register<W>;
  constexpr int width = lanes<W>, across = width / rows;  // sums of `rows` by `across` at a time
  const int64_t next = width * depth;                     // from here to the block that comes after
  for (int first = 0; first < width; first += across) {
    const W* right[across];
    for (int n = 0; n < across; ++n) right[n] = w + std::min<int64_t>(first + n, columns - 1) * depth;
    V sums[width] = {};
    int64_t k = 0;
    for (; k + width <= depth; k += width) {
      V b[across];
#pragma GCC unroll 16
      for (int n = 0; n < across; ++n) {
        b[n] = load(right[n] + k);
        __builtin_prefetch(right[n] + k + next);  // rows are too short for the hardware to see where this goes
      }
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m) {
        V a = load(x + m * depth + k);
#pragma GCC unroll 16
        for (int n = 0; n < across; ++n) sums[m * across + n] += a * b[n];
      }
    }
    for (; k < depth; ++k) {
      for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < across; ++n) sums[m * across + n][0] += x[m * depth + k] * right[n][k];
      }
    }
    V totals = add_lanes<W>(sums);
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < across; ++n) y[m * width + first + n] = totals[m * across + n];
    }
  }
}

template <int block, class W>
void product_rows(int64_t rows, int64_t depth, const W* x, const W* w, int64_t columns, W* y) {
  int64_t m = 0;
  for (; m + block <= rows; m += block) {
    product_block<block>(depth, x + m * depth, w, columns, y + m * lanes<W>);
  }
  if constexpr (block > 1) {
    product_rows<block / 2>(rows - m, depth, x + m * depth, w, columns, y + m * lanes<W>);
  }
}

template <SwooshKind kind, class W>
void activate(W* values) {
#pragma omp simd
  for (int i = 0; i < lanes<W>; ++i) values[i] = Swoosh<kind, W>::value(values[i]);
}

template <class W>
void run(const Linear& args) {
  constexpr int64_t width = lanes<W>;
  constexpr int block = width < 8 ? int(width) : 8;
  auto x = static_cast<const W*>(args.x), weight = static_cast<const W*>(args.weight);
  auto bias = static_cast<const W*>(args.bias), residual = static_cast<const W*>(args.residual);
  auto y = static_cast<W*>(args.y);
  int64_t rows = args.rows, depth = args.in_channels, columns = args.out_channels;
  parallel_for(columns, grain, args.threads, [&](int64_t first, int64_t last) {
    std::unique_ptr<W[]> sums(new W[rows * width]);
    for (int64_t n = first; n < last; n += width) {
      int64_t count = std::min(width, last - n);
      product_rows<block>(rows, depth, x, weight + n * depth, count, sums.get());
      for (int64_t m = 0; m < rows; ++m) {
        W* values = sums.get() + m * width;
        for (int64_t i = 0; bias && i < count; ++i) values[i] += bias[n + i];
        if (args.activation == Activation::swoosh_l) activate<SwooshKind::l>(values);
        if (args.activation == Activation::swoosh_r) activate<SwooshKind::r>(values);
        for (int64_t i = 0; residual && i < count; ++i) values[i] += residual[m * columns + n + i];
        std::copy_n(values, count, y + m * columns + n);
      }
    }
  });
}

}  // namespace

void linear(const Linear& args) { args.dtype == DType::f64 ? run<double>(args) : run<float>(args); }

}  // namespace zk::ZK_ISA
