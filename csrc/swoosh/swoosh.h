// Arguments of the Swoosh kernels, and their entry points.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"
#include "swoosh/math.h"

namespace zk {

// y = swoosh(x) over n elements. On the CPU y may be x, and rows of `channels` may have a bias added first.
struct SwooshForward {
  const void* x;
  void* y;
  int64_t n;
  DType dtype;
  SwooshKind kind;
  int threads;                 // on the CPU
  const void* bias = nullptr;  // (channels,), or null
  int64_t channels = 1;

  ZK_FIELDS(x, y, n, dtype, kind)
};

// The same with a bias.
struct SwooshBiasForward : SwooshForward {
  ZK_FIELDS(x, y, bias, n, channels, dtype, kind)
};

// dx = dy * swoosh'(x) over n elements. On the CPU y = swoosh(x) may be written too, dx may then be dy and y may be x,
// and rows of `channels` may have a bias added to x first.
struct SwooshBackward {
  const void* dy;
  const void* x;
  void* dx;
  int64_t n;
  DType dtype;
  SwooshKind kind;
  int threads;                 // on the CPU
  void* y = nullptr;           // or null
  const void* bias = nullptr;  // (channels,), or null; with y
  int64_t channels = 1;

  ZK_FIELDS(dy, x, dx, n, dtype, kind)
};

// The same with a bias, and y.
struct SwooshBiasBackward : SwooshBackward {
  ZK_FIELDS(dy, x, dx, y, bias, n, channels, dtype, kind)
};

ZK_DECLARE_CPU(swoosh_forward, SwooshForward)
ZK_DECLARE_CPU(swoosh_backward, SwooshBackward)

// `stream` is a cudaStream_t.
void swoosh_forward_cuda(const SwooshForward& args, void* stream);
void swoosh_backward_cuda(const SwooshBackward& args, void* stream);

}  // namespace zk
