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

template <SwooshKind kind, class T>
void backward_row(const T* dy, const T* x, const T* bias, T* dx, T* y, int64_t channels) {
  using W = Wide<T>;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    W sum = widen(x[c]) + (bias ? widen(bias[c]) : W(0));
    dx[c] = narrow<T>(widen(dy[c]) * Swoosh<kind, W>::derivative(sum));
    y[c] = narrow<T>(Swoosh<kind, W>::value(sum));
  }
}

// Calls f(begin, end) on rows of `channels` elements.
template <class F>
void each_row(int64_t n, int64_t channels, int threads, F f) {
  parallel_for(n / channels, 1 + grain / channels, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * channels);
  });
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
      return each_row(args.n, channels, args.threads, [&](int64_t i) { row(x + i, bias, y + i, channels); });
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
    if (args.y) {
      auto bias = static_cast<const T*>(args.bias);
      auto y = static_cast<T*>(args.y);
      auto row = args.kind == SwooshKind::l ? backward_row<SwooshKind::l, T> : backward_row<SwooshKind::r, T>;
      return each_row(args.n, args.channels, args.threads,
                      [&](int64_t i) { row(dy + i, x + i, bias, dx + i, y + i, args.channels); });
    }
    parallel_for(args.n, grain, args.threads, [&](int64_t begin, int64_t end) {
      auto kernel = args.kind == SwooshKind::l ? backward<SwooshKind::l, T> : backward<SwooshKind::r, T>;
      kernel(dy + begin, x + begin, dx + begin, end - begin);
    });
  });
}

}  // namespace zk::ZK_ISA
