// Device code: which scores of a tile are masked or lie beyond the sources. See cuda_scores.h for tiles.
#pragma once

#include "attention/cuda_scores.h"

namespace zk {

// Bits of one lane's scores [x][i] of a tile of 16 targets: bit 4 x + i.
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

// The masks of the tiles that a block walks over.
template <int M>
class ScoreMasks {
  static constexpr int targets = score_warps * 16 * M;

 public:
  __device__ __forceinline__ ScoreMasks(const AttentionWeights& args, const ScorePlace& place)
      : args_(args), place_(place), sources_(int(args.sources)) {
    padding_ = args.padding ? args.padding + place.sequence * args.sources : nullptr;
    int last = place.first + targets < int(args.targets) ? place.first + targets - 1 : int(args.targets) - 1;
    Range first_seen = visible(place.first), last_seen = visible(last);
    seen_ = {first_seen.begin, last_seen.end};
    seen_by_all_ = {last_seen.begin, first_seen.end};
  }

  // The tiles, counted from 0, outside of which the chunk rule masks every pair; all tiles unless `sees`.
  __device__ __forceinline__ int first_tile(bool sees) const { return sees ? seen_.begin / score_sources : 0; }
  __device__ __forceinline__ int end_tile(bool sees) const {
    return ((sees ? seen_.end : sources_) + score_sources - 1) / score_sources;
  }

  // Reads the padding of the tile that begins at `source`; early, for it takes a while.
  __device__ __forceinline__ void fetch(int source) {
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      int j = source + 32 * word + lane_of_warp();
      fetched_[word] = padding_ && j < sources_ ? padding_[j] : 0;
    }
  }

  // Goes on to the tile that begins at `source`, which was fetched last. All lanes of a warp call.
  __device__ __forceinline__ void take(int source) {
    source_ = source;
    padded_[0] = padded_[1] = 0;
    if (padding_) {
      padded_[0] = __ballot_sync(~0u, fetched_[0] != 0);
      padded_[1] = __ballot_sync(~0u, fetched_[1] != 0);
    }
  }

  // Whether no score of the tile is masked or outside; the same in all lanes of a warp, as the next.
  __device__ __forceinline__ bool plain() const {
    bool within = source_ >= seen_by_all_.begin && source_ + score_sources <= seen_by_all_.end;
    return within && (padded_[0] | padded_[1]) == 0 && !args_.mask;
  }

  // Whether padding masks every score of the tile.
  __device__ __forceinline__ bool hidden() const {
    return (~padded_[0] & inside(source_)) == 0 && (~padded_[1] & inside(source_ + 32)) == 0;
  }

  // How many sources the tile has.
  __device__ __forceinline__ int count() const {
    return sources_ - source_ < score_sources ? sources_ - source_ : score_sources;
  }

  // The bits of this lane's scores. Outside means beyond the sources, and masked does not include it.
  __device__ __forceinline__ ScoreBits<M> bits() const {
    ScoreBits<M> bits{};
    int column = lane_of_warp() % 4 * 2;  // in the group of 8 sources
    uint32_t padded = 0;
#pragma unroll
    for (int x = 0; x < score_columns; ++x) {
      int shift = x % 4 * 8 + column;
      uint32_t hidden = padded_[x / 4] >> shift & 3, outside = ~inside(source_ + x / 4 * 32) >> shift & 3;
      padded |= (hidden | hidden << 2) << (4 * x);
      bits.outside |= (outside | outside << 2) << (4 * x);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      bits.masked[m] = padded;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int i = target_of<M>(place_, m, half);
        if (i >= int(args_.targets)) continue;
        Range seen = visible(i);
        const uint8_t* mask = args_.mask;
        if (mask) mask += place_.sequence * args_.mask_sequence + i * args_.mask_frame;
#pragma unroll 1
        for (int n = 0; n < 2 * score_columns; ++n) {
          int j = source_ + n / 2 * 8 + column + n % 2;
          if (j >= sources_) break;
          bool hidden = j < seen.begin || j >= seen.end || (mask && mask[j]);
          bits.masked[m] |= uint32_t(hidden) << (n / 2 * 4 + 2 * half + n % 2);
        }
      }
    }
    return bits;
  }

  // What bits() say, applied to all scores of the tile.
  __device__ __forceinline__ void apply(ScoreTile<M>& s) const {
    if (plain()) return;
    ScoreBits<M> found = bits();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int x = 0; x < score_columns; ++x) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found.apply(m, x, i, s[m][x][i]);
      }
    }
  }

 private:
  struct Range {
    int begin, end;
  };

  // The sources that the chunk rule lets target i see.
  __device__ __forceinline__ Range visible(int i) const {
    if (args_.chunk <= 0) return {0, sources_};
    int chunk = int(args_.chunk), left = int(args_.left_chunks), own = i / chunk, end = (own + 1) * chunk;
    int first = left < 0 || own < left ? 0 : own - left;
    return {first * chunk, end < sources_ ? end : sources_};
  }

  // Bits of the sources from `source` on that exist.
  __device__ __forceinline__ uint32_t inside(int source) const {
    int left = sources_ - source;
    return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
  }

  const AttentionWeights& args_;
  ScorePlace place_;
  const uint8_t* padding_;
  int sources_, source_, fetched_[2];
  uint32_t padded_[2];
  Range seen_, seen_by_all_;
};

}  // namespace zk
