// Arguments of the elementwise half of swoosh_linear, and its entry points; the matrix products are torch's.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/fields.h"
#include "common/isa.h"
#include "swoosh/math.h"

namespace zk {

// x and everything of its shape is (outer, shared, inner), dense. The mask is (outer, inner), in float64 for float64
// and in float32 for the others; null stands for ones.
struct MaskedShape {
  int64_t outer, shared, inner;

  int64_t size() const { return outer * shared * inner; }
};

// a = mask swoosh(x), rounded once, to the dtype of the matrix product.
struct SwooshLinearForward {
  const void* x;
  const void* mask;
  void* a;
  MaskedShape shape;
  DType x_dtype, a_dtype;
  SwooshKind kind;
  int threads;  // on the CPU

  ZK_FIELDS(x, mask, a, shape.outer, shape.shared, shape.inner, x_dtype, a_dtype, kind)
};

// dx = da mask swoosh'(x), and once more a = mask swoosh(x) unless `a` is null.
struct SwooshLinearBackward {
  const void* da;  // of a's dtype
  const void* x;
  const void* mask;
  void* dx;
  void* a;
  MaskedShape shape;
  DType x_dtype, a_dtype;
  SwooshKind kind;
  int threads;  // on the CPU

  ZK_FIELDS(da, x, mask, dx, a, shape.outer, shape.shared, shape.inner, x_dtype, a_dtype, kind)
};

// Calls f with a value of x's element type and one of a's, which is the same or, for float32, half precision;
// `dispatch` is dispatch_cpu or dispatch_gpu.
template <class Dispatch, class F>
void dispatch_swoosh_linear(Dispatch dispatch, DType x_dtype, DType a_dtype, F&& f) {
  dispatch(x_dtype, [&](auto x) {
    if (a_dtype == x_dtype) return f(x, x);
    if constexpr (std::is_same<decltype(x), float>::value) {
      if (a_dtype == DType::f16) return f(x, half{});
      if (a_dtype == DType::bf16) return f(x, bfloat16{});
    }
    throw std::invalid_argument("a must be of x's dtype, or of half precision for x in float32");
  });
}

ZK_DECLARE_CPU(swoosh_linear_forward, SwooshLinearForward)
ZK_DECLARE_CPU(swoosh_linear_backward, SwooshLinearBackward)

// `stream` is a cudaStream_t. No float64.
void swoosh_linear_forward_cuda(const SwooshLinearForward& args, void* stream);
void swoosh_linear_backward_cuda(const SwooshLinearBackward& args, void* stream);

}  // namespace zk
