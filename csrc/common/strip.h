// CPU code: a stretch of frames held in cache, in panels of as many channels as a vector register holds, and the inner
// loop that every convolution and every gradient of one comes down to.
#pragma once

#include <cstdint>
#include <vector>

namespace zk::ZK_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Neighbouring channels of one frame, in one register.
template <class W>
struct Lanes {
  static constexpr int count = vector_bytes / int(sizeof(W));
  typedef W Vector __attribute__((vector_size(vector_bytes)));
  Vector v;

  W* data() { return reinterpret_cast<W*>(&v); }
};

constexpr int group = 8;  // sums that the inner loop holds in registers

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// sums[i] += sum_j taps[j] rows[i + j], j < count.
template <class W>
inline __attribute__((always_inline)) void correlate(const Lanes<W>* rows, const Lanes<W>* taps, int64_t count,
                                                     Lanes<W>* sums) {
  typename Lanes<W>::Vector held[group];
  for (int i = 0; i < group; ++i) held[i] = sums[i].v;
  for (int64_t j = 0; j < count; ++j) {
    auto tap = taps[j].v;
    for (int i = 0; i < group; ++i) held[i] += tap * rows[i + j].v;
  }
  for (int i = 0; i < group; ++i) sums[i].v = held[i];
}

// results[i] = start + sum_j taps[j] rows[i + j], i < n. Writes, and reads rows for, up to the next multiple of
// `group`.
template <class W>
void correlate_rows(const Lanes<W>* rows, const Lanes<W>* taps, int64_t count, int64_t n, Lanes<W> start,
                    Lanes<W>* results) {
  for (int64_t i = 0; i < n; i += group) {
    for (int k = 0; k < group; ++k) results[i + k] = start;
    correlate(rows + i, taps, count, results + i);
  }
}

// sums[j] += sum_i factors[i] rows[i + j], i < n, for j < count. Writes up to the next multiple of `group`.
template <class W>
void correlate_taps(const Lanes<W>* rows, const Lanes<W>* factors, int64_t n, int64_t count, Lanes<W>* sums) {
  for (int64_t j = 0; j < count; j += group) correlate(rows + j, factors, n, sums + j);
}

template <class W>
void add_rows(const Lanes<W>* rows, int64_t n, Lanes<W>& sum) {
  for (int64_t i = 0; i < n; ++i) sum.v += rows[i].v;
}

// `panels` times `rows` Lanes, zero at first.
template <class W>
class Strip {
 public:
  void resize(int64_t panels, int64_t rows) {
    rows_ = rows;
    lanes_.assign(panels * rows, Lanes<W>{});
  }
  Lanes<W>* panel(int64_t p) { return lanes_.data() + p * rows_; }

  // Calls f(c, lane) with each channel c < channels and its place in `row`.
  template <class F>
  void each_channel(int64_t row, int64_t channels, F f) {
    constexpr int n = Lanes<W>::count;
    int64_t c = 0;
    Lanes<W>* at = lanes_.data() + row;
    for (; c + n <= channels; c += n, at += rows_) {
      W* lanes = at->data();
#pragma omp simd
      for (int j = 0; j < n; ++j) f(c + j, lanes[j]);
    }
    for (int j = 0; c + j < channels; ++j) f(c + j, at->data()[j]);
  }

  void clear_row(int64_t row) {
    for (size_t i = row; i < lanes_.size(); i += rows_) lanes_[i] = Lanes<W>{};
  }

 private:
  int64_t rows_ = 0;
  std::vector<Lanes<W>> lanes_;
};

}  // namespace zk::ZK_ISA
