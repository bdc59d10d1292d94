// The convolution module on the GPU. A block takes a tile of frames of one sequence and 32 channels, a lane each;
// strips of frames lie in shared memory, 32 floats a row, with the frames that the kernel reaches on either side. A
// warp sums 16 neighbouring results at a time in registers.
#include <type_traits>

#include "common/launch.h"
#include "conv_module/conv_module.h"
#include "conv_module/math.h"

namespace zk {

namespace {

constexpr int lanes = 32;
constexpr int warps = 8;
constexpr int group = 16;            // results of a warp, and taps that it takes at a time
constexpr int tile = warps * group;  // frames of a block

// Taps, padded with zeros to whole groups.
ZK_HD int padded(int taps) { return (taps + group - 1) / group * group; }

// Rows of a strip from frame t0 - H on: those of the tile, and as many as the padded taps reach beyond them.
ZK_HD int strip_rows(int kernel) {
  int half = kernel / 2, causal = half + padded(half + 1);
  return tile + (padded(kernel) > causal ? padded(kernel) : causal);
}

// Where a block of threads stands.
struct Place {
  int lane, warp, channel;
  bool inside;  // whether the lane has a channel

  __device__ Place(const ConvModuleShape& n, unsigned block)
      : lane(int(threadIdx.x) % lanes),
        warp(int(threadIdx.x) / lanes),
        channel(int(block) * lanes + lane),
        inside(channel < n.channels) {}
};

// A tile: frames t0 .. t0 + tile - 1 of sequence b.
struct Tile {
  int64_t b, t0;

  __device__ Tile(const ConvModuleShape& n, unsigned i) {
    unsigned across = unsigned((n.frames + tile - 1) / tile);
    b = i / across;
    t0 = int64_t(i % across) * tile;
  }
};

__device__ __forceinline__ int64_t dense(const ConvModuleShape& n, int64_t b, int64_t t, int channel) {
  return (t * n.batch + b) * n.channels + channel;
}

__device__ __forceinline__ int64_t strided(const ConvModuleShape& n, int64_t b, int64_t t, int channel) {
  return t * n.frame_stride + b * n.batch_stride + channel;
}

__device__ __forceinline__ bool is_padding(const ConvModuleInputs& in, int64_t b, int64_t t) {
  return in.padding && in.padding[b * in.shape.frames + t];
}

// Fills rows of `strip` with value(t) of frames first, first + 1, ...; zero outside of the sequence.
template <class Value>
__device__ __forceinline__ void fill(float* strip, int rows, int64_t first, int64_t frames, Place at, Value value) {
#pragma unroll 4
  for (int r = at.warp; r < rows; r += warps) {
    int64_t t = first + r;
    strip[r * lanes + at.lane] = at.inside && t >= 0 && t < frames ? value(t) : 0.0f;
  }
}

template <class X>
__device__ __forceinline__ void fill_gated(float* strip, int rows, int64_t first, const ConvModuleInputs& in, int64_t b,
                                           Place at) {
  auto a = static_cast<const X*>(in.a), s = static_cast<const X*>(in.s);
  fill(strip, rows, first, in.shape.frames, at, [&](int64_t t) {
    int64_t i = strided(in.shape, b, t, at.channel);
    return is_padding(in, b, t) ? 0.0f : gated(widen(a[i]), widen(s[i]));
  });
}

// Fills rows of `to` with the taps of 32 channels of a parameter (channels, taps), backwards in time if `flipped`; zero
// beyond them.
__device__ __forceinline__ void fill_taps(float* to, const void* from, int taps, int64_t channels, bool flipped,
                                          unsigned block) {
  auto values = static_cast<const float*>(from) + int64_t(block) * lanes * taps;
  int64_t left = (channels - int64_t(block) * lanes) * taps;
  for (int i = threadIdx.x; i < lanes * padded(taps); i += warps * lanes) to[i] = 0.0f;
  __syncthreads();
  for (int i = threadIdx.x; i < lanes * taps && i < left; i += warps * lanes) {
    int k = i % taps;
    to[(flipped ? taps - 1 - k : k) * lanes + i / taps] = values[i];
  }
}

__device__ __forceinline__ float value_of(const void* parameter, Place at) {
  return parameter && at.inside ? static_cast<const float*>(parameter)[at.channel] : 0.0f;
}

// Where frame t stands in its chunk. Frames are counted in 32 bits: a division of 64 is a call.
__device__ __forceinline__ int position_of(const ConvModuleShape& n, int64_t t) {
  return int(unsigned(t) % unsigned(n.chunk));
}

// e_p of frame t.
__device__ __forceinline__ float factor_of(const ConvModuleInputs& in, int64_t t, Place at) {
  const ConvModuleShape& n = in.shape;
  auto left = static_cast<const float*>(in.edge_scale) + int64_t(at.channel) * n.kernel;
  return edge_factor(left, left + n.channels * n.kernel, position_of(n, t), n.chunk, n.kernel);
}

// Everything, or, where sums[i] belongs to a frame at position[i] of its chunk, only what lies in that chunk.
struct Anywhere {
  __device__ __forceinline__ bool holds(int, int) const { return true; }
};

struct SameChunk {
  int position[group];  // of 16 frames in their chunks
  int chunk;

  __device__ SameChunk(const ConvModuleShape& n, int64_t t) : chunk(int(n.chunk)) {
    int p = position_of(n, t);
#pragma unroll
    for (int i = 0; i < group; ++i) {
      position[i] = p;
      p = p + 1 == chunk ? 0 : p + 1;
    }
  }

  // Whether frame i, moved by `distance`, stays in its chunk.
  __device__ __forceinline__ bool holds(int i, int distance) const {
    return unsigned(position[i] + distance) < unsigned(chunk);
  }
};

// sums[i] += sum_j factors[j] rows[i + j], i, j < 16. Frame i, or j if `by_factor`, and the row differ by first + j, or
// first + i.
template <bool by_factor, class Where>
__device__ __forceinline__ void correlate(const float* rows, const float* factors, Where where, int first,
                                          float (&sums)[group]) {
  float held[2 * group - 1];
#pragma unroll
  for (int i = 0; i < 2 * group - 1; ++i) held[i] = rows[i * lanes];
#pragma unroll
  for (int j = 0; j < group; ++j) {
    float factor = factors[j * lanes];
#pragma unroll
    for (int i = 0; i < group; ++i) {
      float x = where.holds(by_factor ? j : i, first + (by_factor ? i : j)) ? held[i + j] : 0.0f;
      sums[i] += factor * x;
    }
  }
}

// sums[i] += sum_k taps[k] rows[i + k] over all taps; the first row is frame -before.
template <class Where>
__device__ __forceinline__ void convolve(const float* rows, const float* taps, int count, int before, Where where,
                                         float (&sums)[group]) {
  for (int k = 0; k < count; k += group) {
    correlate<false>(rows + k * lanes, taps + k * lanes, where, k - before, sums);
  }
}

// ---- forward ----

// With as many blocks on a multiprocessor as fit without spilling; ptxas would keep chunks in more registers.
template <class X, class Y, bool chunked>
__global__ void __launch_bounds__(warps* lanes, chunked ? 3 : 5) forward(ConvModuleInputs in, Y* y) {
  const ConvModuleShape& n = in.shape;
  Place at(n, blockIdx.y);
  Tile here(n, blockIdx.x);
  int kernel = int(n.kernel), half = kernel / 2, rows = strip_rows(kernel);
  float* x = dynamic_shared<float>();
  float* weight = x + rows * lanes;
  float* causal = weight + padded(kernel) * lanes;
  fill_gated<X>(x, rows, here.t0 - half, in, here.b, at);
  fill_taps(weight, in.weight, kernel, n.channels, false, blockIdx.y);
  if (chunked) fill_taps(causal, in.causal_weight, half + 1, n.channels, false, blockIdx.y);
  __syncthreads();

  int first = at.warp * group;
  const float* mine = x + first * lanes + at.lane;
  float sums[group], bias = value_of(in.bias, at);
#pragma unroll
  for (int i = 0; i < group; ++i) sums[i] = bias;
  if (chunked) {
    convolve(mine, weight + at.lane, kernel, half, SameChunk(n, here.t0 + first), sums);
    float causal_bias = value_of(in.causal_bias, at);
#pragma unroll
    for (int i = 0; i < group; ++i) {
      int64_t t = here.t0 + first + i;
      sums[i] = causal_bias + (at.inside && t < n.frames ? sums[i] * factor_of(in, t, at) : 0.0f);
    }
    convolve(mine, causal + at.lane, half + 1, half, Anywhere{}, sums);
  } else {
    convolve(mine, weight + at.lane, kernel, half, Anywhere{}, sums);
  }
#pragma unroll
  for (int i = 0; i < group; ++i) {
    int64_t t = here.t0 + first + i;
    if (at.inside && t < n.frames) y[dense(n, here.b, t, at.channel)] = narrow<Y>(sums[i]);
  }
}

// ---- backward: da and ds ----

// Fills `strip` with dy, and `scaled` with e dy where there are chunks.
template <class Y, bool chunked>
__device__ __forceinline__ void fill_gradients(float* strip, float* scaled, int rows, int64_t first,
                                               const ConvModuleInputs& in, const Y* dy, int64_t b, Place at) {
  const ConvModuleShape& n = in.shape;
  fill(strip, rows, first, n.frames, at, [&](int64_t t) { return widen(dy[dense(n, b, t, at.channel)]); });
  if (!chunked) return;
  fill(scaled, rows, first, n.frames, at,
       [&](int64_t t) { return widen(dy[dense(n, b, t, at.channel)]) * factor_of(in, t, at); });
}

template <class X, class Y, bool chunked>
__global__ void __launch_bounds__(warps* lanes) backward(ConvModuleInputs in, const Y* dy, X* da, X* ds) {
  const ConvModuleShape& n = in.shape;
  Place at(n, blockIdx.y);
  Tile here(n, blockIdx.x);
  int kernel = int(n.kernel), half = kernel / 2, rows = strip_rows(kernel);
  float* gradient = dynamic_shared<float>();
  float* weight = gradient + rows * lanes;
  float* causal = weight + padded(kernel) * lanes;
  float* scaled = causal + padded(half + 1) * lanes;
  fill_gradients<Y, chunked>(gradient, scaled, rows, here.t0 - half, in, dy, here.b, at);
  fill_taps(weight, in.weight, kernel, n.channels, true, blockIdx.y);
  if (chunked) fill_taps(causal, in.causal_weight, half + 1, n.channels, true, blockIdx.y);
  __syncthreads();

  int first = at.warp * group, mine = first * lanes + at.lane;
  float sums[group] = {};
  if (chunked) {
    convolve(scaled + mine, weight + at.lane, kernel, half, SameChunk(n, here.t0 + first), sums);
    convolve(gradient + mine + half * lanes, causal + at.lane, half + 1, 0, Anywhere{}, sums);
  } else {
    convolve(gradient + mine, weight + at.lane, kernel, half, Anywhere{}, sums);
  }
  auto a = static_cast<const X*>(in.a), s = static_cast<const X*>(in.s);
#pragma unroll
  for (int i = 0; i < group; ++i) {
    int64_t t = here.t0 + first + i;
    if (!at.inside || t >= n.frames) continue;
    float wide_da = 0.0f, wide_ds = 0.0f;
    if (!is_padding(in, here.b, t)) {
      int64_t from = strided(n, here.b, t, at.channel);
      gate_gradients(widen(a[from]), widen(s[from]), sums[i], wide_da, wide_ds);
    }
    int64_t to = dense(n, here.b, t, at.channel);
    da[to] = narrow<X>(wide_da);
    ds[to] = narrow<X>(wide_ds);
  }
}

// ---- backward: parameters ----

// Adds 16 sums of each warp to `count` rows of `totals`. `scratch` holds `tile` rows. All threads call.
__device__ __forceinline__ void add_up(const float (&sums)[group], float* scratch, float* totals, int count, Place at) {
#pragma unroll
  for (int i = 0; i < group; ++i) scratch[(at.warp * group + i) * lanes + at.lane] = sums[i];
  __syncthreads();
  for (int i = at.warp; i < group && i < count; i += warps) {
    float sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp) sum += scratch[(warp * group + i) * lanes + at.lane];
    totals[i * lanes + at.lane] += sum;
  }
  __syncthreads();
}

// Adds sum_t factors[t] rows[t + k] to totals[k], k < taps; the first row is frame -before.
template <class Where>
__device__ __forceinline__ void add_taps(const float* rows, const float* factors, int taps, int before, Where where,
                                         float* scratch, float* totals, Place at) {
  for (int k = 0; k < taps; k += group) {
    float sums[group] = {};
    correlate<true>(rows + k * lanes, factors, where, k - before, sums);
    add_up(sums, scratch, totals + k * lanes, taps - k, at);
  }
}

__device__ __forceinline__ void add_bias(const float* factors, float* scratch, float* total, Place at) {
  float sums[group] = {};
#pragma unroll
  for (int i = 0; i < group; ++i) sums[0] += factors[i * lanes];
  add_up(sums, scratch, total, 1, at);
}

// Copies `count` rows of `totals` to a parameter's gradient, (channels, count). All threads call.
__device__ __forceinline__ void write_taps(const float* totals, int count, float* to, int64_t channels,
                                           unsigned block) {
  int64_t first = int64_t(block) * lanes, left = (channels - first) * count;
  for (int i = threadIdx.x; i < lanes * count && i < left; i += warps * lanes) {
    to[first * count + i] = totals[i % count * lanes + i / count];
  }
}

// The rows of shared memory that backward_parameters takes, and where in `totals` each parameter's begin.
struct ParameterRows {
  int bias, causal, causal_bias, left, right, totals, all;

  ZK_HD ParameterRows(int kernel, bool chunked) {
    bias = kernel;
    causal = bias + 1;
    causal_bias = causal + kernel / 2 + 1;
    left = causal_bias + 1;
    right = left + kernel;
    totals = chunked ? right + kernel : causal;
    all = totals + strip_rows(kernel) + 2 * tile + (chunked ? tile + padded(kernel) : 0);
  }
};

template <class X, class Y, bool chunked>
__global__ void __launch_bounds__(warps* lanes)
    backward_parameters(ConvModuleInputs in, const Y* dy, float* partials, int64_t parts, ParameterOffsets offsets) {
  const ConvModuleShape& n = in.shape;
  Place at(n, blockIdx.y);
  int kernel = int(n.kernel), half = kernel / 2;
  ParameterRows row(kernel, chunked);
  float* totals = dynamic_shared<float>();
  float* x = totals + row.totals * lanes;
  float* gradient = x + strip_rows(kernel) * lanes;
  float* scratch = gradient + tile * lanes;
  float* scaled = chunked ? scratch + tile * lanes : gradient;
  float* weight = scaled + tile * lanes;
  for (int i = threadIdx.x; i < row.totals * lanes; i += warps * lanes) totals[i] = 0.0f;
  if (chunked) fill_taps(weight, in.weight, kernel, n.channels, false, blockIdx.y);

  int first = at.warp * group, mine = first * lanes + at.lane;
  float bias = value_of(in.bias, at);
  int64_t tiles = n.batch * ((n.frames + tile - 1) / tile);
  int64_t end = tiles * (blockIdx.x + 1) / parts;
  for (int64_t i = tiles * blockIdx.x / parts; i < end; ++i) {
    Tile here(n, unsigned(i));
    fill_gated<X>(x, strip_rows(kernel), here.t0 - half, in, here.b, at);
    fill_gradients<Y, chunked>(gradient, scaled, tile, here.t0, in, dy, here.b, at);
    __syncthreads();
    if (!chunked) {
      add_taps(x + mine, gradient + mine, kernel, half, Anywhere{}, scratch, totals, at);
      add_bias(gradient + mine, scratch, totals + row.bias * lanes, at);
      continue;
    }
    SameChunk inside(n, here.t0 + first);
    add_taps(x + mine, scaled + mine, kernel, half, inside, scratch, totals, at);
    add_bias(scaled + mine, scratch, totals + row.bias * lanes, at);
    add_taps(x + mine, gradient + mine, half + 1, half, Anywhere{}, scratch, totals + row.causal * lanes, at);
    add_bias(gradient + mine, scratch, totals + row.causal_bias * lanes, at);

    // dy times the convolution inside chunks, then its sums over the frames at each position near an edge.
    float sums[group];
#pragma unroll
    for (int j = 0; j < group; ++j) sums[j] = bias;
    convolve(x + mine, weight + at.lane, kernel, half, inside, sums);
#pragma unroll
    for (int j = 0; j < group; ++j) scratch[mine + j * lanes] = sums[j] * gradient[mine + j * lanes];
    __syncthreads();
    int64_t start = position_of(n, here.t0);
    for (int e = at.warp; e < 2 * kernel; e += warps) {
      int64_t p = e < kernel ? e : n.chunk - 2 * kernel + e;
      if (p < 0 || p >= n.chunk) continue;
      float sum = 0.0f;
      for (int64_t j = p >= start ? p - start : p - start + n.chunk; j < tile; j += n.chunk) {
        sum += scratch[j * lanes + at.lane];
      }
      totals[(row.left + e) * lanes + at.lane] += sum;
    }
    __syncthreads();
  }
  __syncthreads();
  float* share = partials + int64_t(blockIdx.x) * offsets.total;
  write_taps(totals, kernel, share, n.channels, blockIdx.y);
  write_taps(totals + row.bias * lanes, 1, share + offsets.bias, n.channels, blockIdx.y);
  if (!chunked) return;
  write_taps(totals + row.causal * lanes, half + 1, share + offsets.causal_weight, n.channels, blockIdx.y);
  write_taps(totals + row.causal_bias * lanes, 1, share + offsets.causal_bias, n.channels, blockIdx.y);
  write_taps(totals + row.left * lanes, kernel, share + offsets.edge_scale, n.channels, blockIdx.y);
  write_taps(totals + row.right * lanes, kernel, share + offsets.edge_scale + n.channels * kernel, n.channels,
             blockIdx.y);
}

// ---- launching ----

// Calls f with zeros of the element types, and whether there are chunks, as a constant.
template <class F>
void with_types(const ConvModuleInputs& in, F f) {
  auto dispatch = [](DType dtype, auto&& g) { dispatch_gpu(dtype, g); };
  dispatch_conv_module(dispatch, in.x_dtype, in.y_dtype, [&](auto x, auto y) {
    if (in.chunked())
      f(x, y, std::true_type{});
    else
      f(x, y, std::false_type{});
  });
}

dim3 grid(const ConvModuleShape& n, int64_t blocks) {
  if (n.frames > 0x7fffffff) throw std::runtime_error("conv_module: more frames than 32 bits count");
  return dim3(grid_size(blocks), unsigned(ceil_div(n.channels, lanes)));
}

size_t bytes(int rows) { return size_t(rows) * lanes * sizeof(float); }

int64_t tiles_of(const ConvModuleShape& n) { return n.batch * ceil_div(n.frames, tile); }

}  // namespace

void conv_module_forward_cuda(const ConvModuleForward& args, void* stream) {
  const ConvModuleInputs& inputs = args;
  const ConvModuleShape& n = args.shape;
  int kernel = int(n.kernel), rows = strip_rows(kernel) + padded(kernel) + padded(kernel / 2 + 1);
  with_types(args, [&](auto x, auto y, auto chunked) {
    using Y = decltype(y);
    launch("conv_module forward", forward<decltype(x), Y, chunked.value>, grid(n, tiles_of(n)), warps * lanes,
           bytes(rows), stream, inputs, static_cast<Y*>(args.y));
  });
}

void conv_module_backward_cuda(const ConvModuleBackward& args, void* stream) {
  const ConvModuleInputs& inputs = args;
  const ConvModuleShape& n = args.shape;
  int kernel = int(n.kernel);
  with_types(args, [&](auto x, auto y, auto chunked) {
    using X = decltype(x);
    using Y = decltype(y);
    auto dy = static_cast<const Y*>(args.dy);
    if (args.da) {
      int strip = strip_rows(kernel), taps = padded(kernel) + padded(kernel / 2 + 1);
      launch("conv_module backward", backward<X, Y, chunked.value>, grid(n, tiles_of(n)), warps * lanes,
             bytes((chunked.value ? 2 : 1) * strip + taps), stream, inputs, dy, static_cast<X*>(args.da),
             static_cast<X*>(args.ds));
    }
    if (args.partials) {
      launch("conv_module backward, parameters", backward_parameters<X, Y, chunked.value>, grid(n, args.parts),
             warps * lanes, bytes(ParameterRows(kernel, chunked.value).all), stream, inputs, dy,
             static_cast<float*>(args.partials), args.parts, ParameterOffsets(n, chunked.value));
    }
  });
}

}  // namespace zk
