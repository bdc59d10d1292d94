// A linear layer on so few rows that reading its weight takes the time, for kernels of whole modules on a stream's
// chunk. Products of more rows are torch's.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/isa.h"

namespace zk {

enum class Activation : int { none = -1, swoosh_l = 0, swoosh_r = 1 };

// y = activation(x W^T + bias) + residual.
struct Linear {
  const void* x;         // (rows, in_channels)
  const void* weight;    // W, (out_channels, in_channels)
  const void* bias;      // (out_channels), or null
  const void* residual;  // (rows, out_channels), or null
  void* y;               // (rows, out_channels); not x
  int64_t rows, in_channels, out_channels;
  DType dtype;  // of everything: float32 or float64
  Activation activation;
  int threads;
};

ZK_DECLARE_CPU(linear, Linear)

}  // namespace zk
