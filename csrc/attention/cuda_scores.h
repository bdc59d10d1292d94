// Device code: tiles of scores in registers, for kernels that own targets and walk over sources.
//
// A block of four warps owns 64 or 128 targets of one sequence and head; a warp has 16 of them, or two times 16, as the
// rows of its products, and 64 sources a step as their columns. Lane l has, with g = l / 4 and t = l % 4, of a tile of
// 16 targets the scores [x][i]: target g + 8 (i / 2), source 8 x + 2 t + i % 2.
//
// The positional term p_i . e[T - 1 - i + j] of 16 x 8 scores is one product over 32 = 8 slots x 4 channels. Row r of
// the left operand has p_r in slot s = 7 - r % 8 and zeros elsewhere, and column m of the right one has e[n0 + m + s]
// in slot s: so row r < 8 gets p_r . e[n0 + m + 7 - r], and the skew costs nothing. Rows 8 to 15 get the same offsets,
// which are theirs at the next 8 sources. In shared memory e lies as rows of 8 elements, e[n] and e[n + 1], so that
// rows n0 + m + 2 c for c = 0 .. 3 are the right operand.
#pragma once

#include <stdexcept>

#include "attention/attention.h"
#include "common/mma.h"

namespace zk {

constexpr int score_warps = 4;
constexpr int score_threads = 32 * score_warps;
constexpr int score_sources = 64;                 // of a tile
constexpr int score_columns = score_sources / 8;  // products side by side
constexpr int score_channels = 32;                // of queries and keys, zeros beyond the tensors' own
constexpr float log2_of_e = 1.4426950408889634f;

// Scores of M tiles of 16 targets a warp.
template <int M>
using ScoreTile = float[M][score_columns][4];

// What a block's kernel is made for: elements of type T, and M tiles of 16 targets a warp.
template <class T, int M>
struct ScoreShape {
  using Element = T;
  static constexpr int tiles = M;
  static constexpr int targets = score_warps * 16 * M;
  static constexpr int key_size = score_sources * score_channels;
  static constexpr int window = targets + score_sources;  // rows of e's pairs
  static constexpr int size = key_size + window * 8;      // elements in shared memory of a step
};

// The block's targets: those from `first` on, of one sequence and head.
struct ScorePlace {
  int first;
  int64_t sequence, head;
};

// From the grid's first dimension, whose blocks are those of targets, then of sequences, then of heads.
template <class Shape>
__device__ __forceinline__ ScorePlace score_place(const AttentionWeights& args, unsigned block) {
  unsigned blocks = unsigned(args.targets + Shape::targets - 1) / Shape::targets, pair = block / blocks;
  unsigned sequences = unsigned(args.sequences);
  return {int(block % blocks) * Shape::targets, pair % sequences, pair / sequences};
}

// The arguments as kernels take them, whose numbers fit into 32 bits and stay there when a tile is added: a chunk that
// is longer than everything is as good as one as long.
inline AttentionWeights for_kernels(AttentionWeights args) {
  int64_t longest = args.targets > args.sources ? args.targets : args.sources;
  if (longest > 1 << 29) throw std::invalid_argument("attention on a GPU takes up to 2^29 frames");
  if (args.chunk > longest) args.chunk = longest;
  if (args.left_chunks > longest) args.left_chunks = -1;
  return args;
}

// Whether a source is padding, where there is a mask of padding.
__device__ __forceinline__ bool is_padding(const AttentionWeights& args, int64_t sequence, int source) {
  return args.padding[sequence * args.padding_sequence + source * args.padding_frame] != 0;
}

// How many blocks of the grid that `score_place` takes apart.
template <class Shape>
int64_t score_blocks(const AttentionWeights& args) {
  return ceil_div(args.targets, Shape::targets) * args.sequences * args.heads;
}

// Calls f with a ScoreShape that takes the arguments, of M tiles a warp; of one for float, whose products need
// registers.
template <int M, class F>
void dispatch_scores(const AttentionWeights& args, F&& f) {
  dispatch_gpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int tiles = sizeof(T) == 4 ? 1 : M;
    f(ScoreShape<T, tiles>{});
  });
}

template <class T>
__device__ __forceinline__ const T* row_of(const AttentionRows& x, const ScorePlace& place) {
  return static_cast<const T*>(x.data) + place.sequence * x.sequence + place.head * x.head;
}

// The target of row g + 8 `half` of this lane's tile m.
template <int M>
__device__ __forceinline__ int target_of(const ScorePlace& place, int m, int half) {
  return place.first + (int(threadIdx.x) / 32 * M + m) * 16 + lane_of_warp() / 4 + 8 * half;
}

// Where chunk `chunk` of 8 channels of a key lies in shared memory: such that eight keys' are in different banks.
__device__ __forceinline__ int key_at(int row, int chunk) {
  constexpr int chunks = score_channels / 8;
  return row * score_channels + (chunk ^ (row / (8 / chunks) % chunks)) * 8;
}

// Copies to shared memory what scores of tiles of sources are made of, one tile after another. Zeros beyond the
// sources.
template <class Shape>
class ScoreLoader {
  using T = typename Shape::Element;
  static constexpr int piece = 16 / int(sizeof(T));  // elements of one copy
  static constexpr int pieces = score_channels / piece, rows = score_threads / pieces;

 public:
  // The first tile to copy begins at `source`.
  __device__ __forceinline__ ScoreLoader(const AttentionWeights& args, const ScorePlace& place, int source) {
    int row = threadIdx.x / pieces, channel = threadIdx.x % pieces * piece;
    keys_ = row_of<T>(args.k, place) + (source + row) * args.k.frame + channel;
    key_stride_ = args.k.frame;
    left_ = channel < int(args.query_channels) ? int(args.sources) - source - row : 0;
    key_to_ = key_at(row, channel / 8) + channel % 8;
    // Row 0 of the window is the offset of the block's last target and the tile's first source.
    offset_ = int(args.targets) - place.first - Shape::targets + source + int(threadIdx.x) / 2 + int(threadIdx.x) % 2;
    offsets_ = int(args.targets + args.sources) - 1;
    projections_ = static_cast<const T*>(args.e.data) + place.head * args.e.head + offset_ * args.e.frame;
    projection_stride_ = args.e.frame;
  }

  // Begins to copy the next tile to `to`, as `Shape::size` elements. The caller commits.
  __device__ __forceinline__ void load(T* to) {
#pragma unroll
    for (int row = 0; row < score_sources; row += rows) {
      copy_async<16>(to + key_to_ + row * score_channels, keys_ + row * key_stride_, row < left_);
    }
    keys_ += score_sources * key_stride_;
    left_ -= score_sources;
    T* window = to + Shape::key_size + threadIdx.x * 4;
#pragma unroll
    for (int row = 0; row < Shape::window; row += score_threads / 2) {
      copy_async<4 * sizeof(T)>(window + row * 8, projections_ + row * projection_stride_,
                                unsigned(offset_ + row) < unsigned(offsets_));
    }
    projections_ += score_sources * projection_stride_;
    offset_ += score_sources;
  }

 private:
  static_assert(rows % 8 == 0, "copies of a thread lie a whole number of swizzles apart");
  const T *keys_, *projections_;
  int64_t key_stride_, projection_stride_;
  int key_to_, left_, offset_, offsets_;
};

// The targets' side of the products, in registers. Zeros beyond the targets.
template <class Shape>
class ScoreTargets {
  using T = typename Shape::Element;
  static constexpr int M = Shape::tiles, steps = score_channels / 16;

 public:
  __device__ __forceinline__ ScoreTargets(const AttentionWeights& args, const ScorePlace& place) {
    const T *q = row_of<T>(args.q, place), *p = row_of<T>(args.p, place);
    int lane = lane_of_warp(), pair = lane % 4, slot = 7 - lane / 4;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int i = target_of<M>(place, m, half);
        bool inside = i < int(args.targets);
#pragma unroll
        for (int chunk = 0; chunk < 2 * steps; ++chunk) {
          int channel = chunk * 8 + 2 * pair;
          bool given = inside && channel < int(args.query_channels);
          q_[m][chunk / 2][chunk % 2 * 2 + half] = given ? pair_at(q + i * args.q.frame + channel) : Pair<T>{};
        }
        bool mine = inside && pair / 2 == slot % 2;
        Pair<T> given = mine ? pair_at(p + i * args.p.frame + pair % 2 * 2) : Pair<T>{};
#pragma unroll
        for (int two = 0; two < 4; ++two) p_[m][two / 2][two % 2 * 2 + half] = slot / 2 == two ? given : Pair<T>{};
      }
    }
  }

  // The scores of the tile that a ScoreLoader has copied to `from`, before masking: all of them, or some columns from
  // `first` on, for which one product more is made. Calls done(x) as soon as those of columns first + x and the next
  // are there, for x = 0, 2, ...: what they go into may begin, and frees their registers.
  template <int columns, class F>
  __device__ __forceinline__ void scores(const T* from, int first, float (&s)[M][columns][4], F&& done) const {
    int lane = lane_of_warp();
    int row = Shape::targets - 8 - int(threadIdx.x) / 32 * M * 16;  // of the window, where the first columns begin
    const T* window = from + Shape::key_size + (row + lane % 8 + lane / 8 * 2 + 8 * first) * 8;
    const T* keys =
        from + key_at(lane / 8 / (2 * steps) * 8 + lane % 8, lane / 8 % (2 * steps)) + first * 8 * score_channels;
#pragma unroll
    for (int x = 1 - 2 * M; x < columns; ++x) {
      add_positions(window + x * 64, x, s);
      if (x < 0 || x % 2 == 0) continue;
      add_keys(keys, x - 1, s);
      done(x - 1);
    }
  }
  __device__ __forceinline__ void scores(const T* from, ScoreTile<M>& s) const {
    scores(from, 0, s, [](int) {});
  }

 private:
  // The positional terms that come of eight offsets and those behind: of column x of the last tile of targets, and of
  // later ones of the tiles before.
  template <int columns>
  __device__ __forceinline__ void add_positions(const T* window, int x, float (&s)[M][columns][4]) const {
    Pair<T> e[4];
    load_matrices(e, window);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      int column = x + 2 * m;  // of rows 0 to 7; rows 8 to 15 are at the next
      if (column < -1 || column >= columns) continue;
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      mma<T>(c, p_[m][0], e[0], e[1]);
      mma<T>(c, p_[m][1], e[2], e[3]);
      if (column >= 0) s[m][column][0] = c[0], s[m][column][1] = c[1];
      if (column + 1 < columns) s[m][column + 1][2] = c[2], s[m][column + 1][3] = c[3];
    }
  }

  // The products of queries and keys, for columns x and x + 1. In float, whose products are added up one by one, they
  // go to zero first: else each would be rounded as coarsely as the positional term.
  template <int columns>
  __device__ __forceinline__ void add_keys(const T* keys, int x, float (&s)[M][columns][4]) const {
#pragma unroll
    for (int load = 0; load < steps; ++load) {
      Pair<T> k[4];
      load_matrices(k, keys + (x + load) * 8 * score_channels);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        int column = x + (2 * load + part) / steps;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          float (&sum)[4] = s[m][column];
          mma<T>(sum, q_[m][part % steps], k[2 * part], k[2 * part + 1]);
        }
      }
    }
  }

  static __device__ __forceinline__ Pair<T> pair_at(const T* from) { return *reinterpret_cast<const Pair<T>*>(from); }

  Pair<T> q_[M][steps][4], p_[M][2][4];
};

// What makes weights of scores, w = exp(s - largest) scale, for the rows of this lane; 0 beyond the targets. In half
// precision one number is enough: w = 2^(s log2(e) - row).
template <class T, int M>
class WeightRows {
 public:
  __device__ __forceinline__ WeightRows(const AttentionWeights& args, const ScorePlace& place) {
    auto rows = static_cast<const SoftmaxRow<float>*>(args.softmax);
    rows += (place.head * args.sequences + place.sequence) * args.targets;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int i = target_of<M>(place, m, half);
        SoftmaxRow<float> row = {INFINITY, 1.0f};
        if (i < int(args.targets)) row = rows[i];
        largest_[m][half] = apart ? row.largest : row.largest * log2_of_e - log2f(row.scale);
        scale_[m][half] = row.scale;
      }
    }
  }

  // The weight of a score of row g + 8 `half` of tile m.
  __device__ __forceinline__ float weight(float s, int m, int half) const {
    if constexpr (apart) return exp2_of((s - largest_[m][half]) * log2_of_e) * scale_[m][half];
    return exp2_of(s * log2_of_e - largest_[m][half]);
  }

 private:
  static constexpr bool apart = sizeof(T) == 4;
  float largest_[M][2], scale_[M][2];
};

}  // namespace zk
