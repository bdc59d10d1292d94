// Device code: sums over a warp and over a block. The order of additions is fixed.
#pragma once

#include "common/launch.h"

namespace zk {

// The sum of the warp's values, the same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// The sum of the block's values, the same bits in every thread. The block is a row of whole warps, all of whose threads
// call. `scratch` is shared memory for one value per warp; it may be used for the next call at once.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  int warps = blockDim.x / 32;
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = scratch[0];
  for (int warp = 1; warp < warps; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

}  // namespace zk
