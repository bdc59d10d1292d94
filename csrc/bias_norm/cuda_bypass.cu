// BiasNorm and the bypass after it on the GPU: a warp for each row, held in registers, so that every element is read
// once. The warps of a block have rows of one sequence, where each has a scale of its own, so that a block's share of
// the scales' gradient is that sequence's.
//
// Backward runs a fixed number of blocks that stride over the frames; each leaves its share of the parameters'
// gradients in `partials`, which a second kernel adds up in order.
#include "bias_norm/bias_norm.h"
#include "bias_norm/rows.h"
#include "common/parts.h"
#include "common/reduce.h"
#include "common/vectors.h"

namespace zk {

namespace {

// The rows of a warp: frame `first` of a sequence, and every `step`th after it.
struct Frames {
  int64_t sequence, first, step;

  __device__ explicit Frames(int64_t sequences) {
    unsigned groups = unsigned(sequences);  // blocks are fewer than 2^31
    sequence = blockIdx.x % groups;
    first = int64_t(blockIdx.x / groups) * row_warps + threadIdx.x / 32;
    step = int64_t(gridDim.x / groups) * row_warps;
  }
};

template <class X, class Y, int N, int packs>
__global__ void __launch_bounds__(row_warps * 32, 1)
    bypass_forward(const X* x, const float* bias, const float* log_scale, const Y* src_orig, const float* scale, Y* y,
                   float* inverse, int64_t frames, int64_t sequences, int channels) {
  Frames place(sequences);
  if (place.first >= frames) return;
  int64_t row = place.first * sequences + place.sequence;
  x += row * channels;
  src_orig += row * channels;
  y += row * channels;
  scale += place.sequence * channels;
  float values[packs][N], before[packs][N];
  for_each_pack<N, packs>(channels, [&](int k, int c) {
    load(x + c, values[k]);
    load(src_orig + c, before[k]);
  });
  float r = row_inverse_rms<N, packs>(values, bias, channels);
  float s = expf(*log_scale) * r;
  for_each_pack<N, packs>(channels, [&](int k, int c) {
    float share[N];
    load(scale + c, share);
#pragma unroll
    for (int j = 0; j < N; ++j) values[k][j] = before[k][j] + (values[k][j] * s - before[k][j]) * share[j];
    store(y + c, values[k]);
  });
  if (threadIdx.x % 32 == 0) inverse[row] = r;
}

template <class X, class Y, int N, int packs>
__global__ void __launch_bounds__(row_warps * 32, 1)
    bypass_backward(const Y* dy, const X* x, const float* bias, const float* log_scale, const Y* src_orig,
                    const float* scale, const float* inverse, X* dx, Y* dsrc_orig, float* partials, int64_t frames,
                    int64_t sequences, int channels) {
  __shared__ float shared[2 * packs * 32 * N];
  __shared__ float scratch[row_warps];
  Frames place(sequences);
  scale += place.sequence * channels;
  float gain = expf(*log_scale), total = 0.0f;
  float dbias[packs][N] = {}, dscale[packs][N] = {};
  for (int64_t frame = place.first; frame < frames; frame += place.step) {
    int64_t row = frame * sequences + place.sequence, start = row * channels;
    float values[packs][N], grads[packs][N], before[packs][N];
    for_each_pack<N, packs>(channels, [&](int k, int c) {
      load(x + start + c, values[k]);
      load(dy + start + c, grads[k]);
      load(src_orig + start + c, before[k]);
    });
    float r = inverse[row], s = gain * r, q = 0.0f;
    for_each_pack<N, packs>(channels, [&](int k, int c) {
      float share[N], past[N];  // past: the gradient that goes past the norm
      load(scale + c, share);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dscale[k][j] += grads[k][j] * (values[k][j] * s - before[k][j]);
        float through = grads[k][j] * share[j];
        past[j] = grads[k][j] - through;
        grads[k][j] = through;
        q += through * (values[k][j] * r);
      }
      if (dsrc_orig) store(dsrc_orig + start + c, past);
    });
    q = warp_sum(q);
    total += q;
    BiasNormRow<float> norm{r, s, s * q / float(channels)};
    for_each_pack<N, packs>(channels, [&](int k, int c) {
      float b[N];
      load(bias + c, b);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float t = norm.through_rms(values[k][j], b[j]);
        dbias[k][j] += t;
        grads[k][j] = norm.s * grads[k][j] - t;
      }
      if (dx) store(dx + start + c, grads[k]);
    });
  }
  if (!partials) return;

  float* other = shared + packs * 32 * N;
  add_in_turns<N, packs>(dbias, shared, channels);
  add_in_turns<N, packs>(dscale, other, channels);
  float* own = partials + int64_t(blockIdx.x) * (2 * channels + partial_line);
  for (int c = threadIdx.x; c < channels; c += row_warps * 32) {
    own[c] = other[c];
    own[channels + c] = shared[c];
  }
  float sum = block_sum(threadIdx.x % 32 == 0 ? total : 0.0f, scratch);
  if (threadIdx.x == 0) own[2 * channels] = gain * sum;
}

// The first blocks add up dbias, and dlog_scale in column `channels`, over all parts; the others dscale, as many for
// each sequence, over its own. Each kind has as many columns a block as fit its number of parts.
__global__ void __launch_bounds__(sum_threads)
    bypass_add_parts(const float* partials, float* dbias, float* dlog_scale, float* dscale, int64_t parts,
                     int64_t sequences, int64_t channels, int norm_columns, int columns) {
  int64_t width = 2 * channels + partial_line, norm_blocks = (channels + norm_columns) / norm_columns;
  if (blockIdx.x < norm_blocks) {
    int64_t c = int64_t(blockIdx.x) * norm_columns + int(threadIdx.x) % norm_columns;
    const float* from = c <= channels ? partials + channels + c : nullptr;
    float sum = sum_of_parts(from, parts * sequences, width, norm_columns);
    if (int(threadIdx.x) >= norm_columns) return;
    if (c < channels && dbias) dbias[c] = sum;
    if (c == channels && dlog_scale) *dlog_scale = sum;
    return;
  }
  int64_t blocks = (channels + columns - 1) / columns, block = blockIdx.x - norm_blocks, sequence = block / blocks;
  int64_t c = (block - sequence * blocks) * columns + int(threadIdx.x) % columns;
  const float* from = c < channels ? partials + sequence * width + c : nullptr;
  float sum = sum_of_parts(from, parts, sequences * width, columns);
  if (int(threadIdx.x) < columns && from) dscale[sequence * channels + c] = sum;
}

// Calls run(packs) as `in_registers` does; throws where no warp holds a row.
template <class X, class Run>
void for_rows(int64_t channels, Run run) {
  if (!in_registers<pack_size<X>>(channels, run)) {
    throw std::invalid_argument("channels must be a multiple of 16 bytes and 1024 at most");
  }
}

const auto dispatch = [](DType dtype, auto&& f) { dispatch_gpu(dtype, f); };

}  // namespace

void bias_norm_bypass_forward_cuda(const BiasNormBypassForward& args, void* stream) {
  dispatch_bias_norm(dispatch, args.x_dtype, args.y_dtype, [&](auto x_element, auto y_element) {
    using X = decltype(x_element);
    using Y = decltype(y_element);
    for_rows<X>(args.channels, [&](auto packs) {
      launch("bias_norm bypass forward", bypass_forward<X, Y, pack_size<X>, packs.value>,
             grid_size(ceil_div(args.frames, row_warps) * args.sequences), row_warps * 32, 0, stream,
             static_cast<const X*>(args.x), static_cast<const float*>(args.bias),
             static_cast<const float*>(args.log_scale), static_cast<const Y*>(args.src_orig),
             static_cast<const float*>(args.scale), static_cast<Y*>(args.y), static_cast<float*>(args.inverse_rms),
             args.frames, args.sequences, int(args.channels));
    });
  });
}

void bias_norm_bypass_backward_cuda(const BiasNormBypassBackward& args, void* stream) {
  auto partials = static_cast<float*>(args.partials);
  dispatch_bias_norm(dispatch, args.x_dtype, args.y_dtype, [&](auto x_element, auto y_element) {
    using X = decltype(x_element);
    using Y = decltype(y_element);
    for_rows<X>(args.channels, [&](auto packs) {
      launch("bias_norm bypass backward", bypass_backward<X, Y, pack_size<X>, packs.value>,
             grid_size(args.parts * args.sequences), row_warps * 32, 0, stream, static_cast<const Y*>(args.dy),
             static_cast<const X*>(args.x), static_cast<const float*>(args.bias),
             static_cast<const float*>(args.log_scale), static_cast<const Y*>(args.src_orig),
             static_cast<const float*>(args.scale), static_cast<const float*>(args.inverse_rms),
             static_cast<X*>(args.dx), static_cast<Y*>(args.dsrc_orig), partials, args.frames, args.sequences,
             int(args.channels));
    });
  });
  if (!partials) return;
  int64_t norm_columns = sum_columns(sum_groups(args.parts * args.sequences));
  int64_t columns = sum_columns(sum_groups(args.parts)), blocks = ceil_div(args.channels + 1, norm_columns);
  if (args.dscale) blocks += args.sequences * ceil_div(args.channels, columns);
  launch("bias_norm bypass backward, sums", bypass_add_parts, grid_size(blocks), sum_threads, 0, stream,
         static_cast<const float*>(partials), static_cast<float*>(args.dbias), static_cast<float*>(args.dlog_scale),
         static_cast<float*>(args.dscale), args.parts, args.sequences, args.channels, int(norm_columns), int(columns));
}

}  // namespace zk
