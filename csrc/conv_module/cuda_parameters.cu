// The convolution module on the GPU, backward: partial sums of the parameters' gradients in chunks, and the sums of all
// parts. Without chunks cuda_backward.cu makes the parts.
#include "conv_module/cuda_gradients.h"

namespace zk {

namespace {

// Adds a warp's sums to `count` rows of `totals`. `scratch` holds a row for each sum of each warp. All threads call.
template <int N>
__device__ __forceinline__ void add_up(const Row<1> (&sums)[N], Row<1>* scratch, Row<1>* totals, int count,
                                       Place<1> at) {
#pragma unroll
  for (int i = 0; i < N; ++i) scratch[(at.warp * N + i) * lanes + at.lane] = sums[i];
  __syncthreads();
  for (int i = at.warp; i < N && i < count; i += warps) {
    float sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp) sum += scratch[(warp * N + i) * lanes + at.lane].of[0];
    totals[i * lanes + at.lane].of[0] += sum;
  }
  __syncthreads();
}

// Adds sum_t factors[t] rows[t + k] to totals[k], k < taps.
__device__ __forceinline__ void add_taps(const Row<1>* rows, const Row<1>* factors, int taps, Row<1>* scratch,
                                         Row<1>* totals, Place<1> at) {
  for (int k = 0; k < taps; k += tap_group) {
    Row<1> sums[tap_group] = {};
    correlate<group, lanes>(rows + k * lanes, factors, sums);
    add_up(sums, scratch, totals + k * lanes, taps - k, at);
  }
}

// The same of frames t at `positions`, where the frame of the row is in t's chunk; the first row is frame -before.
__device__ __forceinline__ void add_taps_inside(const Row<1>* rows, const Row<1>* factors, int taps, int before,
                                                const Positions<group>& positions, Row<1>* scratch, Row<1>* totals,
                                                Place<1> at) {
  for (int k = 0; k < taps; k += tap_group) {
    Row<1> sums[tap_group] = {}, held[group + tap_group - 1];
#pragma unroll
    for (int i = 0; i < group + tap_group - 1; ++i) held[i] = rows[(k + i) * lanes];
#pragma unroll
    for (int j = 0; j < group; ++j) {
      float factor = factors[j * lanes].of[0];
#pragma unroll
      for (int i = 0; i < tap_group; ++i) {
        sums[i].of[0] += factor * (positions.stays(j, k + i - before) ? held[i + j].of[0] : 0.0f);
      }
    }
    add_up(sums, scratch, totals + k * lanes, taps - k, at);
  }
}

__device__ __forceinline__ void add_bias(const Row<1>* factors, Row<1>* scratch, Row<1>* total, Place<1> at) {
  Row<1> sums[1] = {};
#pragma unroll
  for (int i = 0; i < group; ++i) sums[0].of[0] += factors[i * lanes].of[0];
  add_up(sums, scratch, total, 1, at);
}

// Where a block's rows lie in shared memory.
struct Rows {
  int x, gradient, scratch, scaled, weight, all;  // in rows of lanes; `totals` come first

  ZK_HD Rows(int kernel) {
    x = SumRows(kernel, true, true, false).all;
    gradient = x + tile + padded(kernel);
    scratch = gradient + tile;
    scaled = scratch + warps * tap_group;
    weight = scaled + tile;
    all = weight + (padded(kernel) * tap_row + lanes - 1) / lanes;
  }
};

template <class X, class Y>
__global__ void __launch_bounds__(warps* lanes) backward_parameters(ConvModuleInputs in, Given<X, Y> given) {
  const ConvModuleShape& n = in.shape;
  Place<1> at(n, blockIdx.y);
  int kernel = int(n.kernel), half = kernel / 2;
  SumRows row(kernel, true, true, given.da != nullptr);
  Rows place(kernel);
  Row<1>* totals = dynamic_shared<Row<1>>();
  Row<1>*x = totals + place.x * lanes, *gradient = totals + place.gradient * lanes;
  Row<1>*scratch = totals + place.scratch * lanes, *scaled = totals + place.scaled * lanes;
  Row<1>* weight = totals + place.weight * lanes;
  for (int i = threadIdx.x; i < row.da * lanes; i += warps * lanes) totals[i].of[0] = 0.0f;
  fill_taps<1>(weight, in.weight, kernel, n.channels, false, at, blockIdx.y);

  int first = at.warp * group, mine = first * lanes + at.lane;
  float bias = values_of<1>(static_cast<const float*>(in.bias), at).of[0];
  int end = int(blockIdx.x + 1) * given.tiles_each;
  if (end > given.tiles) end = given.tiles;
  for (int i = int(blockIdx.x) * given.tiles_each; i < end; ++i) {
    Tile here(n, i, tile);
    auto a = static_cast<const X*>(in.a), s = static_cast<const X*>(in.s);
    for (int r = at.warp; r < tile + padded(kernel); r += warps) {
      int64_t t = here.t0 - half + r, from = strided(n, here.b, t, at.channel);
      bool is = at.inside && heard(in.padding, n.frames, here.b, t);
      x[r * lanes + at.lane].of[0] = load_row<1>(a + from, is).of[0] * open(load_row<1>(s + from, is).of[0]);
    }
    for (int r = at.warp; r < tile; r += warps) {
      int64_t t = here.t0 + r, from = dense(n, here.b, t, at.channel);
      bool is = at.inside && t < n.frames;
      float dy = load_row<1>(given.dy + from, is).of[0];
      if (given.y) dy *= SwooshRAt<Y>(load_row<1>(given.y + from, is).of[0]).derivative();
      gradient[r * lanes + at.lane].of[0] = dy;
      scaled[r * lanes + at.lane].of[0] = is ? dy * factor_of(in, t, at.channel) : 0.0f;
    }
    __syncthreads();
    Positions<group> positions(n, here.t0 + first);
    add_taps_inside(x + mine, scaled + mine, kernel, half, positions, scratch, totals, at);
    add_bias(scaled + mine, scratch, totals + row.bias * lanes, at);
    add_taps(x + mine, gradient + mine, half + 1, scratch, totals + row.causal * lanes, at);
    add_bias(gradient + mine, scratch, totals + row.causal_bias * lanes, at);

    // dy times the convolution inside chunks, then its sums over the frames at each position near an edge.
    Row<1> sums[group];
#pragma unroll
    for (int j = 0; j < group; ++j) sums[j].of[0] = bias;
    convolve_inside<1>(x + mine, weight + at.lane, kernel, half, positions, sums);
#pragma unroll
    for (int j = 0; j < group; ++j) scratch[mine + j * lanes].of[0] = sums[j].of[0] * gradient[mine + j * lanes].of[0];
    __syncthreads();
    int start = position_of(n, here.t0), chunk = int(n.chunk);
    for (int e = at.warp; e < 2 * kernel; e += warps) {
      int p = e < kernel ? e : chunk - 2 * kernel + e;
      if (p < 0 || p >= chunk) continue;
      float sum = 0.0f;
      for (int j = p >= start ? p - start : p - start + chunk; j < tile; j += chunk) {
        sum += scratch[j * lanes + at.lane].of[0];
      }
      totals[(row.left + e) * lanes + at.lane].of[0] += sum;
    }
    __syncthreads();
  }
  __syncthreads();
  float* to = given.partial(n, row, 0, at.channel);
  for (int r = at.warp; at.inside && r < row.da; r += warps) to[r * n.channels] = totals[r * lanes + at.lane].of[0];
}

// ---- the sums of all parts ----

constexpr int slices = 8;  // of the parts, each added up by a warp

// Where the sum of a row for a channel goes: each parameter's gradient is laid out as the parameter, and the sums of da
// and ds follow.
__device__ __forceinline__ int64_t place_of(const ConvModuleShape& n, const SumRows& rows, int row, int channel) {
  auto of = [&](int begin, int taps) { return n.channels * begin + int64_t(channel) * taps + (row - begin); };
  int kernel = int(n.kernel);
  if (row >= rows.da || row == rows.bias) return of(row, 1);
  if (row < rows.bias) return of(0, kernel);
  if (row < rows.causal_bias) return of(rows.causal, kernel / 2 + 1);
  if (row == rows.causal_bias) return of(row, 1);
  return row < rows.right ? of(rows.left, kernel) : of(rows.right, kernel);
}

__global__ void __launch_bounds__(slices* lanes)
    add_parts(ConvModuleShape n, const float* partials, float* sums, int parts, SumRows rows) {
  __shared__ float scratch[slices][lanes];
  int lane = int(threadIdx.x) % lanes, slice = int(threadIdx.x) / lanes, row = int(blockIdx.x);
  int channel = int(blockIdx.y) * lanes + lane;
  bool inside = channel < n.channels;
  int first = parts * slice / slices, end = parts * (slice + 1) / slices;
  const float* from = partials + (int64_t(first) * rows.all + row) * n.channels + channel;
  float sum = 0.0f;
#pragma unroll 4
  for (int part = first; part < end; ++part) {
    if (inside) sum += *from;
    from += rows.all * n.channels;
  }
  scratch[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || !inside) return;
  for (int i = 1; i < slices; ++i) sum += scratch[i][lane];
  sums[place_of(n, rows, row, channel)] = sum;
}

}  // namespace

void conv_module_chunk_parameters(const ConvModuleGradients& args, int tiles_each, int64_t parts, void* stream) {
  const ConvModuleInputs& inputs = args;
  const ConvModuleShape& n = args.shape;
  with_types(args, [&](auto x, auto y) {
    using X = decltype(x);
    using Y = decltype(y);
    Given<X, Y> given{static_cast<const Y*>(args.dy),
                      static_cast<const Y*>(args.y),
                      nullptr,
                      static_cast<X*>(args.da),
                      nullptr,
                      0,
                      static_cast<float*>(args.partials),
                      int(n.batch * ceil_div(n.frames, tile)),
                      tiles_each,
                      true};
    launch("conv_module backward, parameters", backward_parameters<X, Y>, grid(n, parts, 1), warps * lanes,
           size_t(Rows(int(n.kernel)).all) * lanes * sizeof(float), stream, inputs, given);
  });
}

void conv_module_add_parts(const ConvModuleGradients& args, int64_t parts, void* stream) {
  const ConvModuleShape& n = args.shape;
  SumRows rows(int(n.kernel), args.chunked(), args.parameters, args.da != nullptr);
  launch("conv_module backward, sums", add_parts, dim3(rows.all, unsigned(ceil_div(n.channels, lanes))), slices * lanes,
         0, stream, n, static_cast<const float*>(args.partials), static_cast<float*>(args.sums), int(parts), rows);
}

}  // namespace zk
