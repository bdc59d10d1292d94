// Device code: tiles in shared memory, pairs in global memory, and masks, for the kernels that go back through
// attention weights.
#pragma once

#include <cmath>

#include "attention/cuda_masks.h"
#include "common/launch.h"
#include "common/mma.h"
#include "common/vectors.h"

namespace zk {

constexpr int attention_threads = score_threads;
constexpr int attention_step = 64;  // frames that a block goes forward at once

// Loops over tiles are unrolled where a product is one instruction; of float, whose products are many, they are not.
template <class T>
constexpr int unrolled = sizeof(T) == 2 ? 4 : 1;

// Rows of `channels` elements in shared memory, in chunks of eight. Chunks change places from row to row, so that those
// of eight neighbouring rows lie in different banks.
template <class T, int channels>
struct Tile {
  static constexpr int chunks = channels / 8;
  static_assert(channels % 16 == 0, "a tile is made of whole products");

  static __device__ __forceinline__ int place(int row, int chunk) {
    int turn = chunks % 8 == 0 ? row % 8 : chunks % 4 == 0 ? row / 2 % 4 : row / 4 % 2;
    return row * channels + (chunk ^ turn) * 8;
  }

  template <int rows>
  static constexpr int bytes = rows * channels * int(sizeof(T));
};

// Begins to copy N elements; zeros where not inside.
template <int N, class T>
__device__ __forceinline__ void copy_elements(T* to, const T* from, bool inside) {
  if constexpr (N * sizeof(T) <= 16) {
    copy_async<N* int(sizeof(T))>(to, from, inside);
  } else {
#pragma unroll
    for (int part = 0; part < N; part += pack_size<T>) copy_async<16>(to + part, from + part, inside);
  }
}

template <class T>
__device__ __forceinline__ const T* head_of(const AttentionRows& x, int64_t sequence, int64_t head) {
  return static_cast<const T*>(x.data) + sequence * x.sequence + head * x.head;
}

template <class T>
__device__ __forceinline__ T* head_to(const AttentionRows& x, int64_t sequence, int64_t head) {
  return static_cast<T*>(x.data) + sequence * x.sequence + head * x.head;
}

template <class T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
  return bit_cast<Pair<T>>(*reinterpret_cast<const Pack<T, 2>*>(from));
}

template <class T>
__device__ __forceinline__ void store_pair(T* to, Pair<T> pair) {
  *reinterpret_cast<Pack<T, 2>*>(to) = bit_cast<Pack<T, 2>>(pair);
}

template <class T>
__device__ __forceinline__ Pair<T> no_pair() {
  return Pair<T>{};
}

// Brings 64 rows of a tensor into a tile, N elements a copy, step by step. Channels from `width` on are zero. A row has
// two threads, so that a thread's copies lie at constant distances.
template <class T, int channels, int N, class Stride = int64_t>
class TileLoader {
 public:
  // `x` is the first row.
  __device__ TileLoader(const T* x, Stride stride, int width)
      : from_(x + row() * stride + unit() * N), step_(attention_step * stride), width_(width - unit() * N) {}

  // Begins to copy the next rows, of which `left` exist.
  __device__ __forceinline__ void load(T* tile, int left) {
#pragma unroll
    for (int first = 0; first < channels / N; first += 2) {
      T* to = tile + Tile<T, channels>::place(row(), (first + unit()) * N / 8) + (first + unit()) * N % 8;
      copy_elements<N>(to, from_ + first * N, row() < left && first * N < width_);
    }
    from_ += step_;
  }

 private:
  static __device__ __forceinline__ int row() { return int(threadIdx.x) / 2; }
  static __device__ __forceinline__ int unit() { return int(threadIdx.x) % 2; }

  const T* from_;
  Stride step_;
  int width_;
};

// Brings a window of position projections into rows of eight: those of an offset and of the next, four channels each.
template <class T, int rows>
class WindowLoader {
 public:
  // `e` is a head's, of `offsets` rows; the first window begins at row `first`, each next one `step` later.
  __device__ WindowLoader(const T* e, int64_t stride, int offsets, int first, int step)
      : n_(first + int(threadIdx.x + 1) / 2), offsets_(offsets), from_(e + n_ * stride), stride_(stride), step_(step) {}

  __device__ __forceinline__ void load(T* window) {
    constexpr int pass = attention_threads / 2;
    static_assert(rows % pass == 0, "all threads copy as much");
#pragma unroll
    for (int row = 0; row < rows; row += pass) {
      bool inside = unsigned(n_ + row) < unsigned(offsets_);
      copy_elements<4>(window + row * 8 + threadIdx.x * 4, from_ + row * stride_, inside);
    }
    from_ += step_ * stride_;
    n_ += step_;
  }

 private:
  int n_, offsets_;
  const T* from_;
  int64_t stride_;
  int step_;
};

// The logarithm to base 2, within 2^-22 on the device: for half precision.
__device__ __forceinline__ float log2_of(float x) {
#if defined(__CUDACC__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}

// A target's softmax row as weights are made of it: w = 2^(s log2(e) - shift) scale. In half precision the scale is
// part of the shift; in float its rounding would show.
template <class T>
struct Shift {
  float shift, scale;

  static __device__ __forceinline__ Shift of(float largest, float scale) {
    if constexpr (sizeof(T) == 2) {
      return {largest * log2_of_e - log2_of(scale), 1.0f};
    } else {
      return {largest, scale};
    }
  }

  // Of a target that does not exist: no weight at all.
  static __device__ __forceinline__ Shift outside() { return {INFINITY, sizeof(T) == 2 ? 1.0f : 0.0f}; }

  __device__ __forceinline__ float weight(float score) const {
    if constexpr (sizeof(T) == 2) {
      return exp2_of(score * log2_of_e - shift);
    } else {
      return exp2_of((score - shift) * log2_of_e) * scale;
    }
  }
};

// Frames of the other kind that see a frame, or that it sees: [begin, end).
struct FrameRange {
  int begin, end;

  __device__ __forceinline__ bool has(int frame) const { return unsigned(frame - begin) < unsigned(end - begin); }
};

// The sources that a target's chunk sees.
__device__ __forceinline__ FrameRange seen_by(const AttentionWeights& w, int target) {
  int sources = int(w.sources), chunk = int(w.chunk), left = int(w.left_chunks);
  if (chunk <= 0) return {0, sources};
  int own = target / chunk, begin = left < 0 || left > own ? 0 : (own - left) * chunk, end = (own + 1) * chunk;
  return {begin < sources ? begin : sources, end < sources ? end : sources};
}

// The targets whose chunks see a source.
__device__ __forceinline__ FrameRange seeing(const AttentionWeights& w, int source) {
  int targets = int(w.targets), chunk = int(w.chunk), left = int(w.left_chunks);
  if (chunk <= 0) return {0, targets};
  int own = source / chunk, begin = own * chunk;
  int64_t end = left < 0 ? targets : (int64_t(own) + left + 1) * chunk;
  return {begin < targets ? begin : targets, int(end < targets ? end : targets)};
}

// Whether any thread of the block says so; `votes` is shared memory for one number a warp.
__device__ __forceinline__ bool any_of_block(bool vote, unsigned* votes) {
  unsigned mine = __ballot_sync(~0u, vote);
  if (lane_of_warp() == 0) votes[threadIdx.x / 32] = mine;
  __syncthreads();
  bool any = (votes[0] | votes[1] | votes[2] | votes[3]) != 0;
  __syncthreads();
  return any;
}

// Which of a lane's sums of a pair of eights, m tiles of 16 rows, are of frames that do not see each other: sum i of
// half `half` of tile m is bit 8 m + 4 half + i. Rows are sources, or targets. For tiles where not all see each other;
// in a loop, so that it takes no registers from where they do.
template <int m, bool rows_are_targets>
__device__ __forceinline__ unsigned hidden_sums(const AttentionWeights& w, int b, const FrameRange* ranges, int row,
                                                int column) {
  int lane = lane_of_warp();
  unsigned bits = 0;
#pragma unroll 1
  for (int n = 0; n < 8 * m; ++n) {
    int r = n / 8 * 16 + n / 2 % 2 * 8 + lane / 4, c = column + n / 4 % 2 * 8 + lane % 4 * 2 + n % 2;
    bool hides = !ranges[r].has(c);
    int target = rows_are_targets ? row + r : c, source = rows_are_targets ? c : row + r;
    if (target < w.targets && source < w.sources) {
      if (rows_are_targets && w.padding) hides |= is_padding(w, b, source);
      if (w.mask) hides |= w.mask[b * w.mask_sequence + target * w.mask_frame + source] != 0;
    }
    bits |= unsigned(hides) << n;
  }
  return bits;
}

// What the penalty adds to the gradient of a score.
__device__ __forceinline__ float penalty_of(float score, float penalty, float limit) {
  return (score > limit ? penalty : 0.0f) - (score < -limit ? penalty : 0.0f);
}

// Stores a warp's sums, 16 MT rows of N eights of channels, where they lie inside of `rows` and `width`.
template <class T, int MT, int N>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, int first, int rows, int width,
                                           const float (&sums)[MT][N][4]) {
  int lane = lane_of_warp(), t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2 * MT; ++r) {
    int row = first + 8 * r + lane / 4;
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      int c = 8 * n + 2 * t;
      if (c >= width) continue;
      store_pair(to + row * stride + c, make_pair<T>(sums[r / 2][n][r % 2 * 2], sums[r / 2][n][r % 2 * 2 + 1]));
    }
  }
}

// Calls f with an element of the type that the arguments have.
template <class F>
void dispatch_attention(const AttentionWeights& w, F&& f) {
  if (w.query_channels % 8 != 0 || w.query_channels > score_channels)
    throw std::invalid_argument("queries of 8, 16, 24 or 32 channels");
  if (w.position_channels != 4) throw std::invalid_argument("position queries of 4 channels");
  dispatch_gpu(w.dtype, f);
}

}  // namespace zk
