// Device code: products of many channels, 32 at a time, both operands through shared memory: the gradient of weights
// where values of all uses together are wide.
#pragma once

#include "attention/cuda_tiles.h"

namespace zk {

// a b^T of 64 rows `a` of a block, the same all along, and 64 rows `b`, other ones in each step.
template <class T>
class ChannelBlocks {
 public:
  static constexpr int tile = attention_step * 32;
  static constexpr int bytes = 4 * tile * int(sizeof(T));

  // `memory` is shared, of `bytes`; rows are of `channels`, a multiple of 32.
  __device__ ChannelBlocks(T* memory, const T* a, int a_rows, const T* b, int b_rows, int channels, int steps)
      : memory_(memory),
        a_(a),
        b_(b),
        a_rows_(a_rows),
        b_rows_(b_rows),
        channels_(channels),
        left_(steps * channels / 32) {}

  // Begins to copy the next block of channels, after the last that of the next step.
  __device__ __forceinline__ void load() {
    T* to = memory_ + loaded_ % 2 * 2 * tile;
    TileLoader<T, 32, 8>(a_ + channel_, channels_, 32).load(to, a_rows_);
    TileLoader<T, 32, 8>(b_ + channel_, channels_, 32).load(to + tile, b_rows_);
    ++loaded_;
    channel_ += 32;
    if (channel_ == channels_) {
      channel_ = 0;
      b_ += int64_t(attention_step) * channels_;
      b_rows_ -= attention_step;
    }
  }

  // Sums of rows row .. row + 15 of a with eights of b, over all channels; `then` runs when all that was loaded before
  // has come, and all threads have done with what they read before.
  template <class Then>
  __device__ __forceinline__ void multiply(float (&sums)[4][1][2][4], int row, Then then) {
    int lane = lane_of_warp();
    for (int c = 0; c < channels_; c += 32) {
      wait_for_copies<0>();
      __syncthreads();
      if (c == 0) then();
      const T *a_tile = memory_ + (loaded_ - 1) % 2 * 2 * tile, *b_tile = a_tile + tile;
      if (loaded_ < left_) load();
      commit_copies();
      Pair<T> a[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        load_matrices(a[k], a_tile + Tile<T, 32>::place(row + lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        Pair<T> b[4];
        load_matrices(b, b_tile + Tile<T, 32>::place(8 * x + lane % 8, lane / 8));
        mma<T>(sums[x / 2][0][x % 2], a[0], b[0], b[1]);
        mma<T>(sums[x / 2][0][x % 2], a[1], b[2], b[3]);
      }
    }
  }

 private:
  T* memory_;
  const T *a_, *b_;
  int a_rows_, b_rows_, channels_, left_;
  int loaded_ = 0, channel_ = 0;
};

}  // namespace zk
