// Transposition of small matrices in registers. Compiled once for each instruction set.
#pragma once

#include "common/dtypes.h"
#include "common/simd.h"

namespace zk::ZK_ISA {

// The lanes of a and b in turn: a0 b0 a1 b1 ... in low, the other half in high.
template <class W>
ZK_HD void interleave(const Register<W>& a, const Register<W>& b, Register<W>& low, Register<W>& high) {
#if defined(__clang__)
  for (int n = 0; n < lanes<W>; ++n) {
    low[n] = n % 2 ? b[n / 2] : a[n / 2];
    high[n] = n % 2 ? b[(lanes<W> + n) / 2] : a[(lanes<W> + n) / 2];
  }
#else
  using Index = decltype(a == b);  // a vector of integers of the same size
  Index first{}, second{};
  for (int n = 0; n < lanes<W>; ++n) {
    first[n] = n / 2 + n % 2 * lanes<W>;
    second[n] = first[n] + lanes<W> / 2;
  }
  low = __builtin_shuffle(a, b, first);
  high = __builtin_shuffle(a, b, second);
#endif
}

// to (columns, rows) = the transpose of from (rows, columns); both have at most lanes<W> of each. Interleaving the
// first half of all rows with the second doubles the runs of lanes that lie right, until all do.
template <class From, class To, class W = Wide<From>>
void transpose_block(const From* from, int64_t from_pitch, int64_t rows, int64_t columns, To* to, int64_t to_pitch) {
  using V = Register<W>;
  constexpr int size = lanes<W>;
  V x[size], y[size];
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) {
    W row[size] = {};
    if (i < rows) {
      const From* source = from + i * from_pitch;
      if (columns == size) {
        for (int c = 0; c < size; ++c) row[c] = widen(source[c]);
      } else {
        for (int64_t c = 0; c < columns; ++c) row[c] = widen(source[c]);
      }
    }
    __builtin_memcpy(&x[i], row, sizeof(V));
  }
#pragma GCC unroll 4
  for (int stride = 1; stride < size; stride *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < size / 2; ++i) interleave<W>(x[i], x[i + size / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int c = 0; c < size; ++c) {
    if (c >= columns) break;
    W column[size];
    __builtin_memcpy(column, &x[c], sizeof(V));
    To* target = to + c * to_pitch;
    if (rows == size) {
      for (int i = 0; i < size; ++i) target[i] = narrow<To>(column[i]);
    } else {
      for (int64_t i = 0; i < rows; ++i) target[i] = narrow<To>(column[i]);
    }
  }
}

// to[c * to_pitch + i] = from[i * from_pitch + c], converted.
template <class From, class To>
void transpose(const From* from, int64_t from_pitch, int64_t rows, int64_t columns, To* to, int64_t to_pitch) {
  constexpr int64_t size = lanes<Wide<From>>;
  for (int64_t i = 0; i < rows; i += size) {
    int64_t height = rows - i < size ? rows - i : size;
    for (int64_t c = 0; c < columns; c += size) {
      int64_t width = columns - c < size ? columns - c : size;
      transpose_block(from + i * from_pitch + c, from_pitch, height, width, to + c * to_pitch + i, to_pitch);
    }
  }
}

}  // namespace zk::ZK_ISA
