// Device code: products of many channels, 64 at a time, of float 32, both operands through shared memory: the gradient
// of weights where values of all uses together are wide.
#pragma once

#include "attention/cuda_tiles.h"

namespace zk {

// a b^T of 64 rows `a` of a block, the same all along, and 64 rows `b`, other ones in each step.
template <class T>
class ChannelBlocks {
 public:
  static constexpr int width = sizeof(T) == 2 ? 64 : 32;  // channels of a block
  static constexpr int tile = attention_step * width;
  static constexpr int bytes = 4 * tile * int(sizeof(T));

  // `memory` is shared, of `bytes`; rows are of `channels`, a multiple of `width`.
  __device__ ChannelBlocks(T* memory, const T* a, int a_rows, const T* b, int b_rows, int channels, int steps)
      : memory_(memory),
        to_(Tile<T, width>::place(row(), unit())),
        a_(a + row() * channels + unit() * 8),
        b_(b + row() * channels + unit() * 8),
        a_rows_(a_rows - row()),
        b_rows_(b_rows - row()),
        channels_(channels),
        left_(steps * channels / width) {}

  // Begins to copy the next block of channels, after the last that of the next step.
  __device__ __forceinline__ void load() {
    T* to = memory_ + loaded_ % 2 * 2 * tile + to_;
#pragma unroll
    for (int rows = 0; rows < attention_step; rows += pass) {
      copy_elements<8>(to + rows * width, a_ + rows * channels_, rows < a_rows_);
      copy_elements<8>(to + tile + rows * width, b_ + rows * channels_, rows < b_rows_);
    }
    ++loaded_;
    channel_ += width;
    a_ += width, b_ += width;
    if (channel_ == channels_) {
      channel_ = 0;
      a_ -= channels_, b_ += (attention_step - 1) * channels_;
      b_rows_ -= attention_step;
    }
  }

  // Sums of rows row .. row + 15 of a with eights of b, over all channels; `then` runs when all that was loaded before
  // has come, and all threads have done with what they read before.
  template <class Then>
  __device__ __forceinline__ void multiply(float (&sums)[4][1][2][4], int row, Then then) {
    int lane = lane_of_warp();
    next();
    then();
    for (int c = width;; c += width) {
      const T *a_tile = memory_ + (loaded_ - 1) % 2 * 2 * tile, *b_tile = a_tile + tile;
      if (loaded_ < left_) load();
      commit_copies();
#pragma unroll
      for (int k = 0; k < width / 16; k += 2) {
        Pair<T> a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load_matrices(a[i], a_tile + Tile<T, width>::place(row + lane % 16, 2 * (k + i) + lane / 16));
        }
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          Pair<T> b[4];
          load_matrices(b, b_tile + Tile<T, width>::place(lane % 8, 2 * k + lane / 8) + x * 8 * width);
          mma<T>(sums[x / 2][0][x % 2], a[0], b[0], b[1]);
          mma<T>(sums[x / 2][0][x % 2], a[1], b[2], b[3]);
        }
      }
      if (c == channels_) break;
      next();
    }
  }

 private:
  // All threads have what was copied, and nobody reads the block before it.
  static __device__ __forceinline__ void next() {
    wait_for_copies<0>();
    __syncthreads();
  }

  static constexpr int units = width / 8, pass = attention_threads / units;  // rows that all threads copy at once

  static __device__ __forceinline__ int row() { return int(threadIdx.x) / units; }
  static __device__ __forceinline__ int unit() { return int(threadIdx.x) % units; }

  T* memory_;
  int to_;
  const T *a_, *b_;  // this thread's, in the next block
  int a_rows_, b_rows_, channels_, left_;
  int loaded_ = 0, channel_ = 0;
};

}  // namespace zk
