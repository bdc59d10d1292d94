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

}  // namespace zk
