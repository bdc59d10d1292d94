// The share of the targets of a sequence and head whose sums for de a block has in memory of its own.
#pragma once

#include "attention/cuda_tiles.h"

namespace zk {

// Blocks of 64 targets, [begin, end), `share` of them but for the last part. What target i and source j add belongs to
// offset T - 1 - i + j. In the part's memory the rows of a block of targets that begins at i and a step of sources that
// begins at j are 64 from `row(i / 64, j)` on, and 64 more; the last block has the lowest.
struct PartOfTargets {
  int targets, begin, end;

  __device__ __forceinline__ PartOfTargets(int targets, int share, int part) : targets(targets), begin(part * share) {
    const int blocks = (targets + attention_step - 1) / attention_step;
    end = begin + share < blocks ? begin + share : blocks;
  }

  __device__ __forceinline__ int64_t row(int block, int source) const {
    return int64_t(end - 1 - block) * attention_step + source;
  }

  // The row in which offset n, counted from 0, begins: what odd targets add, in columns 4 to 7. What even ones add lies
  // in the next row, in columns 0 to 3.
  __device__ __forceinline__ int64_t row_of(int64_t n) const { return n + attention_step * int64_t(end) - targets; }

  // How many rows of eight numbers the memory of any part has.
  static __host__ __device__ __forceinline__ int64_t rows(int64_t sources, int64_t share) {
    return (share + 1 + (sources + attention_step - 1) / attention_step) * attention_step;
  }
};

}  // namespace zk
