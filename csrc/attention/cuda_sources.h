// Device code: scores by sources. A warp has 16 MT sources and goes over the targets, 64 at a time, in pairs of eight:
// sums of products then have sources as rows, and are, rounded, what multiplies rows of targets next.
//
// The positional term of source r and target c of eight is p_c . e[n + r + 7 - c], n that of the eight's last target.
// As a product over 32 = 8 slots of 4 channels: a[r, 4 s + d] = e[n + r + s, d], a window over e; b[4 s + d, c] =
// p_c[d] in the slot s = 7 - c, and zero in others. So b lies in shared memory like queries, 32 wide, its zeros written
// once.
#pragma once

#include "attention/cuda_tiles.h"

namespace zk {

// What a block has in shared memory of 64 targets.
template <class T, int MT>
struct TargetStage {
  static constexpr int sources = 64 * MT;  // of a block
  static constexpr int window_rows = sources + 64;
  static constexpr int queries = 0;
  static constexpr int slots = queries + attention_step * score_channels;
  static constexpr int window = slots + attention_step * 32;
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
template <class T, int MT, bool deltas>
class TargetLoader {
 public:
  using Stage = TargetStage<T, MT>;

  __device__ TargetLoader(const AttentionWeights& w, const float* delta, int b, int h, int first_source, int first)
      : targets_(int(w.targets)),
        next_(first),
        queries_(head_of<T>(w.q, b, h) + first * w.q.frame, w.q.frame, int(w.query_channels)),
        p_(head_of<T>(w.p, b, h) + (first + int(threadIdx.x)) * w.p.frame),
        p_stride_(w.p.frame),
        window_(head_of<T>(w.e, 0, h), w.e.frame, int(w.targets + w.sources - 1),
                int(w.targets) - 1 - (first + attention_step - 1) + first_source, -attention_step),
        rows_(static_cast<const SoftmaxRow<float>*>(w.softmax) + (h * w.sequences + b) * w.targets),
        delta_(deltas ? delta + (h * w.sequences + b) * w.targets : nullptr) {}

  // Zeroes what is zero in every stage.
  static __device__ void clear(Stage stage) {
    for (int n = threadIdx.x; n < attention_step * 32; n += attention_threads) stage.slot_tile()[n] = narrow<T>(0.0f);
  }

  __device__ __forceinline__ void load(Stage stage) {
    int left = targets_ - next_, row = threadIdx.x;
    queries_.load(stage.query_tile(), left);
    if (row < attention_step) {
      int slot = 7 - row % 8;
      copy_elements<4>(stage.slot_tile() + Tile<T, 32>::place(row, slot / 2) + slot % 2 * 4, p_, row < left);
    }
    p_ += attention_step * p_stride_;
    window_.load(stage.window_tile());
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
  TileLoader<T, score_channels, 8> queries_;
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

// Where a lane reads of the first eight rows of a tile of 32 channels; the next ones lie 8 * 32 further on.
template <class T>
__device__ __forceinline__ int first_eight() {
  int lane = lane_of_warp();
  return held(Tile<T, 32>::place(lane % 8, lane / 8));
}

// s += a b^T, b two eights of rows of a tile of 32 channels; `from` is `first_eight`.
template <int MT, class T>
__device__ __forceinline__ void multiply(const T* tile, int from, const Pair<T> (&a)[MT][2][4], int y,
                                         float (&s)[MT][2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Pair<T> b[4];
    load_matrices(b, tile + from + (2 * y + half) * 8 * 32);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      mma<T>(s[m][half], a[m][0], b[0], b[1]);
      mma<T>(s[m][half], a[m][1], b[2], b[3]);
    }
  }
}

// Scores of a warp's sources with 16 targets at a time.
template <class T, int MT>
class SourceScores {
 public:
  using Stage = TargetStage<T, MT>;

  __device__ SourceScores(const AttentionWeights& w, int b, int h, int first)
      : eight_(first_eight<T>()), window_from_(held(window_from())) {
    load_operands<T, score_channels, MT>(keys_, head_of<T>(w.k, b, h), w.k.frame, first, int(w.sources),
                                         int(w.query_channels));
  }

  // Before the first pair of the first stage.
  __device__ __forceinline__ void begin(Stage stage) {
    if constexpr (MT == 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) load_window(stage, half - 2, before_[half]);
    }
  }

  // Scores of the pair of eights 2 y, 2 y + 1 of a stage; pairs and stages are taken in their order.
  __device__ __forceinline__ void pair(Stage stage, int y, float (&s)[MT][2][4]) {
    static_assert(MT <= 2, "of a third 16 sources the window would be that of four eights before");
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pair<T> slots[4], window[2][4];
      load_matrices(slots, stage.slot_tile() + eight_ + (2 * y + half) * 8 * 32);
      load_window(stage, 2 * y + half, window);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        // Sources 16 later meet the same offsets two eights later.
        auto& a = m == 0 ? window : before_[half];
        s[m][half][0] = s[m][half][1] = s[m][half][2] = s[m][half][3] = 0.0f;
        mma<T>(s[m][half], a[0], slots[0], slots[1]);
        mma<T>(s[m][half], a[1], slots[2], slots[3]);
      }
      if constexpr (MT == 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) before_[half][k][i] = window[k][i];
        }
      }
    }
    multiply<MT, T>(stage.query_tile(), eight_, keys_, y, s);
  }

 private:
  // The window of the warp's lowest 16 sources with the eight targets x, as operands of 4 slots each.
  __device__ __forceinline__ void load_window(Stage stage, int x, Pair<T> (&a)[2][4]) const {
    const T* from = stage.window_tile() + window_from_ - 8 * x * 8;
    load_matrices(a[0], from);
    load_matrices(a[1], from + 4 * 8);
  }

  static __device__ __forceinline__ int window_from() {
    int lane = lane_of_warp(), warp = threadIdx.x / 32;
    return (attention_step - 8 + 16 * MT * warp + lane % 8 + lane / 8 % 2 * 8 + lane / 16 * 2) * 8;
  }

  int eight_, window_from_;  // where this thread reads: of eight targets, and of the window for the eight targets 0
  Pair<T> keys_[MT][score_channels / 16][4];
  Pair<T> before_[2][2][4];  // the windows of the last pair
};

// Which targets see a block's sources; those that are padding have none.
template <int MT>
class SourceMasks {
 public:
  static constexpr int sources = 64 * MT;

  // `memory` is shared, for as many ranges as sources. All threads call, and wait at a barrier.
  __device__ SourceMasks(const AttentionWeights& w, int b, int first_source, FrameRange* memory) : ranges_(memory) {
    const int last = int(w.sources) - 1, warp = threadIdx.x / 32;
    for (int row = threadIdx.x; row < sources; row += attention_threads) {
      int j = first_source + row <= last ? first_source + row : last;
      bool padded = w.padding && is_padding(w, b, j);
      memory[row] = padded ? FrameRange{0, 0} : seeing(w, j);
    }
    __syncthreads();
    bool padded = false;
    ranges_ += 16 * MT * warp;
    for (int row = lane_of_warp(); row < 16 * MT; row += 32) padded |= empty(row);
    own_ = first_source + 16 * MT * warp;
    int lowest = own_ <= last ? own_ : last, highest = own_ + 16 * MT - 1 <= last ? own_ + 16 * MT - 1 : last;
    all_see_ = {seeing(w, highest).begin, seeing(w, lowest).end};
    if (all_see_.end == w.targets) all_see_.end += attention_step;
    any_empty = __ballot_sync(~0u, padded) != 0;
  }

  // Whether nobody sees a row of the warp.
  __device__ __forceinline__ bool empty(int row) const { return ranges_[row].end <= ranges_[row].begin; }

  // Whether the targets of a step all see all the warp's sources, but for those that are empty.
  __device__ __forceinline__ bool all_see(const AttentionWeights& w, int target) const {
    return !w.mask && target >= all_see_.begin && target + attention_step <= all_see_.end;
  }

  // See `hidden_sums`; `target` is the pair's first.
  __device__ __forceinline__ unsigned hidden(const AttentionWeights& w, int b, int target) const {
    return hidden_sums<MT, false>(w, b, ranges_, own_, target);
  }

  bool any_empty;

 private:
  const FrameRange* ranges_;
  FrameRange all_see_;
  int own_;
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
    load_transposed(b, tile + Tile<T, channels>::place(lane % 16, n + lane / 16) + 16 * y * channels);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      mma<T>(acc[m][n], a[m], b[0], b[1]);
      mma<T>(acc[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

}  // namespace zk
