// Device code: which scores of a tile are masked or lie beyond the sources. See cuda_scores.h for tiles.
#pragma once

#include "attention/cuda_scores.h"

namespace zk {

// What a block has to know of the masks before it begins.
struct MaskEdges {
  int first_padded;  // source, or how many there are
  int end_unpadded;  // one behind the last source that is not padded
  bool sees;         // masked scores have no weight for any target
};

// All threads call. Of the softmax rows, where there are none, it is taken that every target sees something.
template <class Shape>
__device__ __forceinline__ MaskEdges mask_edges(const AttentionWeights& args, const ScorePlace& place, bool rows) {
  __shared__ MaskEdges of_warps[score_warps];
  int sources = int(args.sources), first = sources, end = args.padding ? 0 : sources;
  if (args.padding) {
#pragma unroll 4
    for (int j = threadIdx.x; j < sources; j += score_threads) {
      bool padded = is_padding(args, place.sequence, j);
      first = padded && j < first ? j : first;
      end = padded ? end : j + 1;
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      int other_first = __shfl_xor_sync(~0u, first, lanes), other_end = __shfl_xor_sync(~0u, end, lanes);
      first = other_first < first ? other_first : first;
      end = other_end > end ? other_end : end;
    }
  }
  bool blind = false;
  int i = place.first + int(threadIdx.x);
  if (rows && int(threadIdx.x) < Shape::targets && i < int(args.targets)) {
    auto row = static_cast<const SoftmaxRow<float>*>(args.softmax);
    blind = !(row[(place.head * args.sequences + place.sequence) * args.targets + i].largest > visible_limit<float>);
  }
  bool sees = __ballot_sync(~0u, blind) == 0;
  if (lane_of_warp() == 0) of_warps[threadIdx.x / 32] = {first, end, sees};
  __syncthreads();
  MaskEdges edges = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < score_warps; ++warp) {
    MaskEdges other = of_warps[warp];
    edges.first_padded = other.first_padded < edges.first_padded ? other.first_padded : edges.first_padded;
    edges.end_unpadded = other.end_unpadded > edges.end_unpadded ? other.end_unpadded : edges.end_unpadded;
    edges.sees = edges.sees && other.sees;
  }
  return edges;
}

// Bits of one lane's scores [x][i] of M tiles of 16 targets: bit 4 x + i. Outside means beyond the sources; masked does
// not include it.
template <int M>
struct ScoreBits {
  uint32_t masked[M], outside;

  __device__ __forceinline__ bool is_masked(int m, int x, int i) const { return masked[m] >> (4 * x + i) & 1; }
  __device__ __forceinline__ bool is_outside(int x, int i) const { return outside >> (4 * x + i) & 1; }

  // Sets a masked score to -1000, and one outside to -infinity, whose weight is 0.
  __device__ __forceinline__ void apply(int m, int x, int i, float& s) const {
    if (is_masked(m, x, i)) s = masked_score<float>;
    if (is_outside(x, i)) s = -INFINITY;
  }
};

// The tiles that a block walks over, counted from the first source, and their masks.
template <class Shape>
class ScoreMasks {
  static constexpr int M = Shape::tiles;

 public:
  __device__ __forceinline__ ScoreMasks(const AttentionWeights& args, const ScorePlace& place, const MaskEdges& edges)
      : args_(args), place_(place) {
    int sources = int(args.sources), last = place.first + Shape::targets - 1;
    if (last >= int(args.targets)) last = int(args.targets) - 1;
    Range of_first = visible(place.first), of_last = visible(last);
    int end = of_last.end < edges.end_unpadded ? of_last.end : edges.end_unpadded;
    begin_ = edges.sees ? of_first.begin / score_sources : 0;
    end_ = ((edges.sees ? end : sources) + score_sources - 1) / score_sources;
    int plain_end = of_first.end < edges.first_padded ? of_first.end : edges.first_padded;
    plain_begin_ = (of_last.begin + score_sources - 1) / score_sources;
    int count = args.mask ? 0 : plain_end / score_sources - plain_begin_;
    plain_count_ = count > 0 ? count : 0;
  }

  // Outside of these tiles nobody in the block sees anything.
  __device__ __forceinline__ int begin() const { return begin_; }
  __device__ __forceinline__ int end() const { return end_; }

  // Whether no score of the tile is masked or outside.
  __device__ __forceinline__ bool plain(int tile) const {
    return unsigned(tile - plain_begin_) < unsigned(plain_count_);
  }

  // How many sources lie outside of the tiles.
  __device__ __forceinline__ int unvisited() const {
    int sources = int(args_.sources), end = end_ * score_sources;
    return end_ <= begin_ ? sources : sources - (end < sources ? end : sources) + begin_ * score_sources;
  }

  // The bits of this lane's scores. All lanes of a warp call.
  __device__ __forceinline__ ScoreBits<M> bits(int tile) const {
    ScoreBits<M> bits{};
    int source = tile * score_sources, column = lane_of_warp() % 4 * 2;  // in the group of 8 sources
    int sources = int(args_.sources);
    uint32_t padded = 0;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      int j = source + 32 * word + lane_of_warp();
      bool hides = args_.padding && j < sources && is_padding(args_, place_.sequence, j);
      uint32_t hidden = __ballot_sync(~0u, hides), outside = __ballot_sync(~0u, j >= sources);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        uint32_t hidden_pair = hidden >> (8 * x + column) & 3, outside_pair = outside >> (8 * x + column) & 3;
        padded |= (hidden_pair | hidden_pair << 2) << (16 * word + 4 * x);
        bits.outside |= (outside_pair | outside_pair << 2) << (16 * word + 4 * x);
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      bits.masked[m] = padded;
      if (args_.chunk <= 0 && !args_.mask) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int i = target_of<M>(place_, m, half);
        if (i >= int(args_.targets)) continue;
        Range seen = visible(i);
        const uint8_t* mask = args_.mask;
        if (mask) mask += place_.sequence * args_.mask_sequence + i * args_.mask_frame;
#pragma unroll 1
        for (int n = 0; n < 2 * score_columns; ++n) {
          int j = source + n / 2 * 8 + column + n % 2;
          if (j >= sources) break;
          bool hidden = j < seen.begin || j >= seen.end || (mask && mask[j]);
          bits.masked[m] |= uint32_t(hidden) << (n / 2 * 4 + 2 * half + n % 2);
        }
      }
    }
    return bits;
  }

 private:
  struct Range {
    int begin, end;
  };

  // The sources that the chunk rule lets target i see.
  __device__ __forceinline__ Range visible(int i) const {
    int sources = int(args_.sources);
    if (args_.chunk <= 0) return {0, sources};
    int chunk = int(args_.chunk), left = int(args_.left_chunks), own = i / chunk, end = (own + 1) * chunk;
    int first = left < 0 || own < left ? 0 : own - left;
    return {first * chunk, end < sources ? end : sources};
  }

  const AttentionWeights& args_;
  ScorePlace place_;
  int begin_, end_, plain_begin_, plain_count_;
};

}  // namespace zk
