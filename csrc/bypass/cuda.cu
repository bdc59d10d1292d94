// The bypass on the GPU. A thread has some neighbouring channels, 16 bytes an access, of several rows; so it reads
// their scales once. Backward leaves each block's share of the scales' gradient in `partials`, which a second kernel
// adds up in order.
#include "bypass/bypass.h"
#include "common/parts.h"
#include "common/vectors.h"

namespace zk {

namespace {

constexpr int threads = 256;
constexpr int at_once = 4;           // rows whose loads of a thread are on their way together, forward
constexpr int backward_at_once = 2;  // and backward, where there are three loads for each

// Where a thread of a block, of blockDim.x packs and blockDim.y rows, begins; `columns` blocks lie side by side.
template <int N>
struct Place {
  int64_t channel, block;

  __device__ explicit Place(unsigned columns)
      : channel((int64_t(blockIdx.x % columns) * blockDim.x + threadIdx.x) * N), block(blockIdx.x / columns) {}

  // The first row of its block's group of rows, of which a thread takes `rows`.
  __device__ int64_t row(int rows) const { return block * rows * blockDim.y + threadIdx.y; }
};

template <class A, class B, class Y, int N>
__global__ void __launch_bounds__(threads)
    forward(const A* a, const B* b, const float* c, Y* y, int64_t rows, int64_t channels, unsigned columns) {
  Place<N> place(columns);
  if (place.channel >= channels) return;
  int64_t first = place.row(at_once);
  float scale[N], before[at_once][N], after[at_once][N];
  load(c + place.channel, scale);
#pragma unroll
  for (int k = 0; k < at_once; ++k) {
    int64_t row = first + k * int(blockDim.y), i = row * channels + place.channel;
    if (row >= rows) break;
    load(a + i, before[k]);
    load(b + i, after[k]);
  }
#pragma unroll
  for (int k = 0; k < at_once; ++k) {
    int64_t row = first + k * int(blockDim.y);
    if (row >= rows) break;
#pragma unroll
    for (int j = 0; j < N; ++j) after[k][j] = before[k][j] + (after[k][j] - before[k][j]) * scale[j];
    store(y + row * channels + place.channel, after[k]);
  }
}

template <class A, class B, class Y, int N>
__global__ void __launch_bounds__(threads)
    backward(const Y* g, const A* a, const B* b, const float* c, A* da, B* db, float* partials, int64_t rows,
             int64_t channels, int64_t parts, unsigned columns) {
  __shared__ float shared[threads * N];
  Place<N> place(columns);
  bool inside = place.channel < channels;
  float scale[N], sums[N] = {};
  if (inside) load(c + place.channel, scale);
  int64_t step = parts * backward_at_once * blockDim.y;
  for (int64_t first = inside ? place.row(backward_at_once) : rows; first < rows; first += step) {
    float grad[backward_at_once][N], before[backward_at_once][N], after[backward_at_once][N];
#pragma unroll
    for (int k = 0; k < backward_at_once; ++k) {
      int64_t row = first + k * int(blockDim.y), i = row * channels + place.channel;
      if (row >= rows) break;
      load(g + i, grad[k]);
      if (!partials) continue;
      load(a + i, before[k]);
      load(b + i, after[k]);
    }
#pragma unroll
    for (int k = 0; k < backward_at_once; ++k) {
      int64_t row = first + k * int(blockDim.y), i = row * channels + place.channel;
      if (row >= rows) break;
      if (partials) {
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += grad[k][j] * (after[k][j] - before[k][j]);
      }
      float through[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        through[j] = grad[k][j] * scale[j];
        grad[k][j] -= through[j];
      }
      if (da) store(da + i, grad[k]);
      if (db) store(db + i, through);
    }
  }
  if (!partials) return;

  float* own = shared + threadIdx.x * N;
#pragma unroll
  for (int j = 0; j < N; ++j) own[threadIdx.y * blockDim.x * N + j] = sums[j];
  __syncthreads();
  if (threadIdx.y > 0 || !inside) return;
  for (unsigned other = 1; other < blockDim.y; ++other) {
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] += own[other * blockDim.x * N + j];
  }
  store(partials + place.block * channels + place.channel, sums);
}

__global__ void __launch_bounds__(sum_threads)
    add_parts(const float* partials, float* dc, int64_t parts, int64_t channels, int columns) {
  int64_t c = int64_t(blockIdx.x) * columns + int(threadIdx.x) % columns;
  float sum = sum_of_parts(c < channels ? partials + c : nullptr, parts, channels, columns);
  if (int(threadIdx.x) < columns && c < channels) dc[c] = sum;
}

// Calls run(N, block, columns) with the elements per access, as a constant: 16 bytes of the narrowest tensor where rows
// are `aligned`, else one element.
template <class A, class B, class Run>
void in_packs(int64_t channels, bool aligned, Run run) {
  constexpr int N = sizeof(A) < sizeof(B) ? pack_size<A> : pack_size<B>;
  auto with = [&](auto n) {
    int64_t packs = channels / n.value, x = packs < threads ? packs : threads;
    run(n, dim3(unsigned(x), unsigned(threads / x)), grid_size(ceil_div(packs, x)));
  };
  if (aligned && channels % N == 0)
    with(std::integral_constant<int, N>{});
  else
    with(std::integral_constant<int, 1>{});
}

}  // namespace

void bypass_forward_cuda(const BypassForwardOnGpu& args, void* stream) {
  dispatch_bypass(args.a_dtype, args.b_dtype, args.y_dtype, [&](auto a_element, auto b_element, auto y_element) {
    using A = decltype(a_element);
    using B = decltype(b_element);
    using Y = decltype(y_element);
    auto a = static_cast<const A*>(args.a);
    auto b = static_cast<const B*>(args.b);
    auto c = static_cast<const float*>(args.c);
    auto y = static_cast<Y*>(args.y);
    bool aligned = aligned16(a) && aligned16(b) && aligned16(c) && aligned16(y);
    in_packs<A, B>(args.channels, aligned, [&](auto n, dim3 block, unsigned columns) {
      int64_t groups = ceil_div(args.rows, at_once * int64_t(block.y));
      launch("bypass forward", forward<A, B, Y, n.value>, grid_size(groups * columns), block, 0, stream, a, b, c, y,
             args.rows, args.channels, columns);
    });
  });
}

void bypass_backward_cuda(const BypassBackwardOnGpu& args, void* stream) {
  auto partials = static_cast<float*>(args.partials);
  dispatch_bypass(args.a_dtype, args.b_dtype, args.y_dtype, [&](auto a_element, auto b_element, auto y_element) {
    using A = decltype(a_element);
    using B = decltype(b_element);
    using Y = decltype(y_element);
    auto g = static_cast<const Y*>(args.g);
    auto a = static_cast<const A*>(args.a);
    auto b = static_cast<const B*>(args.b);
    auto c = static_cast<const float*>(args.c);
    auto da = static_cast<A*>(args.da);
    auto db = static_cast<B*>(args.db);
    bool aligned = aligned16(g) && aligned16(a) && aligned16(b) && aligned16(c) && aligned16(da) && aligned16(db);
    in_packs<A, B>(args.channels, aligned, [&](auto n, dim3 block, unsigned columns) {
      launch("bypass backward", backward<A, B, Y, n.value>, grid_size(args.parts * columns), block, 0, stream, g, a, b,
             c, da, db, partials, args.rows, args.channels, args.parts, columns);
    });
  });
  if (!partials) return;
  int64_t columns = sum_columns(sum_groups(args.parts));
  launch("bypass backward, sums", add_parts, grid_size(ceil_div(args.channels, columns)), sum_threads, 0, stream,
         static_cast<const float*>(partials), static_cast<float*>(args.dc), args.parts, args.channels, int(columns));
}

}  // namespace zk
