// Device code: a row of channels in the registers of a warp.
#pragma once

#include <type_traits>

#include "bias_norm/math.h"
#include "common/reduce.h"
#include "common/vectors.h"

namespace zk {

constexpr int row_warps = 8;  // of a block whose warps have a row each

// Calls body(k, c) for each k of [0, packs) whose elements c .. c + N - 1 lie inside the row.
template <int N, int packs, class Body>
__device__ __forceinline__ void for_each_pack(int channels, Body body) {
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    int c = (k * 32 + int(threadIdx.x % 32)) * N;
    if (c < channels) body(k, c);
  }
}

// 1 / rms(x - bias) of a row.
template <int N, int packs>
__device__ __forceinline__ float row_inverse_rms(const float (&values)[packs][N], const float* bias, int channels) {
  return inverse_rms<float>(channels, [&](float scale) {
    float sum = 0.0f;
    for_each_pack<N, packs>(channels, [&](int k, int c) {
      float b[N];
      load(bias + c, b);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float d = (values[k][j] - b[j]) * scale;
        sum += d * d;
      }
    });
    return warp_sum(sum);
  });
}

// The sums over the block's warps of their rows' numbers, one warp after the other, in shared memory; then all wait.
template <int N, int packs>
__device__ __forceinline__ void add_in_turns(const float (&values)[packs][N], float* sums, int channels) {
  int warp = threadIdx.x / 32;
  for (int turn = 0; turn < row_warps; ++turn) {
    if (warp == turn) {
      for_each_pack<N, packs>(channels, [&](int k, int c) {
#pragma unroll
        for (int j = 0; j < N; ++j) sums[c + j] = turn == 0 ? values[k][j] : sums[c + j] + values[k][j];
      });
    }
    __syncthreads();
  }
}

// Calls run(packs) with the least number of packs of N per lane, as a constant, that hold a row in one warp's
// registers; returns whether there is one.
template <int N, class Run>
bool in_registers(int64_t channels, Run run) {
  if (channels % N != 0 || channels > 1024) return false;
  if (channels <= 256)
    run(std::integral_constant<int, 8 / N>{});
  else if (channels <= 512)
    run(std::integral_constant<int, 16 / N>{});
  else if (channels <= 768)
    run(std::integral_constant<int, 24 / N>{});
  else
    run(std::integral_constant<int, 32 / N>{});
  return true;
}

}  // namespace zk
