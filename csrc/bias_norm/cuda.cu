// BiasNorm on the GPU. Rows of up to 1024 channels: a warp each, held in registers, so that every element is read once.
// Longer or unaligned rows: a block each, which reads its row again from cache.
//
// Backward runs a fixed number of blocks that stride over the rows; each leaves its share of the gradients of bias and
// log_scale in `partials`, which a second kernel adds up in order.
#include "bias_norm/bias_norm.h"
#include "bias_norm/rows.h"
#include "common/parts.h"
#include "common/reduce.h"
#include "common/vectors.h"

namespace zk {

namespace {

constexpr int max_threads = 512;
// The 1 in __launch_bounds__ keeps ptxas from spilling to fit one more block on the smaller multiprocessors of sm_120.

// Elements per access: 16 bytes of x.
template <class X>
constexpr int width = pack_size<X>;

// ---- a warp per row ----

template <class X, class Y, int N, int packs>
__global__ void __launch_bounds__(row_warps * 32, 1)
    forward_in_registers(const X* x, const float* bias, const float* log_scale, Y* y, float* inverse, int64_t rows,
                         int channels) {
  int64_t row = int64_t(blockIdx.x) * row_warps + threadIdx.x / 32;
  if (row >= rows) return;
  x += row * channels;
  y += row * channels;
  float values[packs][N];
  for_each_pack<N, packs>(channels, [&](int k, int c) { load(x + c, values[k]); });
  float r = row_inverse_rms<N, packs>(values, bias, channels);
  float s = expf(*log_scale) * r;
  for_each_pack<N, packs>(channels, [&](int k, int c) {
#pragma unroll
    for (int j = 0; j < N; ++j) values[k][j] *= s;
    store(y + c, values[k]);
  });
  if (threadIdx.x % 32 == 0) inverse[row] = r;
}

template <class X, class Y, int N, int packs>
__global__ void __launch_bounds__(row_warps * 32, 1)
    backward_in_registers(const Y* dy, const X* x, const float* bias, const float* log_scale, const float* inverse,
                          X* dx, float* partials, int64_t rows, int channels) {
  __shared__ float shared[packs * 32 * N];
  __shared__ float scratch[row_warps];
  int warp = threadIdx.x / 32;
  float gain = expf(*log_scale), total = 0.0f;
  float dbias[packs][N] = {};
  for (int64_t i = int64_t(blockIdx.x) * row_warps + warp; i < rows; i += int64_t(gridDim.x) * row_warps) {
    float values[packs][N], grads[packs][N];
    for_each_pack<N, packs>(channels, [&](int k, int c) {
      load(x + i * channels + c, values[k]);
      load(dy + i * channels + c, grads[k]);
    });
    float r = inverse[i], s = gain * r, q = 0.0f;
    for_each_pack<N, packs>(channels, [&](int k, int) {
#pragma unroll
      for (int j = 0; j < N; ++j) q += grads[k][j] * (values[k][j] * r);
    });
    q = warp_sum(q);
    total += q;
    BiasNormRow<float> row{r, s, s * q / float(channels)};
    for_each_pack<N, packs>(channels, [&](int k, int c) {
      float b[N];
      load(bias + c, b);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float t = row.through_rms(values[k][j], b[j]);
        dbias[k][j] += t;
        grads[k][j] = row.s * grads[k][j] - t;
      }
      if (dx) store(dx + i * channels + c, grads[k]);
    });
  }
  if (!partials) return;

  add_in_turns<N, packs>(dbias, shared, channels);
  float* share = partials + int64_t(blockIdx.x) * (channels + 1);
  for (int c = threadIdx.x; c < channels; c += row_warps * 32) share[c] = shared[c];
  float sum = block_sum(threadIdx.x % 32 == 0 ? total : 0.0f, scratch);
  if (threadIdx.x == 0) share[channels] = gain * sum;
}

// ---- a block per row ----

template <class X, class Y, int N>
__global__ void __launch_bounds__(max_threads, 1)
    forward_in_blocks(const X* x, const float* bias, const float* log_scale, Y* y, float* inverse, int64_t channels) {
  __shared__ float scratch[max_threads / 32];
  int64_t first = int64_t(threadIdx.x) * N, stride = int64_t(blockDim.x) * N, row = blockIdx.x;
  x += row * channels;
  y += row * channels;
  float values[N], b[N];
  float r = inverse_rms<float>(channels, [&](float scale) {
    float sum = 0.0f;
    for (int64_t c = first; c < channels; c += stride) {
      load(x + c, values);
      load(bias + c, b);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float d = (values[j] - b[j]) * scale;
        sum += d * d;
      }
    }
    return block_sum(sum, scratch);
  });
  float s = expf(*log_scale) * r;
  for (int64_t c = first; c < channels; c += stride) {
    load(x + c, values);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] *= s;
    store(y + c, values);
  }
  if (threadIdx.x == 0) inverse[row] = r;
}

template <class X, class Y, int N>
__global__ void __launch_bounds__(max_threads, 1)
    backward_in_blocks(const Y* dy, const X* x, const float* bias, const float* log_scale, const float* inverse, X* dx,
                       float* partials, int64_t rows, int64_t channels) {
  __shared__ float scratch[max_threads / 32];
  int64_t first = int64_t(threadIdx.x) * N, stride = int64_t(blockDim.x) * N;
  float gain = expf(*log_scale), total = 0.0f;
  float* share = partials ? partials + blockIdx.x * (channels + 1) : nullptr;  // a thread touches its own channels only
  float values[N], grads[N], b[N];
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const X* x_row = x + i * channels;
    const Y* dy_row = dy + i * channels;
    float r = inverse[i], s = gain * r, q = 0.0f;
    for (int64_t c = first; c < channels; c += stride) {
      load(x_row + c, values);
      load(dy_row + c, grads);
#pragma unroll
      for (int j = 0; j < N; ++j) q += grads[j] * (values[j] * r);
    }
    q = block_sum(q, scratch);
    total += q;
    BiasNormRow<float> row{r, s, s * q / float(channels)};
    for (int64_t c = first; c < channels; c += stride) {
      load(x_row + c, values);
      load(dy_row + c, grads);
      load(bias + c, b);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float t = row.through_rms(values[j], b[j]);
        if (share) share[c + j] = i == blockIdx.x ? t : share[c + j] + t;
        grads[j] = row.s * grads[j] - t;
      }
      if (dx) store(dx + i * channels + c, grads);
    }
  }
  if (share && threadIdx.x == 0) share[channels] = gain * total;
}

// ---- the second stage ----

// The sums of columns of partials: dbias, and dlog_scale in the last column.
__global__ void __launch_bounds__(sum_threads)
    add_parts(const float* partials, float* dbias, float* dlog_scale, int64_t parts, int64_t channels, int columns) {
  int64_t c = int64_t(blockIdx.x) * columns + int(threadIdx.x) % columns;
  float sum = sum_of_parts(c <= channels ? partials + c : nullptr, parts, channels + 1, columns);
  if (int(threadIdx.x) >= columns) return;
  if (c < channels && dbias) dbias[c] = sum;
  if (c == channels && dlog_scale) *dlog_scale = sum;
}

// ---- the choice between them ----

unsigned threads_for(int64_t packs) {
  int64_t threads = ceil_div(packs, 32) * 32;
  return unsigned(threads < max_threads ? threads : max_threads);
}

// Calls run(N) with the elements per access, as a constant: 16 bytes of x where rows are `aligned`, else one element.
template <class X, class Run>
void in_blocks(int64_t channels, bool aligned, Run run) {
  if (aligned && channels % width<X> == 0)
    run(std::integral_constant<int, width<X>>{});
  else
    run(std::integral_constant<int, 1>{});
}

const auto dispatch = [](DType dtype, auto&& f) { dispatch_gpu(dtype, f); };

}  // namespace

void bias_norm_forward_cuda(const BiasNormForward& args, void* stream) {
  dispatch_bias_norm(dispatch, args.x_dtype, args.y_dtype, [&](auto x_element, auto y_element) {
    using X = decltype(x_element);
    using Y = decltype(y_element);
    auto x = static_cast<const X*>(args.x);
    auto y = static_cast<Y*>(args.y);
    auto bias = static_cast<const float*>(args.bias);
    auto log_scale = static_cast<const float*>(args.log_scale);
    auto inverse = static_cast<float*>(args.inverse_rms);
    bool aligned = aligned16(x) && aligned16(y) && aligned16(bias);
    bool done = aligned && in_registers<width<X>>(args.channels, [&](auto packs) {
                  launch("bias_norm forward", forward_in_registers<X, Y, width<X>, packs.value>,
                         grid_size(ceil_div(args.rows, row_warps)), row_warps * 32, 0, stream, x, bias, log_scale, y,
                         inverse, args.rows, int(args.channels));
                });
    if (done) return;
    in_blocks<X>(args.channels, aligned, [&](auto n) {
      launch("bias_norm forward", forward_in_blocks<X, Y, n.value>, grid_size(args.rows),
             threads_for(args.channels / n.value), 0, stream, x, bias, log_scale, y, inverse, args.channels);
    });
  });
}

void bias_norm_backward_cuda(const BiasNormBackward& args, void* stream) {
  auto partials = static_cast<float*>(args.partials);
  dispatch_bias_norm(dispatch, args.x_dtype, args.y_dtype, [&](auto x_element, auto y_element) {
    using X = decltype(x_element);
    using Y = decltype(y_element);
    auto dy = static_cast<const Y*>(args.dy);
    auto x = static_cast<const X*>(args.x);
    auto dx = static_cast<X*>(args.dx);
    auto bias = static_cast<const float*>(args.bias);
    auto log_scale = static_cast<const float*>(args.log_scale);
    auto inverse = static_cast<const float*>(args.inverse_rms);
    bool aligned = aligned16(dy) && aligned16(x) && aligned16(dx) && aligned16(bias);
    unsigned blocks = grid_size(args.parts);
    bool done =
        aligned && in_registers<width<X>>(args.channels, [&](auto packs) {
          launch("bias_norm backward", backward_in_registers<X, Y, width<X>, packs.value>, blocks, row_warps * 32, 0,
                 stream, dy, x, bias, log_scale, inverse, dx, partials, args.rows, int(args.channels));
        });
    if (done) return;
    in_blocks<X>(args.channels, aligned, [&](auto n) {
      launch("bias_norm backward", backward_in_blocks<X, Y, n.value>, blocks, threads_for(args.channels / n.value), 0,
             stream, dy, x, bias, log_scale, inverse, dx, partials, args.rows, args.channels);
    });
  });
  if (!partials) return;
  int64_t columns = sum_columns(sum_groups(args.parts));
  launch("bias_norm backward, sums", add_parts, grid_size(ceil_div(args.channels + 1, columns)), sum_threads, 0, stream,
         static_cast<const float*>(partials), static_cast<float*>(args.dbias), static_cast<float*>(args.dlog_scale),
         args.parts, args.channels, int(columns));
}

}  // namespace zk
