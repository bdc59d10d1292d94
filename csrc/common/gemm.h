// Products of small matrices that lie in cache, blocked for registers. Compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace zk::ZK_ISA {

constexpr int row_block = register_bytes == 64 ? 8 : 4;  // rows whose sums registers have room for

// c (MR rows, NV registers wide) = or += a b, with the sums in registers.
template <int MR, int NV, bool add, class W>
void gemm_block(int64_t depth, const W* a, int64_t a_row, int64_t a_column, const W* b, int64_t b_row, W* c,
                int64_t c_row) {
  using V = Register<W>;
  V sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sum[m][n] = V{};
  }
  for (int64_t k = 0; k < depth; ++k, a += a_column, b += b_row) {
    V right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load(b + n * lanes<W>);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      W left = a[m * a_row];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      W* to = c + m * c_row + n * lanes<W>;
      store(to, add ? load(to) + sum[m][n] : sum[m][n]);
    }
  }
}

template <int MR, int NV, bool add, class W>
void gemm_rows(int64_t rows, int64_t depth, const W* a, int64_t a_row, int64_t a_column, const W* b, int64_t b_row,
               W* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) {
    gemm_block<MR, NV, add>(depth, a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row);
  }
  if constexpr (MR > 1) {
    gemm_rows<MR / 2, NV, add>(rows - m, depth, a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row);
  }
}

// Products that are summed one by one. Sums of more are sums of such sums, whose rounding errors are smaller.
constexpr int64_t longest_sum = 64;

// c = a b, or c += a b: c (rows, columns), a (rows, depth) of any strides, b (depth, columns). `columns` is a multiple
// of lanes<W>; the columns of b and of c are contiguous.
template <bool add, class W>
void gemm(int64_t rows, int64_t columns, int64_t depth, const W* a, int64_t a_row, int64_t a_column, const W* b,
          int64_t b_row, W* c, int64_t c_row) {
  constexpr int64_t width = lanes<W>;
  if (depth > longest_sum) {
    gemm<add>(rows, columns, longest_sum, a, a_row, a_column, b, b_row, c, c_row);
    return gemm<true>(rows, columns, depth - longest_sum, a + longest_sum * a_column, a_row, a_column,
                      b + longest_sum * b_row, b_row, c, c_row);
  }
  int64_t n = 0;
  for (; n + 3 * width <= columns; n += 3 * width) {
    gemm_rows<row_block, 3, add>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row);
  }
  if (n + 2 * width <= columns) {
    gemm_rows<row_block, 2, add>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row);
  } else if (n + width <= columns) {
    gemm_rows<row_block, 1, add>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row);
  }
}

template <int MR, int NR, class W>
void dots_block(int64_t depth, const W* a, int64_t a_row, const W* b, int64_t b_row, W* c, int64_t c_row) {
  using V = Register<W>;
  V sum[MR][NR] = {};
  for (int64_t k = 0; k < depth; k += lanes<W>) {
    V right[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) right[n] = load(b + n * b_row + k);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      V left = load(a + m * a_row + k);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) c[m * c_row + n] += sum_lanes<W>(sum[m][n]);
  }
}

// c += a b^T for few columns of c: a (rows, depth), b (columns, depth), both contiguous along `depth`, which is a
// multiple of lanes<W>.
template <class W>
void gemm_dots(int64_t rows, int64_t columns, int64_t depth, const W* a, int64_t a_row, const W* b, int64_t b_row, W* c,
               int64_t c_row) {
  for (int64_t n = 0; n < columns;) {
    bool four = n + 4 <= columns;
    for (int64_t m = 0; m < rows;) {
      bool pair = m + 2 <= rows;
      auto block = pair ? (four ? dots_block<2, 4, W> : dots_block<2, 1, W>)
                        : (four ? dots_block<1, 4, W> : dots_block<1, 1, W>);
      block(depth, a + m * a_row, a_row, b + n * b_row, b_row, c + m * c_row + n, c_row);
      m += pair ? 2 : 1;
    }
    n += four ? 4 : 1;
  }
}

}  // namespace zk::ZK_ISA
