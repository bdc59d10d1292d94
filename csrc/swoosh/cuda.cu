// Swoosh on the GPU: one pass over memory, 16 bytes an access, two accesses in flight per thread.
#include "common/vectors.h"
#include "swoosh/swoosh.h"

namespace zk {

namespace {

constexpr int threads = 256;
constexpr int packs_per_thread = 2;

// Applies body(i) to the first element i of each pack of N in the block's share of [0, count), `packs_per_thread` per
// thread, a stride of one block apart.
template <int N, class Body>
__device__ __forceinline__ void for_each_pack(int64_t count, Body body) {
  int64_t first = (int64_t(blockIdx.x) * (threads * packs_per_thread) + threadIdx.x) * N;
#pragma unroll
  for (int k = 0; k < packs_per_thread; ++k) {
    int64_t i = first + k * threads * N;
    if (i < count) body(i);
  }
}

template <SwooshKind kind, class T, int N>
__global__ void __launch_bounds__(threads) forward(const T* x, T* y, int64_t count) {
  for_each_pack<N>(count, [&](int64_t i) {
    float values[N];
    load(x + i, values);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = Swoosh<kind, float>::value(values[j]);
    store(y + i, values);
  });
}

template <SwooshKind kind, class T, int N>
__global__ void __launch_bounds__(threads) backward(const T* dy, const T* x, T* dx, int64_t count) {
  for_each_pack<N>(count, [&](int64_t i) {
    float values[N], grads[N];
    load(x + i, values);
    load(dy + i, grads);
#pragma unroll
    for (int j = 0; j < N; ++j) grads[j] *= Swoosh<kind, float>::derivative(values[j]);
    store(dx + i, grads);
  });
}

// Calls run(std::integral_constant<int, N>, first, count, blocks) for `count` elements from `first` on, in packs of N:
// the bulk in packs of 16 bytes where `aligned`, then the rest one element at a time.
template <class T, class Run>
void in_packs(int64_t n, bool aligned, Run run) {
  auto run_with = [&](auto width, int64_t first, int64_t count) {
    if (count > 0) run(width, first, count, grid_size(ceil_div(count, threads * packs_per_thread * width())));
  };
  int64_t bulk = aligned ? n / pack_size<T> * pack_size<T> : 0;
  run_with(std::integral_constant<int, pack_size<T>>{}, 0, bulk);
  run_with(std::integral_constant<int, 1>{}, bulk, n - bulk);
}

template <SwooshKind kind, class T>
void run_forward(const SwooshForward& args, void* stream) {
  auto x = static_cast<const T*>(args.x);
  auto y = static_cast<T*>(args.y);
  bool aligned = aligned16(x) && aligned16(y);
  in_packs<T>(args.n, aligned, [&](auto width, int64_t first, int64_t count, unsigned blocks) {
    launch("swoosh forward", forward<kind, T, width.value>, blocks, threads, 0, stream, x + first, y + first, count);
  });
}

template <SwooshKind kind, class T>
void run_backward(const SwooshBackward& args, void* stream) {
  auto dy = static_cast<const T*>(args.dy);
  auto x = static_cast<const T*>(args.x);
  auto dx = static_cast<T*>(args.dx);
  bool aligned = aligned16(dy) && aligned16(x) && aligned16(dx);
  in_packs<T>(args.n, aligned, [&](auto width, int64_t first, int64_t count, unsigned blocks) {
    launch("swoosh backward", backward<kind, T, width.value>, blocks, threads, 0, stream, dy + first, x + first,
           dx + first, count);
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
