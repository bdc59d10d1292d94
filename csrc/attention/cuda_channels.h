// Device code: products of many channels, 64 at a time, of float 32, both operands through shared memory: the gradient
// of weights where values of all uses together are wide.
#pragma once

#include "attention/cuda_tiles.h"

namespace zk {

// Rows of one sequence and head of `AttentionChannels`.
template <class T>
struct ChannelRows {
  const T* direct;
  int stride, channels;  // of these
  const T* packed;
  int packed_channels;

  static __device__ __forceinline__ ChannelRows of(const AttentionRows& direct, const void* packed, int64_t frames,
                                                   const AttentionScoresGradients& args, int b, int h) {
    const AttentionChannels& uses = args.uses;
    int64_t pair = h * args.weights.sequences + b;
    return {head_of<T>(direct, b, h), int(direct.frame), int(uses.channels),
            static_cast<const T*>(packed) + pair * frames * uses.packed, int(uses.packed)};
  }

  __device__ __forceinline__ int all() const { return channels + packed_channels; }

  // Rows from `row` on, of eight channels from c on.
  struct Piece {
    const T* from;
    int stride;
  };
  __device__ __forceinline__ Piece piece(int row, int c) const {
    const bool first = c < channels;
    const int own = first ? stride : packed_channels;
    return {(first ? direct : packed - channels) + int64_t(row) * own + c, own};
  }
};

// a b^T of 64 rows `a` of a block, the same all along, and 64 rows `b`, other ones in each step.
template <class T>
class ChannelBlocks {
 public:
  static constexpr int width = sizeof(T) == 2 ? 64 : 32;  // channels of a block
  static constexpr int tile = attention_step * width;
  static constexpr int bytes = 4 * tile * int(sizeof(T));

  // `memory` is shared, of `bytes`. Of a there are rows from `a_first` to `a_end`, of b alike.
  __device__ ChannelBlocks(T* memory, const ChannelRows<T>& a, int a_first, int a_end, const ChannelRows<T>& b,
                           int b_first, int b_end, int steps)
      : memory_(memory),
        to_(Tile<T, width>::place(row(), unit())),
        a_(a),
        b_(b),
        a_first_(a_first),
        a_end_(a_end),
        b_first_(b_first),
        b_end_(b_end),
        blocks_(a.all() > width ? (a.all() + width - 1) / width : 1),
        left_(steps * blocks_) {}

  // Begins to copy the next block of channels, after the last that of the next step.
  __device__ __forceinline__ void load() {
    T* to = memory_ + loaded_ % 2 * 2 * tile + to_;
    int c = block_ * width + unit() * 8, a_row = a_first_ + row(), b_row = b_first_ + row();
    bool exists = c < a_.all();
    auto a = a_.piece(a_row, c), b = b_.piece(b_row, c);
#pragma unroll
    for (int rows = 0; rows < attention_step; rows += pass) {
      copy_elements<8>(to + rows * width, a.from + rows * int64_t(a.stride), exists && a_row + rows < a_end_);
      copy_elements<8>(to + tile + rows * width, b.from + rows * int64_t(b.stride), exists && b_row + rows < b_end_);
    }
    ++loaded_;
    if (++block_ == blocks_) {
      block_ = 0;
      b_first_ += attention_step;
    }
  }

  // Sums of rows row .. row + 15 of a with eights of b, over all channels; `then` runs when all that was loaded before
  // has come, and all threads have done with what they read before.
  template <class Then>
  __device__ __forceinline__ void multiply(float (&sums)[4][1][2][4], int row, Then then) {
    int lane = lane_of_warp();
    next();
    then();
    for (int block = 1;; ++block) {
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
      if (block == blocks_) break;
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
  ChannelRows<T> a_, b_;
  int a_first_, a_end_, b_first_, b_end_, blocks_, left_;
  int loaded_ = 0, block_ = 0;
};

}  // namespace zk
