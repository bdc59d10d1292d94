// The elementwise half of swoosh_linear on the CPU: loops that vectorise, split over threads.
#include "common/parallel.h"
#include "swoosh_linear/swoosh_linear.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 1 << 14;

// What the kernels below do to `count` neighbouring elements that share one stretch of the mask.
template <SwooshKind kind, bool masked, class X, class A, class W = Wide<X>>
void forward(const X* __restrict x, const W* __restrict mask, A* __restrict a, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    a[i] = narrow<A>(Swoosh<kind, W>::value(widen(x[i])) * (masked ? mask[i] : W(1)));
  }
}

template <SwooshKind kind, bool masked, bool with_a, class X, class A, class W = Wide<X>>
void backward(const A* __restrict da, const X* __restrict x, const W* __restrict mask, X* __restrict dx,
              A* __restrict a, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    W wide = widen(x[i]), factor = masked ? mask[i] : W(1);
    dx[i] = narrow<X>(widen(da[i]) * factor * Swoosh<kind, W>::derivative(wide));
    if (with_a) a[i] = narrow<A>(Swoosh<kind, W>::value(wide) * factor);
  }
}

// Calls body(i, mask, count) on stretches of elements i .. i + count - 1 within one row of `inner`, with their mask.
template <class W, class Body>
void for_each_stretch(const MaskedShape& shape, const W* mask, int threads, Body body) {
  parallel_for(shape.size(), grain, threads, [&](int64_t begin, int64_t end) {
    if (!mask) return body(begin, mask, end - begin);
    for (int64_t i = begin; i < end;) {
      int64_t row = i / shape.inner, column = i % shape.inner;
      int64_t count = shape.inner - column < end - i ? shape.inner - column : end - i;
      body(i, mask + row / shape.shared * shape.inner + column, count);
      i += count;
    }
  });
}

// Calls f with the kind and a flag, as constants.
template <class F>
void with_constants(SwooshKind kind, bool flag, F f) {
  using L = std::integral_constant<SwooshKind, SwooshKind::l>;
  using R = std::integral_constant<SwooshKind, SwooshKind::r>;
  if (kind == SwooshKind::l)
    flag ? f(L{}, std::true_type{}) : f(L{}, std::false_type{});
  else
    flag ? f(R{}, std::true_type{}) : f(R{}, std::false_type{});
}

const auto dispatch = [](DType dtype, auto&& f) { dispatch_cpu(dtype, f); };

}  // namespace

void swoosh_linear_forward(const SwooshLinearForward& args) {
  dispatch_swoosh_linear(dispatch, args.x_dtype, args.a_dtype, [&](auto x_element, auto a_element) {
    using X = decltype(x_element);
    using A = decltype(a_element);
    using W = Wide<X>;
    auto x = static_cast<const X*>(args.x);
    auto a = static_cast<A*>(args.a);
    auto mask = static_cast<const W*>(args.mask);
    with_constants(args.kind, mask != nullptr, [&](auto kind, auto masked) {
      for_each_stretch(args.shape, mask, args.threads, [&](int64_t i, const W* stretch, int64_t count) {
        forward<kind(), masked()>(x + i, stretch, a + i, count);
      });
    });
  });
}

void swoosh_linear_backward(const SwooshLinearBackward& args) {
  dispatch_swoosh_linear(dispatch, args.x_dtype, args.a_dtype, [&](auto x_element, auto a_element) {
    using X = decltype(x_element);
    using A = decltype(a_element);
    using W = Wide<X>;
    auto da = static_cast<const A*>(args.da);
    auto x = static_cast<const X*>(args.x);
    auto mask = static_cast<const W*>(args.mask);
    auto dx = static_cast<X*>(args.dx);
    auto a = static_cast<A*>(args.a);
    with_constants(args.kind, mask != nullptr, [&](auto kind, auto masked) {
      for_each_stretch(args.shape, mask, args.threads, [&](int64_t i, const W* stretch, int64_t count) {
        if (a)
          backward<kind(), masked(), true>(da + i, x + i, stretch, dx + i, a + i, count);
        else
          backward<kind(), masked(), false>(da + i, x + i, stretch, dx + i, a, count);
      });
    });
  });
}

}  // namespace zk::ZK_ISA
