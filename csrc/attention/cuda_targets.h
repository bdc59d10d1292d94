// Device code: scores by targets. A warp has 16 targets and goes over the sources, 64 at a time, in pairs of eight.
//
// The positional term of target r and source c of eight is p_r . e[n + c + 7 - r]. As a product over 32 = 8 slots of 4
// channels: a[r, 4 s + d] = p_r[d] in the slot s = 7 - r % 8, and zero in others; b[4 s + d, c] = e[n + c + s, d], a
// window over e. Rows 8 to 15 of a product so belong to the next eight sources.
//
// Sums over diagonals, which dp and de are, take the scores' gradient from shared memory, where a row has its offset,
// not its source, as column. Rows of even targets begin one offset later: so pairs are stored whole.
#pragma once

#include "attention/cuda_sources.h"

namespace zk {

// What a block has in shared memory of 64 sources.
template <class T, bool values>
struct SourceStage {
  static constexpr int window_rows = 128;
  static constexpr int window = attention_step * score_channels;
  static constexpr int products = window + window_rows * 8;
  static constexpr int elements = products + (values ? attention_step * 32 : 0);
  static constexpr int bytes = elements * int(sizeof(T));

  T* elements_;

  __device__ __forceinline__ T* key_tile() const { return elements_; }
  __device__ __forceinline__ T* window_tile() const { return elements_ + window; }
  __device__ __forceinline__ T* value_tile() const { return elements_ + products; }
};

// Scores of a warp's 16 targets with 16 sources at a time.
template <class T>
class TargetScores {
 public:
  __device__ TargetScores(const AttentionWeights& w, int b, int h, int first)
      : eight_(first_eight<T>()), window_from_(held(window_from())) {
    load_operands<T, score_channels, 1>(queries_, head_of<T>(w.q, b, h), w.q.frame, first, int(w.targets),
                                        int(w.query_channels));
    int lane = lane_of_warp(), g = lane / 4, t = lane % 4, slot = 7 - g;
    const T* p = head_of<T>(w.p, b, h) + t % 2 * 2;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      int64_t row = first + g + 8 * high;
      Pair<T> mine = row < w.targets && t / 2 == slot % 2 ? load_pair(p + row * w.p.frame) : no_pair<T>();
      given_[high] = mine;
      if constexpr (keeps) {
#pragma unroll
        for (int two = 0; two < 4; ++two) {
          Pair<T>& pair = slots_[two / 2][two % 2 * 2 + high];
          pair = slot / 2 == two ? mine : no_pair<T>();
          hold<T>(pair);
        }
      }
    }
  }

  // Before the first pair of the first stage.
  template <class Stage>
  __device__ __forceinline__ void begin(Stage stage) {
    float c[4];
    multiply_window(stage, -1, c);
    next_[0] = c[2], next_[1] = c[3];
  }

  // Scores of the pair of eights 2 y, 2 y + 1 of a stage; pairs and stages are taken in their order.
  template <class Stage>
  __device__ __forceinline__ void pair(Stage stage, int y, float (&s)[1][2][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float c[4];
      multiply_window(stage, 2 * y + half, c);
      s[0][half][0] = c[0], s[0][half][1] = c[1], s[0][half][2] = next_[0], s[0][half][3] = next_[1];
      next_[0] = c[2], next_[1] = c[3];
    }
    multiply<1, T>(stage.key_tile(), eight_, queries_, y, s);
  }

 private:
  template <class Stage>
  __device__ __forceinline__ void multiply_window(Stage stage, int x, float (&c)[4]) {
    [[maybe_unused]] int lane = lane_of_warp();
    Pair<T> b[4];
    load_matrices(b, stage.window_tile() + window_from_ + 8 * x * 8);
    c[0] = c[1] = c[2] = c[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if constexpr (keeps) {
        mma<T>(c, slots_[k], b[2 * k], b[2 * k + 1]);
      } else {
        Pair<T> a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = (7 - lane / 4) / 2 == 2 * k + i / 2 ? given_[i % 2] : no_pair<T>();
        mma<T>(c, a, b[2 * k], b[2 * k + 1]);
      }
    }
  }

  Pair<T> queries_[1][score_channels / 16][4];
  static __device__ __forceinline__ int window_from() {
    int lane = lane_of_warp(), warp = threadIdx.x / 32;
    return (attention_step - 7 - 16 * warp + lane % 8 + 2 * (lane / 8)) * 8;
  }

  int eight_, window_from_;  // where this thread reads: of eight sources, and of the window for the eight sources 0
  static constexpr bool keeps = sizeof(T) == 2;  // of float operands take twice as many registers
  Pair<T> given_[2];                             // position queries of the lower and the upper eight targets
  Pair<T> slots_[2][4];                          // the same, each in its slot
  float next_[2];                                // of the next eight sources and the upper eight targets
};

// The gradient of the scores of 64 targets and 64 sources by offsets, in shared memory.
template <class T>
class Diagonals {
 public:
  static constexpr int pitch = 2 * attention_step + 8, odd = 32 * pitch + 32;  // of different banks
  static constexpr int elements = odd + 32 * pitch;
  static constexpr int bytes = elements * int(sizeof(T));

  // Columns that a row has no source for stay zero.
  __device__ explicit Diagonals(T* memory) : memory_(memory) {
    int lane = lane_of_warp(), warp = threadIdx.x / 32, row = 16 * warp + lane / 4;
    store_to_ = held(place(row) + attention_step - row - row % 2 + lane % 4 * 2);
    row_from_ = held(place(16 * warp + lane % 16) + attention_step - 16 - 16 * warp + lane / 16 * 8);
    window_from_ = held((attention_step - 16 - 16 * warp + lane) * 8);
    column_from_ = held((lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
    for (int n = threadIdx.x; n < elements; n += attention_threads) memory[n] = narrow<T>(0.0f);
  }

  // Stores a warp's operand of 16 targets and the sources 16 y to 16 y + 15.
  __device__ __forceinline__ void store(const Pair<T> (&a)[4], int y) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // eight rows on, a column has another offset
      store_pair(memory_ + store_to_ + i % 2 * (8 / 2 * pitch - 8) + 16 * y + i / 2 * 8, a[i]);
    }
  }

  // Adds a warp's rows times e: columns 0 to 3 are of even targets, 4 to 7 of odd ones.
  __device__ __forceinline__ void multiply_window(const T* window, float (&sums)[4]) const {
    const int half = lane_of_warp() / 16 * 16;  // of the last sixteen rows there are no more
#pragma unroll
    for (int k = 0; k < 5; k += 2) {
      Pair<T> b[4];
      load_transposed(b, window + window_from_ + (16 * k - (k < 4 ? 0 : half)) * 8);
#pragma unroll
      for (int i = 0; i < (k < 4 ? 2 : 1); ++i) {
        Pair<T> a[4];
        load_matrices(a, memory_ + row_from_ + 16 * (k + i));
        mma<T>(sums, a, b[2 * i], b[2 * i + 1]);
      }
    }
  }

  // Adds, of the 16 offsets from `first` on, the sums over all targets of the gradient times `p`.
  __device__ __forceinline__ void multiply_positions(const Pair<T> (&p)[4][2], int first, float (&sums)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Pair<T> a[4];
      load_transposed(a, memory_ + column_from_ + k / 2 * odd + 16 * (k % 2) * pitch + first);
      mma<T>(sums, a, p[k][0], p[k][1]);
    }
  }

  // The position queries of a block's targets as that operand: columns 0 to 3 have those of even targets.
  static __device__ __forceinline__ void load_positions(Pair<T> (&p)[4][2], const AttentionWeights& w, int b, int h,
                                                        int first) {
    int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
    const T* from = head_of<T>(w.p, b, h) + g % 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float elements[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          int64_t target = first + 2 * (16 * (k % 2) + 8 * i + 2 * t + j) + k / 2;
          bool has = g / 4 == k / 2 && target < w.targets;
          elements[j] = has ? widen(from[target * w.p.frame]) : 0.0f;
        }
        p[k][i] = make_pair<T>(elements[0], elements[1]);
      }
    }
  }

 private:
  static __device__ __forceinline__ int place(int row) { return row % 2 * odd + row / 2 * pitch; }

  T* memory_;
  int store_to_, row_from_, window_from_, column_from_;  // of this thread
};

}  // namespace zk
