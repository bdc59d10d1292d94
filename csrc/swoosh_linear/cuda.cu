// The elementwise half of swoosh_linear on the GPU: one pass over memory, 16 bytes an access. A thread serves several
// rows that share their mask, so that the mask is read once for all of them and the loads of the rows are in flight
// together.
#include "common/vectors.h"
#include "swoosh_linear/swoosh_linear.h"

namespace zk {

namespace {

constexpr int threads = 256;
constexpr int forward_rows = 4, backward_rows = 2;  // per thread

// Elements per access: 16 bytes of the narrower of the two types.
template <class X, class A>
constexpr int width = sizeof(X) < sizeof(A) ? pack_size<X> : pack_size<A>;

// The part of the shape that a block serves: `rows` rows for each threadIdx.y, N columns for each threadIdx.x.
struct Tiles {
  int64_t shared, inner;
  unsigned across, down;  // blocks along inner, and along shared
};

// A thread's place: its first column, its first row within `shared`, and the element and mask element it starts at.
template <int N, int rows>
struct Place {
  int64_t column, row, stride;

  __device__ explicit Place(const Tiles& tiles) {
    unsigned block = blockIdx.x / tiles.across;
    column = (int64_t(blockIdx.x % tiles.across) * blockDim.x + threadIdx.x) * N;
    row = int64_t(block % tiles.down) * (blockDim.y * rows) + threadIdx.y;
    outer = block / tiles.down;
    stride = tiles.inner;
    start = outer * tiles.shared * tiles.inner + column;
  }

  // The element that the thread's k-th row starts at.
  __device__ int64_t element(int k) const { return start + (row + int64_t(k) * blockDim.y) * stride; }
  __device__ bool inside(const Tiles& tiles, int k) const { return row + int64_t(k) * blockDim.y < tiles.shared; }
  __device__ int64_t mask_element() const { return outer * stride + column; }

 private:
  int64_t outer, start;
};

// N elements of the mask, or ones.
template <int N>
__device__ __forceinline__ void load_mask(const float* mask, int64_t i, float (&values)[N]) {
  if (mask) return load(mask + i, values);
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = 1.0f;
}

template <SwooshKind kind, class X, class A, int N>
__global__ void __launch_bounds__(threads) forward(const X* x, const float* mask, A* a, Tiles tiles) {
  constexpr int rows = forward_rows;
  Place<N, rows> place(tiles);
  if (place.column >= tiles.inner) return;
  float factor[N], values[rows][N];
  load_mask(mask, place.mask_element(), factor);
#pragma unroll
  for (int k = 0; k < rows; ++k) {
    if (place.inside(tiles, k)) load(x + place.element(k), values[k]);
  }
#pragma unroll
  for (int k = 0; k < rows; ++k) {
    if (!place.inside(tiles, k)) return;
#pragma unroll
    for (int j = 0; j < N; ++j) values[k][j] = Swoosh<kind, float>::value(values[k][j]) * factor[j];
    store(a + place.element(k), values[k]);
  }
}

template <SwooshKind kind, class X, class A, int N>
__global__ void __launch_bounds__(threads)
    backward(const A* da, const X* x, const float* mask, X* dx, A* a, Tiles tiles) {
  constexpr int rows = backward_rows;
  Place<N, rows> place(tiles);
  if (place.column >= tiles.inner) return;
  float factor[N], values[rows][N], grads[rows][N];
  load_mask(mask, place.mask_element(), factor);
#pragma unroll
  for (int k = 0; k < rows; ++k) {
    if (!place.inside(tiles, k)) break;
    load(x + place.element(k), values[k]);
    load(da + place.element(k), grads[k]);
  }
#pragma unroll
  for (int k = 0; k < rows; ++k) {
    if (!place.inside(tiles, k)) return;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      grads[k][j] *= factor[j] * Swoosh<kind, float>::derivative(values[k][j]);
      values[k][j] = Swoosh<kind, float>::value(values[k][j]) * factor[j];
    }
    store(dx + place.element(k), grads[k]);
    if (a) store(a + place.element(k), values[k]);
  }
}

// Calls run(N, tiles, blocks, threads) for packs of N elements, N a constant: as wide as the rows' alignment allows.
template <class X, class A, class Run>
void in_tiles(const MaskedShape& shape, bool aligned, int rows, Run run) {
  auto launch_with = [&](auto n) {
    int64_t packs = shape.inner / n();
    unsigned x = packs < threads ? unsigned(ceil_div(packs, 32) * 32) : threads;
    unsigned y = threads / x;
    int64_t across = ceil_div(packs, x), down = ceil_div(shape.shared, int64_t(y) * rows);
    unsigned blocks = grid_size(shape.outer * across * down);
    run(n, Tiles{shape.shared, shape.inner, unsigned(across), unsigned(down)}, blocks, dim3(x, y));
  };
  if (shape.size() == 0) return;
  if (aligned && shape.inner % width<X, A> == 0)
    launch_with(std::integral_constant<int, width<X, A>>{});
  else
    launch_with(std::integral_constant<int, 1>{});
}

const auto dispatch = [](DType dtype, auto&& f) { dispatch_gpu(dtype, f); };

}  // namespace

void swoosh_linear_forward_cuda(const SwooshLinearForward& args, void* stream) {
  dispatch_swoosh_linear(dispatch, args.x_dtype, args.a_dtype, [&](auto x_element, auto a_element) {
    using X = decltype(x_element);
    using A = decltype(a_element);
    auto x = static_cast<const X*>(args.x);
    auto mask = static_cast<const float*>(args.mask);
    auto a = static_cast<A*>(args.a);
    bool aligned = aligned16(x) && aligned16(mask) && aligned16(a);
    in_tiles<X, A>(args.shape, aligned, forward_rows, [&](auto n, Tiles tiles, unsigned blocks, dim3 block) {
      auto kernel =
          args.kind == SwooshKind::l ? forward<SwooshKind::l, X, A, n.value> : forward<SwooshKind::r, X, A, n.value>;
      launch("swoosh_linear forward", kernel, blocks, block, 0, stream, x, mask, a, tiles);
    });
  });
}

void swoosh_linear_backward_cuda(const SwooshLinearBackward& args, void* stream) {
  dispatch_swoosh_linear(dispatch, args.x_dtype, args.a_dtype, [&](auto x_element, auto a_element) {
    using X = decltype(x_element);
    using A = decltype(a_element);
    auto da = static_cast<const A*>(args.da);
    auto x = static_cast<const X*>(args.x);
    auto mask = static_cast<const float*>(args.mask);
    auto dx = static_cast<X*>(args.dx);
    auto a = static_cast<A*>(args.a);
    bool aligned = aligned16(da) && aligned16(x) && aligned16(mask) && aligned16(dx) && aligned16(a);
    in_tiles<X, A>(args.shape, aligned, backward_rows, [&](auto n, Tiles tiles, unsigned blocks, dim3 block) {
      auto kernel =
          args.kind == SwooshKind::l ? backward<SwooshKind::l, X, A, n.value> : backward<SwooshKind::r, X, A, n.value>;
      launch("swoosh_linear backward", kernel, blocks, block, 0, stream, da, x, mask, dx, a, tiles);
    });
  });
}

}  // namespace zk
