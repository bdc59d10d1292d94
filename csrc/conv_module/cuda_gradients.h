// Device code of the convolution module's gradients: the gradient of y, and partial sums that blocks leave.
#pragma once

#include "conv_module/cuda_chunks.h"

namespace zk {

namespace {

constexpr int tile = warps * group;  // frames of a block

// Where a row of `partials`, of as many floats as there are channels, begins for each parameter; then come the sums of
// da and of ds. A part has `all` rows.
struct SumRows {
  int bias, causal, causal_bias, left, right, da, all;

  ZK_HD SumRows(int kernel, bool chunked, bool parameters, bool inputs) {
    bias = kernel;
    causal = bias + 1;
    causal_bias = causal + kernel / 2 + 1;
    left = causal_bias + 1;
    right = left + kernel;
    da = !parameters ? 0 : chunked ? right + kernel : causal;
    all = da + (inputs ? 2 : 0);
  }
};

// What the kernels are given of the gradients. Blocks take `tiles_each` tiles one after the other.
template <class X, class Y>
struct Given {
  const Y* dy;
  const Y* y;    // then dy is the gradient of SwooshR(y); or null
  Y* activated;  // SwooshR(y), with y
  X* da;
  X* ds;
  int64_t step;  // from row to row of da and ds
  float* partials;
  int tiles, tiles_each;
  bool parameters;  // whether their gradients are wanted

  __device__ float* partial(const ConvModuleShape& n, const SumRows& rows, int row, int channel) const {
    return partials + (int64_t(blockIdx.x) * rows.all + row) * n.channels + channel;
  }
};

// dy of a frame, and SwooshR(y) if `activates`, from what stands in memory; zero of a frame that does not exist.
template <class Y, bool through_swoosh, int N>
__device__ __forceinline__ Row<N> gradient_of(Bits<Y, N> dy_bits, Bits<Y, N> y_bits, Row<N>* activated) {
  Row<N> dy = widened<Y, N>(dy_bits);
  if constexpr (through_swoosh) {
    Row<N> y = widened<Y, N>(y_bits);
#pragma unroll
    for (int c = 0; c < N; ++c) {
      SwooshRAt<Y> swoosh(y.of[c]);
      dy.of[c] *= swoosh.derivative();
      if (activated) activated->of[c] = swoosh.value();
    }
  }
  return dy;
}

}  // namespace

}  // namespace zk
