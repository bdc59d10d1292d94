// The convolution module on the GPU, backward: da, ds and their sums over rows, SwooshR(y) again and, but for chunks,
// the parameters' partial sums in one kernel. The gradient of y lies in a strip with the frames that the kernel reaches
// on either side; both sums of products read it:
//   dx_u = sum_k w_(K - 1 - k) d_(u - H + k),   dw_(K - 1 - k) = sum_u x_u d_(u - H + k).
#include "conv_module/cuda_gradients.h"

namespace zk {

// Partial sums of the parameters, in chunks: cuda_parameters.cu.
void conv_module_chunk_parameters(const ConvModuleGradients& args, int tiles_each, int64_t parts, void* stream);
void conv_module_add_parts(const ConvModuleGradients& args, int64_t parts, void* stream);

namespace {

constexpr int at_once = 6;  // rows of a tile of which a warp waits for memory together, and of those around it:
constexpr int around_at_once = 2;

// Where a block's rows lie in shared memory.
template <int N, bool chunked>
struct Strips {
  Row<N>*gradient, *scaled, *x, *weight, *causal;
  int rows;

  ZK_HD Strips(Row<N>* begin, int kernel) : rows(tile + padded(kernel)) {
    gradient = begin;
    scaled = gradient + rows * lanes;
    x = scaled + (chunked ? rows * lanes : 0);
    weight = x + (chunked ? 0 : tile * lanes);
    causal = weight + padded(kernel) * tap_row;
  }
  ZK_HD Row<N>* end(int kernel) const { return causal + (chunked ? padded(kernel / 2 + 1) * tap_row : 0); }
};

// Which taps, and frames of a tile, a warp takes of the products that are dw.
struct Share {
  int taps, first, count;  // the first of `tap_group` taps; groups of frames
  int parts;               // into which the frames are shared out

  __device__ Share(int kernel, int warp) {
    int groups = padded(kernel) / tap_group, part = unsigned(warp) / unsigned(groups);
    parts = groups <= 1 ? 8 : groups == 2 ? 4 : groups <= 4 ? 2 : 1;
    taps = (warp - part * groups) * tap_group;
    count = part < parts ? warps / parts : 0;
    first = part * count;
  }
};

// Writes the block's partial sums; `scratch` takes what warps have.
template <int N>
__device__ __forceinline__ void write_sums(const ConvModuleShape& n, const Row<N> (&dw)[tap_group], int parts,
                                           Row<N>* scratch, float* partial, Place<N> at) {
  int kernel = int(n.kernel), rows = padded(kernel);
#pragma unroll
  for (int k = 0; k < tap_group; ++k) scratch[(at.warp * tap_group + k) * lanes + at.lane] = dw[k];
  __syncthreads();
#pragma unroll 1
  for (int k = at.warp; k < kernel; k += warps) {
    const Row<N>* own = scratch + k * lanes + at.lane;
    Row<N> sum = {};
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int c = 0; c < N; ++c) sum.of[c] += own[part * rows * lanes].of[c];
    }
    if (at.inside) *reinterpret_cast<Row<N>*>(partial + (kernel - 1 - k) * n.channels) = sum;
  }
  __syncthreads();
}

// Adds up what each warp has of one row, and writes it.
template <int N>
__device__ __forceinline__ void write_row(const Row<N>& mine, Row<N>* scratch, float* to, Place<N> at) {
  scratch[at.warp * lanes + at.lane] = mine;
  __syncthreads();
  if (at.warp == 0 && at.inside) {
    Row<N> sum = mine;
#pragma unroll
    for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
      for (int c = 0; c < N; ++c) sum.of[c] += scratch[warp * lanes + at.lane].of[c];
    }
    *reinterpret_cast<Row<N>*>(to) = sum;
  }
  __syncthreads();
}

// Fills a strip with the gradient of y of frames from `before` on: each warp its own frames of the tile, of which it
// writes SwooshR(y) and adds up the gradient in `db`; then some of those around the tile.
template <class X, class Y, bool through_swoosh, int N>
__device__ __forceinline__ void fill_gradient(Row<N>* strip, const ConvModuleShape& n, const Given<X, Y>& given,
                                              int64_t b, int before, Row<N>& db, Place<N> at) {
  int kernel = int(n.kernel), half = kernel / 2, frames = int(n.frames), first = half + at.warp * group;
  int64_t from = dense(n, b, before, at.channel), step = n.batch * n.channels;
  Frames<Y> dy(given.dy, from, step), y(given.y, from, step), activated(given.activated, from, step);
#pragma unroll 1
  for (int r = first; r < first + group; r += at_once) {
    bool is[at_once];
    Bits<Y, N> dy_bits[at_once], y_bits[at_once] = {};
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      is[j] = at.inside && before + r + j < frames;
      dy_bits[j] = load_bits<N>(dy.at(r + j), is[j]);
      if constexpr (through_swoosh) y_bits[j] = load_bits<N>(y.at(r + j), is[j]);
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      Row<N> value, gradient = gradient_of<Y, through_swoosh, N>(dy_bits[j], y_bits[j], &value);
      if (through_swoosh && is[j]) store_row<N>(activated.to(r + j), value);
#pragma unroll
      for (int c = 0; c < N; ++c) db.of[c] += gradient.of[c];
      strip[(r + j) * lanes + at.lane] = gradient;
    }
  }
#pragma unroll 1
  for (int h = at.warp; h < padded(kernel); h += around_at_once * warps) {
    Bits<Y, N> dy_bits[around_at_once], y_bits[around_at_once] = {};
    int row[around_at_once];
#pragma unroll
    for (int j = 0; j < around_at_once; ++j) {
      row[j] = h + j * warps + (h + j * warps < half ? 0 : tile);
      bool is = at.inside && unsigned(before + row[j]) < unsigned(frames);
      dy_bits[j] = load_bits<N>(dy.at(row[j]), is);
      if constexpr (through_swoosh) y_bits[j] = load_bits<N>(y.at(row[j]), is);
    }
#pragma unroll
    for (int j = 0; j < around_at_once; ++j) {
      strip[row[j] * lanes + at.lane] = gradient_of<Y, through_swoosh, N>(dy_bits[j], y_bits[j], nullptr);
    }
  }
}

// Fills `to` with e times the rows of a strip whose first row is frame `before`.
template <int N>
__device__ __forceinline__ void fill_scaled(Row<N>* to, const Row<N>* strip, int rows, const ConvModuleInputs& in,
                                            int before, Place<N> at) {
  for (int r = at.warp; r < rows; r += warps) {
    int t = before + r;
    bool is = at.inside && unsigned(t) < unsigned(in.shape.frames);
    Row<N> row = strip[r * lanes + at.lane];
#pragma unroll
    for (int c = 0; c < N; ++c) row.of[c] = is ? row.of[c] * factor_of(in, t, at.channel + c) : 0.0f;
    to[r * lanes + at.lane] = row;
  }
}

// da and ds of a warp's frames from t on, from their dx, and their sums; and the gated input to `x`, unless it is null.
template <class X, class Y, int N>
__device__ __forceinline__ void write_inputs(const ConvModuleInputs& in, const Given<X, Y>& given, int64_t b, int t,
                                             const Row<N> (&dx)[group], Row<N>* x, Row<N>& sum_a, Row<N>& sum_s,
                                             Place<N> at) {
  const ConvModuleShape& n = in.shape;
  // Lane i looks at frame i.
  bool mine = at.lane < group && heard(in.padding, n.frames, b, t + at.lane);
  unsigned present = __ballot_sync(0xffffffffu, mine);
  if (!at.inside) present = 0;
  int64_t from = strided(n, b, t, at.channel), to = (int64_t(t) * n.batch + b) * given.step + at.channel;
  Frames<X> a(in.a, from, n.frame_stride), s(in.s, from, n.frame_stride);
  Frames<X> da(given.da, to, n.batch * given.step), ds(given.ds, to, n.batch * given.step);
  int count = at.inside && given.da ? int(n.frames) - t : 0;
#pragma unroll
  for (int r0 = 0; r0 < group; r0 += at_once) {
    Bits<X, N> a_bits[at_once], s_bits[at_once];  // loaded before stores that might, for all nvcc knows, change them
#pragma unroll
    for (int r = r0; r < r0 + at_once; ++r) {
      a_bits[r - r0] = load_bits<N>(a.at(r), present >> r & 1);
      s_bits[r - r0] = load_bits<N>(s.at(r), present >> r & 1);
    }
#pragma unroll
    for (int r = r0; r < r0 + at_once; ++r) {
      Row<N> in_a = widened<X, N>(a_bits[r - r0]), in_s = widened<X, N>(s_bits[r - r0]), gated, out_a, out_s;
#pragma unroll
      for (int c = 0; c < N; ++c) {
        float gate = open(in_s.of[c]);
        gated.of[c] = in_a.of[c] * gate;
        out_a.of[c] = present >> r & 1 ? dx[r].of[c] * gate : 0.0f;
        out_s.of[c] = out_a.of[c] * (in_a.of[c] - gated.of[c]);
        sum_a.of[c] += out_a.of[c];
        sum_s.of[c] += out_s.of[c];
      }
      if (x) x[r * lanes] = gated;
      if (r < count) {
        store_row<N>(da.to(r), out_a);
        store_row<N>(ds.to(r), out_s);
      }
    }
  }
}

template <class X, class Y, int N, bool chunked, bool through_swoosh>
__global__ void __launch_bounds__(warps* lanes, 2) backward(ConvModuleInputs in, Given<X, Y> given) {
  const ConvModuleShape& n = in.shape;
  Place<N> at(n, blockIdx.y);
  int kernel = int(n.kernel), half = kernel / 2, first = at.warp * group, mine = first * lanes + at.lane;
  Strips<N, chunked> strips(dynamic_shared<Row<N>>(), kernel);
  fill_taps<N>(strips.weight, in.weight, kernel, n.channels, true, at, blockIdx.y);
  if (chunked) fill_taps<N>(strips.causal, in.causal_weight, half + 1, n.channels, true, at, blockIdx.y);
  Share share(kernel, at.warp);
  Row<N> dw[tap_group] = {}, db = {}, sum_a = {}, sum_s = {};

  int begin = int(blockIdx.x) * given.tiles_each, end = begin + given.tiles_each;
  if (end > given.tiles) end = given.tiles;
  Tile here(n, begin, tile);
#pragma unroll 1
  for (int i = begin; i < end; ++i, here.t0 += tile) {
    if (here.t0 >= n.frames) {
      here.t0 = 0;
      ++here.b;
    }
    int t0 = int(here.t0);
    fill_gradient<X, Y, through_swoosh>(strips.gradient, n, given, here.b, t0 - half, db, at);
    __syncthreads();
    if (chunked) {
      fill_scaled(strips.scaled, strips.gradient, strips.rows, in, t0 - half, at);
      __syncthreads();
    }
    Row<N> dx[group] = {};
    if constexpr (chunked) {
      convolve_inside<N>(strips.scaled + mine, strips.weight + at.lane, kernel, half, Positions<group>(n, t0 + first),
                         dx);
      convolve<N>(strips.gradient + mine + half * lanes, strips.causal + at.lane, half + 1, dx);
    } else if (given.da) {
      convolve<N>(strips.gradient + mine, strips.weight + at.lane, kernel, dx);
    }
    write_inputs<X, Y>(in, given, here.b, t0 + first, dx, chunked ? nullptr : strips.x + mine, sum_a, sum_s, at);
    __syncthreads();
    if (!chunked && given.parameters) {
#pragma unroll 1
      for (int g = share.first; g < share.first + share.count; ++g) {
        correlate<group, lanes>(strips.gradient + (g * group + share.taps) * lanes + at.lane,
                                strips.x + g * group * lanes + at.lane, dw);
      }
      __syncthreads();
    }
  }

  SumRows rows(kernel, chunked, given.parameters, given.da != nullptr);
  Row<N>* scratch = strips.gradient;
  if (!chunked && given.parameters) {
    write_sums<N>(n, dw, share.parts, scratch, given.partial(n, rows, 0, at.channel), at);
    write_row<N>(db, scratch, given.partial(n, rows, rows.bias, at.channel), at);
  }
  if (given.da) {
    write_row<N>(sum_a, scratch, given.partial(n, rows, rows.da, at.channel), at);
    write_row<N>(sum_s, scratch, given.partial(n, rows, rows.da + 1, at.channel), at);
  }
}

template <int N, bool chunked>
size_t shared_bytes(const ConvModuleInputs& in) {
  int kernel = int(in.shape.kernel);
  Row<N>* begin = nullptr;
  return size_t(reinterpret_cast<const char*>(Strips<N, chunked>(begin, kernel).end(kernel)) -
                reinterpret_cast<const char*>(begin));
}

template <class X, class Y, int N, bool chunked>
void run(const ConvModuleGradients& args, int tiles, int tiles_each, int64_t parts, void* stream) {
  const ConvModuleInputs& inputs = args;
  Given<X, Y> given{static_cast<const Y*>(args.dy),
                    static_cast<const Y*>(args.y),
                    static_cast<Y*>(args.activated),
                    static_cast<X*>(args.da),
                    static_cast<X*>(args.ds),
                    args.gradient_step,
                    static_cast<float*>(args.partials),
                    tiles,
                    tiles_each,
                    args.parameters};
  launch("conv_module backward", args.y ? backward<X, Y, N, chunked, true> : backward<X, Y, N, chunked, false>,
         grid(args.shape, parts, N), warps * lanes, shared_bytes<N, chunked>(args), stream, inputs, given);
}

}  // namespace

void conv_module_backward_cuda(const ConvModuleGradients& args, void* stream) {
  const ConvModuleShape& n = args.shape;
  int64_t tiles = n.batch * ceil_div(n.frames, tile), tiles_each = ceil_div(tiles, args.parts);
  if (tiles > 0x7fffffff) throw std::runtime_error("conv_module: more tiles than 32 bits count");
  int64_t parts = ceil_div(tiles, tiles_each);
  with_types(args, [&](auto x, auto y) {
    using X = decltype(x);
    using Y = decltype(y);
    if (args.chunked()) return run<X, Y, 1, true>(args, int(tiles), int(tiles_each), parts, stream);
    if constexpr (sizeof(X) == 2 && std::is_same_v<X, Y>) {
      bool pairs = in_pairs<X, Y>(args, {args.dy, args.y, args.activated, args.da, args.ds});
      pairs = pairs && args.gradient_step % 2 == 0;
      if (pairs && shared_bytes<2, false>(args) <= most_shared) {
        return run<X, Y, 2, false>(args, int(tiles), int(tiles_each), parts, stream);
      }
    }
    run<X, Y, 1, false>(args, int(tiles), int(tiles_each), parts, stream);
  });
  if (args.chunked() && args.parameters) conv_module_chunk_parameters(args, int(tiles_each), parts, stream);
  if (args.partials) conv_module_add_parts(args, parts, stream);
}

}  // namespace zk
