// Device code: the second stage of sums over rows, whose first leaves a share of each column in `parts` places.
#pragma once

#include "common/launch.h"

namespace zk {

constexpr int sum_columns = 32, sum_groups = 32;  // of a block
constexpr int sum_threads = sum_columns * sum_groups;

// The sum of `parts` numbers that lie `stride` apart. Threads of a column share them and all call; `from` is null where
// there is no column. The first group of threads has the sum, whose order is fixed.
__device__ __forceinline__ float sum_of_parts(const float* from, int64_t parts, int64_t stride) {
  __shared__ float sums[sum_groups][sum_columns];
  int column = threadIdx.x % sum_columns, group = threadIdx.x / sum_columns;
  float sum = 0.0f;
  if (from) {
    for (int64_t part = group; part < parts; part += sum_groups) sum += from[part * stride];
  }
  sums[group][column] = sum;
  __syncthreads();
  if (group > 0) return 0.0f;
  for (int other = 1; other < sum_groups; ++other) sum += sums[other][column];
  return sum;
}

}  // namespace zk
