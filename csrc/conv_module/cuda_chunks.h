// Device code of the convolution inside chunks: where frames stand in theirs, and the factors near the edges.
#pragma once

#include "conv_module/cuda_strips.h"

namespace zk {

namespace {

// Where frame t stands in its chunk. Frames are counted in 32 bits: a division of 64 is a call.
__device__ __forceinline__ int position_of(const ConvModuleShape& n, int64_t t) {
  return int(unsigned(t) % unsigned(n.chunk));
}

// e_p of frame t, of a channel.
__device__ __forceinline__ float factor_of(const ConvModuleInputs& in, int64_t t, int channel) {
  const ConvModuleShape& n = in.shape;
  auto left = static_cast<const float*>(in.edge_scale) + int64_t(channel) * n.kernel;
  return edge_factor(left, left + n.channels * n.kernel, position_of(n, t), n.chunk, n.kernel);
}

// Where each of `count` frames from t on stands in its chunk.
template <int count>
struct Positions {
  int position[count], chunk;

  __device__ Positions(const ConvModuleShape& n, int64_t t) : chunk(int(n.chunk)) {
    int p = position_of(n, t);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      position[i] = p;
      p = p + 1 == chunk ? 0 : p + 1;
    }
  }

  // Whether frame i, moved by `distance`, stays in its chunk.
  __device__ __forceinline__ bool stays(int i, int distance) const {
    return unsigned(position[i] + distance) < unsigned(chunk);
  }
};

// As `convolve`, of frames at `positions`, inside of their chunks only; the first row is frame -before.
template <int N>
__device__ __forceinline__ void convolve_inside(const Row<N>* rows, const Row<N>* taps, int count, int before,
                                                const Positions<group>& positions, Row<N> (&sums)[group]) {
#pragma unroll 1
  for (int k = 0; k < count; k += tap_group) {
    Row<N> held[group + tap_group - 1];
#pragma unroll
    for (int i = 0; i < group + tap_group - 1; ++i) held[i] = rows[(k + i) * lanes];
#pragma unroll
    for (int j = 0; j < tap_group; ++j) {
      Row<N> tap = taps[(k + j) * tap_row];
#pragma unroll
      for (int i = 0; i < group; ++i) {
        bool stays = positions.stays(i, k + j - before);
#pragma unroll
        for (int c = 0; c < N; ++c) sums[i].of[c] += tap.of[c] * (stays ? held[i + j].of[c] : 0.0f);
      }
    }
  }
}

}  // namespace

}  // namespace zk
