// Arguments of the bypass kernels, and their entry points.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"

namespace zk {

// y = a + (b - a) c. a, b, y and their gradients are (rows, channels), dense; c is (channels). Where each sequence has
// a scale of its own, rows are frames, and channels those of all sequences.
struct BypassForward {
  const void *a, *b, *c;
  void* y;
  int64_t rows, channels;
  DType dtype;  // of all tensors
  int threads;

  ZK_FIELDS(a, b, c, y, rows, channels, dtype)
};

// db = g c, da = g - db, dc = the sum over rows of g (b - a). Null gradients are not computed. `partials` is
// (parts, channels), double for float64 and float for the others, and null if dc is: each of `parts` groups of rows
// leaves its share of dc there; then the groups are added up in order. So dc does not depend on the number of threads.
struct BypassBackward {
  const void* g;
  const void *a, *b;  // read for dc only
  const void* c;
  void *da, *db, *dc;
  void* partials;
  int64_t rows, channels, parts;
  DType dtype;  // of all tensors but `partials`
  int threads;

  ZK_FIELDS(g, a, b, c, da, db, dc, partials, rows, channels, parts, dtype)
};

ZK_DECLARE_CPU(bypass_forward, BypassForward)
ZK_DECLARE_CPU(bypass_backward, BypassBackward)

// The same on the GPU, where a and b may be of half precision and y of float32. Everything of c is float32.
struct BypassForwardOnGpu {
  const void *a, *b, *c;
  void* y;
  int64_t rows, channels;
  DType a_dtype, b_dtype, y_dtype;

  ZK_FIELDS(a, b, c, y, rows, channels, a_dtype, b_dtype, y_dtype)
};

// g is of y's dtype, da of a's, db of b's. `parts` blocks of threads share the rows of some channels.
struct BypassBackwardOnGpu {
  const void* g;
  const void *a, *b;  // read for dc only
  const void* c;
  void *da, *db, *dc;
  void* partials;
  int64_t rows, channels, parts;
  DType a_dtype, b_dtype, y_dtype;

  ZK_FIELDS(g, a, b, c, da, db, dc, partials, rows, channels, parts, a_dtype, b_dtype, y_dtype)
};

// Calls f with a value of the element type of a, of b and of y: all alike, or y float32 and the others that or one kind
// of half precision.
template <class F>
void dispatch_bypass(DType a_dtype, DType b_dtype, DType y_dtype, F&& f) {
  dispatch_gpu(a_dtype == DType::f32 ? b_dtype : a_dtype, [&](auto x) {
    if (a_dtype == b_dtype && y_dtype == a_dtype) return f(x, x, x);
    if constexpr (sizeof(x) == 2) {
      if (y_dtype == DType::f32 && a_dtype == b_dtype) return f(x, x, float{});
      if (y_dtype == DType::f32 && b_dtype == DType::f32) return f(x, float{}, float{});
      if (y_dtype == DType::f32 && a_dtype == DType::f32) return f(float{}, x, float{});
    }
    throw std::invalid_argument("a and b must be of y's dtype, or y float32 and they of one other dtype at most");
  });
}

// `stream` is a cudaStream_t. No float64.
void bypass_forward_cuda(const BypassForwardOnGpu& args, void* stream);
void bypass_backward_cuda(const BypassBackwardOnGpu& args, void* stream);

}  // namespace zk
