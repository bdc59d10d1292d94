// Device code: scores by sources. A warp has 16 MT sources and goes over the targets, 64 at a time, in pairs of eight:
// sums of products then have sources as rows, and are, rounded, what multiplies rows of targets next.
//
// The positional term of source r and target c of eight is p_c . e[n + r + 7 - c], n that of the eight's last target.
// As a product over 32 = 8 slots of 4 channels: a[r, 4 s + d] = e[n + r + s, d], a window over e; b[4 s + d, c] = p_c[d]
// in the slot s = 7 - c, and zero in others. So b lies in shared memory like queries, 32 wide, its zeros written once.
#pragma once

#include "attention/cuda_tiles.h"

namespace zk {

// What a block has in shared memory of 64 targets.
template <class T, int D, bool positions, int MT>
struct TargetStage {
  static constexpr int sources = 64 * MT;  // of a block
  static constexpr int window_rows = positions ? sources + 64 : 0;
  static constexpr int queries = 0;
  static constexpr int slots = queries + attention_step * D;
  static constexpr int window = slots + (positions ? attention_step * 32 : 0);
  static constexpr int elements = window + window_rows * 8;
  static constexpr int floats = 3 * attention_step;  // shift, scale, -delta of each target
  static constexpr int bytes = elements * int(sizeof(T)) + floats * 4;

  T* elements_;

  __device__ __forceinline__ T* query_tile() const { return elements_ + queries; }
  __device__ __forceinline__ T* slot_tile() const { return elements_ + slots; }
  __device__ __forceinline__ T* window_tile() const { return elements_ + window; }
  __device__ __forceinline__ float* shifts() const { return reinterpret_cast<float*>(elements_ + elements); }
  __device__ __forceinline__ float* scales() const { return shifts() + attention_step; }
  __device__ __forceinline__ float* deltas() const { return shifts() + 2 * attention_step; }
};

// Brings stages, one after another. What is not copied as it is, softmax rows, goes through registers: `load` reads,
// `finish` writes.
template <class T, int D, bool positions, int MT, bool deltas>
class TargetLoader {
 public:
  using Stage = TargetStage<T, D, positions, MT>;

  __device__ TargetLoader(const AttentionWeights& w, const float* delta, int b, int h, int first_source, int first)
      : targets_(int(w.targets)),
        next_(first),
        queries_(head_of<T>(w.q, b, h) + first * w.q.frame, w.q.frame, int(w.query_channels)),
        p_(positions ? head_of<T>(w.p, b, h) + (first + int(threadIdx.x)) * w.p.frame : nullptr),
        p_stride_(w.p.frame),
        window_(positions ? head_of<T>(w.e, 0, h) : nullptr, w.e.frame, int(w.targets + w.sources - 1),
                int(w.targets) - 1 - (first + attention_step - 1) + first_source, -attention_step),
        rows_(static_cast<const SoftmaxRow<float>*>(w.softmax) + (h * w.sequences + b) * w.targets),
        delta_(deltas ? delta + (h * w.sequences + b) * w.targets : nullptr) {}

  // Zeroes what is zero in every stage.
  static __device__ void clear(Stage stage) {
    if constexpr (positions) {
      for (int n = threadIdx.x; n < attention_step * 32; n += attention_threads) stage.slot_tile()[n] = narrow<T>(0.0f);
    }
  }

  __device__ __forceinline__ void load(Stage stage) {
    int left = targets_ - next_, row = threadIdx.x;
    queries_.load(stage.query_tile(), left);
    if constexpr (positions) {
      if (row < attention_step) {
        int slot = 7 - row % 8;
        copy_elements<4>(stage.slot_tile() + Tile<T, 32>::place(row, slot / 2) + slot % 2 * 4, p_, row < left);
      }
      p_ += attention_step * p_stride_;
      window_.load(stage.window_tile());
    }
    negative_delta_ = 0.0f;
    if (row < attention_step && row < left) {
      raw_ = rows_[next_ + row];
      if constexpr (deltas) negative_delta_ = -delta_[next_ + row];
    }
    exists_ = row < left;
    next_ += attention_step;
  }

  __device__ __forceinline__ void finish(Stage stage) {
    int row = threadIdx.x;
    if (row >= attention_step) return;
    Shift<T> shift = exists_ ? Shift<T>::of(raw_.largest, raw_.scale) : Shift<T>::outside();
    stage.shifts()[row] = shift.shift;
    if constexpr (sizeof(T) == 4) stage.scales()[row] = shift.scale;
    if constexpr (deltas) stage.deltas()[row] = negative_delta_;
  }

 private:
  int targets_, next_;
  TileLoader<T, D, 8> queries_;
  const T* p_;
  int64_t p_stride_;
  WindowLoader<T, Stage::window_rows> window_;
  const SoftmaxRow<float>* rows_;
  const float* delta_;
  SoftmaxRow<float> raw_;
  float negative_delta_;
  bool exists_;
};

// A warp's rows of a tensor as operands of products: 16 MT rows from `first` on, `channels` wide, zero outside of
// `rows` and `width`.
template <class T, int channels, int MT>
__device__ __forceinline__ void load_operands(Pair<T> (&a)[MT][channels / 16][4], const T* x, int64_t stride, int first,
                                              int rows, int width) {
  int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = first + 16 * m + g + i % 2 * 8;
#pragma unroll
      for (int k = 0; k < channels / 16; ++k) {
        int c = 16 * k + i / 2 * 8 + 2 * t;
        a[m][k][i] = row < rows && c < width ? load_pair(x + row * stride + c) : no_pair<T>();
      }
    }
  }
}

// s += a b^T, b two eights of rows of a tile of `channels`.
template <int channels, int MT, class T>
__device__ __forceinline__ void multiply(const T* tile, const Pair<T> (&a)[MT][channels / 16][4], int y,
                                         float (&s)[MT][2][4]) {
  int lane = lane_of_warp();
  if constexpr (channels == 16) {
    Pair<T> b[4];
    load_matrices(b, tile + Tile<T, 16>::place(16 * y + lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      mma<T>(s[m][0], a[m][0], b[0], b[1]);
      mma<T>(s[m][1], a[m][0], b[2], b[3]);
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pair<T> b[4];
      load_matrices(b, tile + Tile<T, 32>::place(16 * y + 8 * half + lane % 8, lane / 8));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma<T>(s[m][half], a[m][0], b[0], b[1]);
        mma<T>(s[m][half], a[m][1], b[2], b[3]);
      }
    }
  }
}

// Scores of a warp's sources with 16 targets at a time.
template <class T, int D, bool positions, int MT>
class SourceScores {
 public:
  using Stage = TargetStage<T, D, positions, MT>;

  __device__ SourceScores(const AttentionWeights& w, int b, int h, int first) {
    load_operands<T, D, MT>(keys_, head_of<T>(w.k, b, h), w.k.frame, first, int(w.sources), int(w.query_channels));
  }

  // Before the first pair of a stage.
  __device__ __forceinline__ void begin(Stage stage) {
    if constexpr (positions) {
#pragma unroll
      for (int i = 0; i < 2 * MT - 1; ++i) load_window(stage, -1 - i, window_[i]);
    }
  }

  // Scores of the pair of eights 2 y, 2 y + 1; pairs are taken in their order.
  __device__ __forceinline__ void pair(Stage stage, int y, float (&s)[MT][2][4]) {
    int lane = lane_of_warp();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) s[m][half][0] = s[m][half][1] = s[m][half][2] = s[m][half][3] = 0.0f;
    }
    if constexpr (positions) {
      // window_[i] is that of eight 2 y + 1 - i.
#pragma unroll
      for (int i = 2 * MT; i >= 2; --i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) window_[i][j] = window_[i - 2][j];
      }
      load_window(stage, 2 * y + 1, window_[0]);
      load_window(stage, 2 * y, window_[1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pair<T> slots[4];
        load_matrices(slots, stage.slot_tile() + Tile<T, 32>::place(16 * y + 8 * half + lane % 8, lane / 8));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          auto &low = window_[1 - half + 2 * m], &high = window_[2 - half + 2 * m];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            Pair<T> a[4] = {low[2 * k], high[2 * k], low[2 * k + 1], high[2 * k + 1]};
            mma<T>(s[m][half], a, slots[2 * k], slots[2 * k + 1]);
          }
        }
      }
    }
    multiply<D, MT, T>(stage.query_tile(), keys_, y, s);
  }

 private:
  // The warp's lowest eight sources with the eight targets x: slots 2 i and 2 i + 1 in pair i.
  static __device__ __forceinline__ void load_window(Stage stage, int x, Pair<T> (&pairs)[4]) {
    int lane = lane_of_warp(), warp = threadIdx.x / 32;
    int row = attention_step - 8 - 8 * x + 16 * MT * warp + lane % 8 + 2 * (lane / 8);
    load_matrices(pairs, stage.window_tile() + row * 8);
  }

  Pair<T> keys_[MT][D / 16][4];
  Pair<T> window_[positions ? 2 * MT + 1 : 1][4];
};

// Which targets do not see a warp's sources; row r = 2 m + high of a lane is its source 8 r + lane / 4.
template <int MT>
class SourceMasks {
 public:
  __device__ SourceMasks(const AttentionWeights& w, int b, int first) : w_(w), b_(b), first_(first) {
    const int last = int(w.sources) - 1, own = first + 16 * MT - 1;
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      int j = source(r);
      seeing_[r] = seeing(w, j <= last ? j : last);
      padded_[r] = w.padding && j <= last && w.padding[int64_t(b) * w.sources + j] != 0;
      any |= padded_[r];
    }
    padding = __ballot_sync(~0u, any) != 0;
    all_see_ = {seeing(w, own <= last ? own : last).begin, seeing(w, first <= last ? first : last).end};
  }

  // Whether the targets of a step all see all the warp's sources, but for padding.
  __device__ __forceinline__ bool all_see(int first_target) const {
    bool end = first_target + attention_step <= all_see_.end || all_see_.end == w_.targets;
    return !w_.mask && first_target >= all_see_.begin && end;
  }

  __device__ __forceinline__ bool padded(int r) const { return padded_[r]; }

  // Whether the target does not see the lane's source r; both exist.
  __device__ __forceinline__ bool hide(int r, int target) const {
    if (source(r) >= w_.sources || target >= w_.targets) return false;
    return padded_[r] || !seeing_[r].has(target) || hidden(w_, b_, target, source(r));
  }

  __device__ __forceinline__ int source(int r) const { return first_ + 8 * r + lane_of_warp() / 4; }

  bool padding;  // of any of the warp's sources

 private:
  const AttentionWeights& w_;
  int b_, first_;
  ChunkRange seeing_[2 * MT], all_see_;
  bool padded_[2 * MT];
};

// Rounds sums of 16 targets to the operand that multiplies rows of these targets.
template <class T>
__device__ __forceinline__ void to_operand(const float (&s)[2][4], Pair<T> (&a)[4]) {
  a[0] = make_pair<T>(s[0][0], s[0][1]), a[1] = make_pair<T>(s[0][2], s[0][3]);
  a[2] = make_pair<T>(s[1][0], s[1][1]), a[3] = make_pair<T>(s[1][2], s[1][3]);
}

// acc += a b, b sixteen rows of a tile of `channels`, acc `N` eights of channels.
template <class T, int channels, int N, int MT>
__device__ __forceinline__ void multiply_rows(const T* tile, const Pair<T> (&a)[MT][4], int y, float (&acc)[MT][N][4]) {
  int lane = lane_of_warp();
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    Pair<T> b[4];
    load_transposed(b, tile + Tile<T, channels>::place(16 * y + lane % 16, n + lane / 16));
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      mma<T>(acc[m][n], a[m], b[0], b[1]);
      mma<T>(acc[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

}  // namespace zk
