// The second stage of sums over rows, whose first leaves a share of each column in `parts` places.
#pragma once

#include "common/launch.h"

namespace zk {

constexpr int sum_threads = 1024;  // of a block

// How many threads share the parts of a column, a power of two; the others of a block have columns beside it.
inline int sum_groups(int64_t parts) {
  int groups = 1;
  while (groups < 32 && groups * 16 <= parts) groups *= 2;
  return groups;
}

inline int64_t sum_columns(int groups) { return sum_threads / groups; }

// The sum of `parts` numbers that lie `stride` apart, for column threadIdx.x % columns of a block, with `columns` being
// sum_columns(groups). All threads call; `from` is null where there is no column. The first `columns` threads have the
// sums, whose order is fixed.
__device__ __forceinline__ float sum_of_parts(const float* from, int64_t parts, int64_t stride, int columns) {
  __shared__ float sums[sum_threads];
  int groups = sum_threads / columns;
  float sum = 0.0f;
  if (from) {
#pragma unroll 8
    for (int64_t part = int(threadIdx.x) / columns; part < parts; part += groups) sum += from[part * stride];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (int(threadIdx.x) >= columns) return 0.0f;
  for (int other = 1; other < groups; ++other) sum += sums[other * columns + threadIdx.x];
  return sum;
}

}  // namespace zk
