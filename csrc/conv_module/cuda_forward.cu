// The convolution module on the GPU, forward: gate, zeros on padding, convolution and SwooshR in one kernel.
#include "conv_module/cuda_chunks.h"

namespace zk {

namespace {

constexpr int groups = 2;                     // that a warp sums one after the other
constexpr int tile = warps * groups * group;  // frames of a block

// Rows of the strip from frame t0 - H on: those of the tile, and as many as the padded taps reach beyond them.
ZK_HD int strip_rows(int kernel, bool chunked) {
  int half = kernel / 2, causal = chunked ? padded(half + 1) : 0;
  return tile + (padded(kernel) > causal ? padded(kernel) : causal);
}

// Fills a strip with the gated input of frames from `first` on; zeros on padding and outside of the sequence. With the
// bias of the projection where `biased`.
template <class X, bool biased, int N>
__device__ __forceinline__ void fill_gated(Row<N>* strip, int rows, int64_t first, const ConvModuleInputs& in,
                                           int64_t b, Place<N> at) {
  const ConvModuleShape& n = in.shape;
  Row<N> bias_a = {}, bias_s = {};
  if (biased) {
    auto bias = static_cast<const X*>(in.projection_bias);
    bias_a = values_of<N>(bias, at);
    bias_s = values_of<N>(bias + n.channels, at);
  }
  int64_t from = strided(n, b, first + at.warp, at.channel);
  Frames<X> a(in.a, from, n.frame_stride), s(in.s, from, n.frame_stride);
  Row<N>* to = strip + at.warp * lanes + at.lane;
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += lanes * warps) {
    // Lane i looks at row i of the warp's next 32.
    int64_t row = begin + at.warp + at.lane * warps;
    unsigned present = __ballot_sync(0xffffffffu, heard(in.padding, n.frames, b, first + row));
    if (!at.inside) present = 0;
#pragma unroll 1
    for (int i = begin; i < rows && i < begin + lanes * warps; i += 2 * warps) {
      bool is[2];
      Bits<X, N> bits_a[2], bits_s[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        is[j] = present >> j & 1;
        bits_a[j] = load_bits<N>(a.at(j * warps), is[j]);
        bits_s[j] = load_bits<N>(s.at(j * warps), is[j]);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Row<N> x = widened<X, N>(bits_a[j]), gate = widened<X, N>(bits_s[j]);
#pragma unroll
        for (int c = 0; c < N; ++c) {
          if (biased) {
            x.of[c] += is[j] ? bias_a.of[c] : 0.0f;
            gate.of[c] += bias_s.of[c];
          }
          x.of[c] *= open(gate.of[c]);
        }
        to[j * warps * lanes] = x;
      }
      present >>= 2;
      a.advance(2 * warps);
      s.advance(2 * warps);
      to += 2 * warps * lanes;
    }
  }
}

// What a launch writes: y, SwooshR(y), or both.
enum class Results { y, activated, both };

// In inference, where y is not written, the projection may have a bias.
template <class X, class Y, int N, bool chunked, Results results>
__global__ void __launch_bounds__(warps* lanes, 3) forward(ConvModuleInputs in, Y* y, Y* activated) {
  const ConvModuleShape& n = in.shape;
  Place<N> at(n, blockIdx.y);
  Tile here(n, blockIdx.x, tile);
  int kernel = int(n.kernel), half = kernel / 2, rows = strip_rows(kernel, chunked);
  Row<N>* x = dynamic_shared<Row<N>>();
  Row<N>* weight = x + rows * lanes;
  Row<N>* causal = weight + padded(kernel) * tap_row;
  fill_taps<N>(weight, in.weight, kernel, n.channels, false, at, blockIdx.y);
  if (chunked) fill_taps<N>(causal, in.causal_weight, half + 1, n.channels, false, at, blockIdx.y);
  if (results == Results::activated && in.projection_bias) {
    fill_gated<X, true, N>(x, rows, here.t0 - half, in, here.b, at);
  } else {
    fill_gated<X, false, N>(x, rows, here.t0 - half, in, here.b, at);
  }
  Row<N> bias = values_of<N>(static_cast<const float*>(in.bias), at);
  __syncthreads();

#pragma unroll 1
  for (int g = 0; g < groups; ++g) {
    int first = (at.warp * groups + g) * group;
    const Row<N>* mine = x + first * lanes + at.lane;
    int64_t t = here.t0 + first;
    Row<N> sums[group];
#pragma unroll
    for (int i = 0; i < group; ++i) sums[i] = bias;
    if constexpr (chunked) {
      convolve_inside<N>(mine, weight + at.lane, kernel, half, Positions<group>(n, t), sums);
      Row<N> causal_bias = values_of<N>(static_cast<const float*>(in.causal_bias), at);
#pragma unroll
      for (int i = 0; i < group; ++i) {
#pragma unroll
        for (int c = 0; c < N; ++c) {
          bool present = at.inside && t + i < n.frames;
          float factor = present ? factor_of(in, t + i, at.channel + c) : 0.0f;
          sums[i].of[c] = causal_bias.of[c] + sums[i].of[c] * factor;
        }
      }
      convolve<N>(mine, causal + at.lane, half + 1, sums);
    } else {
      convolve<N>(mine, weight + at.lane, kernel, sums);
    }
    int64_t to = dense(n, here.b, t, at.channel), step = n.batch * n.channels;
    int present = at.inside ? int(n.frames - t < group ? n.frames - t : group) : 0;
    Frames<Y> frames_of_y(y, to, step), frames_of_a(activated, to, step);
#pragma unroll
    for (int i = 0; i < group; ++i) {
      if (results != Results::activated && i < present) store_row<N>(frames_of_y.to(i), sums[i]);
      if constexpr (results != Results::y) {
#pragma unroll
        for (int c = 0; c < N; ++c) sums[i].of[c] = SwooshRAt<Y>(sums[i].of[c]).value();
        if (i < present) store_row<N>(frames_of_a.to(i), sums[i]);
      }
    }
  }
}

template <int N>
size_t shared_bytes(const ConvModuleInputs& in) {
  int kernel = int(in.shape.kernel), taps = padded(kernel) + (in.chunked() ? padded(kernel / 2 + 1) : 0);
  return size_t(strip_rows(kernel, in.chunked()) * lanes + taps * tap_row) * sizeof(Row<N>);
}

}  // namespace

void conv_module_forward_cuda(const ConvModuleActivated& args, void* stream) {
  const ConvModuleInputs& inputs = args;
  const ConvModuleShape& n = args.shape;
  int64_t tiles = n.batch * ceil_div(n.frames, tile);
  with_types(args, [&](auto x, auto zero) {
    using X = decltype(x);
    using Y = decltype(zero);
    auto run = [&](auto kernel, int wide, size_t bytes) {
      launch("conv_module forward", kernel, grid(n, tiles, wide), warps * lanes, bytes, stream, inputs,
             static_cast<Y*>(args.y), static_cast<Y*>(args.activated));
    };
    auto run_for = [&](auto results) {
      constexpr Results which = decltype(results)::value;
      if (args.chunked()) return run(forward<X, Y, 1, true, which>, 1, shared_bytes<1>(args));
      if constexpr (sizeof(X) == 2 && std::is_same_v<X, Y>) {
        bool pairs = in_pairs<X, Y>(args, {args.y, args.activated});
        if (pairs && shared_bytes<2>(args) <= most_shared) {
          return run(forward<X, Y, 2, false, which>, 2, shared_bytes<2>(args));
        }
      }
      run(forward<X, Y, 1, false, which>, 1, shared_bytes<1>(args));
    };
    if (!args.y) return run_for(std::integral_constant<Results, Results::activated>{});
    if (!args.activated) return run_for(std::integral_constant<Results, Results::y>{});
    run_for(std::integral_constant<Results, Results::both>{});
  });
}

}  // namespace zk
