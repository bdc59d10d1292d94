// Swoosh on the CPU: loops that vectorise, split over threads.
#include "common/parallel.h"
#include "swoosh/swoosh.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t grain = 1 << 14;

// y may be x.
template <SwooshKind kind, class T>
void forward(const T* x, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = narrow<T>(Swoosh<kind, Wide<T>>::value(widen(x[i])));
}

template <SwooshKind kind, class T>
void forward_row(const T* x, const T* bias, T* y, int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    y[c] = narrow<T>(Swoosh<kind, Wide<T>>::value(widen(x[c]) + widen(bias[c])));
  }
}

template <SwooshKind kind, class T>
void backward(const T* __restrict dy, const T* __restrict x, T* __restrict dx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dx[i] = narrow<T>(widen(dy[i]) * Swoosh<kind, Wide<T>>::derivative(widen(x[i])));
  }
}

}  // namespace

void swoosh_forward(const SwooshForward& args) {
  dispatch_cpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    auto x = static_cast<const T*>(args.x);
    auto y = static_cast<T*>(args.y);
    if (args.bias) {
      auto bias = static_cast<const T*>(args.bias);
      int64_t channels = args.channels;
      auto row = args.kind == SwooshKind::l ? forward_row<SwooshKind::l, T> : forward_row<SwooshKind::r, T>;
      return parallel_for(args.n / channels, 1 + grain / channels, args.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) row(x + i * channels, bias, y + i * channels, channels);
      });
    }
    parallel_for(args.n, grain, args.threads, [&](int64_t begin, int64_t end) {
      auto kernel = args.kind == SwooshKind::l ? forward<SwooshKind::l, T> : forward<SwooshKind::r, T>;
      kernel(x + begin, y + begin, end - begin);
    });
  });
}

void swoosh_backward(const SwooshBackward& args) {
  dispatch_cpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    auto dy = static_cast<const T*>(args.dy);
    auto x = static_cast<const T*>(args.x);
    auto dx = static_cast<T*>(args.dx);
    parallel_for(args.n, grain, args.threads, [&](int64_t begin, int64_t end) {
      auto kernel = args.kind == SwooshKind::l ? backward<SwooshKind::l, T> : backward<SwooshKind::r, T>;
      kernel(dy + begin, x + begin, dx + begin, end - begin);
    });
  });
}

}  // namespace zk::ZK_ISA
