// Swoosh on the GPU: one pass over memory, 16 bytes an access, two accesses in flight per thread.
#include "common/launch.h"
#include "swoosh/swoosh.h"

namespace zk {

namespace {

constexpr int threads = 256;
constexpr int packs_per_thread = 2;

// Applies body(i) to each i of the block's share of [0, count), `packs_per_thread` per thread, a stride of one block
// apart.
template <class Body>
__device__ __forceinline__ void for_each_pack(int64_t count, Body body) {
  int64_t first = int64_t(blockIdx.x) * (threads * packs_per_thread) + threadIdx.x;
#pragma unroll
  for (int k = 0; k < packs_per_thread; ++k) {
    int64_t i = first + k * threads;
    if (i < count) body(i);
  }
}

template <SwooshKind kind, class T, int N>
__global__ void __launch_bounds__(threads) forward(const Pack<T, N>* x, Pack<T, N>* y, int64_t count) {
  for_each_pack(count, [&](int64_t i) {
    Pack<T, N> in = x[i], out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.element[j] = narrow<T>(Swoosh<kind, float>::value(widen(in.element[j])));
    y[i] = out;
  });
}

template <SwooshKind kind, class T, int N>
__global__ void __launch_bounds__(threads)
    backward(const Pack<T, N>* dy, const Pack<T, N>* x, Pack<T, N>* dx, int64_t count) {
  for_each_pack(count, [&](int64_t i) {
    Pack<T, N> grad = dy[i], in = x[i], out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out.element[j] = narrow<T>(widen(grad.element[j]) * Swoosh<kind, float>::derivative(widen(in.element[j])));
    }
    dx[i] = out;
  });
}

unsigned blocks_for(int64_t count) { return grid_size(ceil_div(count, threads * packs_per_thread)); }

// Calls run(std::integral_constant<int, N>, first, count): the bulk in packs of 16 bytes where `aligned`, then the rest
// one element at a time.
template <class T, class Run>
void in_packs(int64_t n, bool aligned, Run run) {
  constexpr int wide = pack_size<T>;
  int64_t packs = aligned ? n / wide : 0;
  if (packs > 0) run(std::integral_constant<int, wide>{}, int64_t(0), packs);
  if (packs * wide < n) run(std::integral_constant<int, 1>{}, packs * wide, n - packs * wide);
}

template <SwooshKind kind, class T>
void run_forward(const SwooshForward& args, void* stream) {
  auto x = static_cast<const T*>(args.x);
  auto y = static_cast<T*>(args.y);
  in_packs<T>(args.n, aligned16(x) && aligned16(y), [&](auto width, int64_t first, int64_t count) {
    using P = Pack<T, width.value>;
    launch("swoosh forward", forward<kind, T, width.value>, blocks_for(count), threads, 0, stream,
           reinterpret_cast<const P*>(x + first), reinterpret_cast<P*>(y + first), count);
  });
}

template <SwooshKind kind, class T>
void run_backward(const SwooshBackward& args, void* stream) {
  auto dy = static_cast<const T*>(args.dy);
  auto x = static_cast<const T*>(args.x);
  auto dx = static_cast<T*>(args.dx);
  bool aligned = aligned16(dy) && aligned16(x) && aligned16(dx);
  in_packs<T>(args.n, aligned, [&](auto width, int64_t first, int64_t count) {
    using P = Pack<T, width.value>;
    launch("swoosh backward", backward<kind, T, width.value>, blocks_for(count), threads, 0, stream,
           reinterpret_cast<const P*>(dy + first), reinterpret_cast<const P*>(x + first),
           reinterpret_cast<P*>(dx + first), count);
  });
}

}  // namespace

void swoosh_forward_cuda(const SwooshForward& args, void* stream) {
  dispatch_gpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    auto run = args.kind == SwooshKind::l ? run_forward<SwooshKind::l, T> : run_forward<SwooshKind::r, T>;
    run(args, stream);
  });
}

void swoosh_backward_cuda(const SwooshBackward& args, void* stream) {
  dispatch_gpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    auto run = args.kind == SwooshKind::l ? run_backward<SwooshKind::l, T> : run_backward<SwooshKind::r, T>;
    run(args, stream);
  });
}

}  // namespace zk
