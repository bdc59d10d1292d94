// CPU code: a stretch of frames held in cache, in panels of as many channels as a vector register holds, and the inner
// loop that every convolution and every gradient of one comes down to.
#pragma once

#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace zk::ZK_ISA {

constexpr int group = 8;  // sums that the inner loop holds in registers

// sums[i] += sum_j taps[j] rows[i + j], j < count.
template <class W>
inline __attribute__((always_inline)) void correlate(const Register<W>* rows, const Register<W>* taps, int64_t count,
                                                     Register<W>* sums) {
  Register<W> held[group];
  for (int i = 0; i < group; ++i) held[i] = sums[i];
  for (int64_t j = 0; j < count; ++j) {
    auto tap = taps[j];
    for (int i = 0; i < group; ++i) held[i] += tap * rows[i + j];
  }
  for (int i = 0; i < group; ++i) sums[i] = held[i];
}

// results[i] = start + sum_j taps[j] rows[i + j], i < n. Writes, and reads rows for, up to the next multiple of
// `group`.
template <class W>
void correlate_rows(const Register<W>* rows, const Register<W>* taps, int64_t count, int64_t n, Register<W> start,
                    Register<W>* results) {
  for (int64_t i = 0; i < n; i += group) {
    for (int k = 0; k < group; ++k) results[i + k] = start;
    correlate<W>(rows + i, taps, count, results + i);
  }
}

// sums[j] += sum_i factors[i] rows[i + j], i < n, for j < count. Writes up to the next multiple of `group`.
template <class W>
void correlate_taps(const Register<W>* rows, const Register<W>* factors, int64_t n, int64_t count, Register<W>* sums) {
  for (int64_t j = 0; j < count; j += group) correlate<W>(rows + j, factors, n, sums + j);
}

template <class W>
void add_rows(const Register<W>* rows, int64_t n, Register<W>& sum) {
  for (int64_t i = 0; i < n; ++i) sum += rows[i];
}

// `panels` times `rows` registers, zero at first.
template <class W>
class Strip {
 public:
  void resize(int64_t panels, int64_t rows) {
    rows_ = rows;
    registers_.assign(panels * rows, Register<W>{});
  }
  Register<W>* panel(int64_t p) { return registers_.data() + p * rows_; }

  // Calls f(c, lane) with each channel c < channels and its place in `row`.
  template <class F>
  void each_channel(int64_t row, int64_t channels, F f) {
    constexpr int n = lanes<W>;
    int64_t c = 0;
    Register<W>* at = registers_.data() + row;
    for (; c + n <= channels; c += n, at += rows_) {
      W* values = elements<W>(at);
#pragma omp simd
      for (int j = 0; j < n; ++j) f(c + j, values[j]);
    }
    for (int j = 0; c + j < channels; ++j) f(c + j, elements<W>(at)[j]);
  }

  void clear_row(int64_t row) {
    for (size_t i = row; i < registers_.size(); i += rows_) registers_[i] = Register<W>{};
  }

 private:
  int64_t rows_ = 0;
  std::vector<Register<W>> registers_;
};

}  // namespace zk::ZK_ISA
