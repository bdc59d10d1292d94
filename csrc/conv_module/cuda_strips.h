// Device code that the convolution module's kernels share. A block takes tiles of frames of one sequence and 32 lanes
// of N channels. Strips of frames lie in shared memory, a row of N floats for each lane, with the frames that the
// kernel reaches on either side. A warp sums neighbouring results in registers.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/vectors.h"
#include "conv_module/conv_module.h"
#include "conv_module/math.h"
#include "swoosh/math.h"

namespace zk {

namespace {

constexpr int lanes = 32;
constexpr int warps = 8;
constexpr int group = 12;                  // neighbouring results of a warp
constexpr int tap_group = 16;              // taps that it takes at a time
constexpr int tap_row = lanes + 1;         // of taps in shared memory: so they are written there without bank conflicts
constexpr size_t most_shared = 99 * 1024;  // bytes of shared memory that a block has on every GPU

// N channels of a lane.
template <int N>
struct alignas(4 * N) Row {
  float of[N];
};

// Taps, padded with zeros to whole groups.
ZK_HD int padded(int taps) { return (taps + tap_group - 1) / tap_group * tap_group; }

// Where a thread stands: its N channels begin with `channel`.
template <int N>
struct Place {
  int lane, warp, channel;
  bool inside;  // whether the lane has channels

  __device__ Place(const ConvModuleShape& n, unsigned block)
      : lane(int(threadIdx.x) % lanes),
        warp(int(threadIdx.x) / lanes),
        channel((int(block) * lanes + lane) * N),
        inside(channel < n.channels) {}
};

// Frames t0 .. t0 + frames - 1 of sequence b: tile i of all.
struct Tile {
  int64_t b, t0;

  __device__ Tile(const ConvModuleShape& n, unsigned i, int frames) {
    unsigned across = (unsigned(n.frames) + frames - 1) / frames;
    b = i / across;
    t0 = int64_t(i % across) * frames;
  }
};

__device__ __forceinline__ int64_t dense(const ConvModuleShape& n, int64_t b, int64_t t, int channel) {
  return (t * n.batch + b) * n.channels + channel;
}

__device__ __forceinline__ int64_t strided(const ConvModuleShape& n, int64_t b, int64_t t, int channel) {
  return t * n.frame_stride + b * n.batch_stride + channel;
}

// Where a lane's channels of the next frames lie: a frame is fewer than 2^32 bytes, so one instruction finds each.
template <class T>
struct Frames {
  const char* first;
  uint32_t step;  // bytes

  __device__ Frames(const void* tensor, int64_t from, int64_t step)
      : first(reinterpret_cast<const char*>(static_cast<const T*>(tensor) + from)), step(uint32_t(step * sizeof(T))) {}

  __device__ __forceinline__ const T* at(unsigned i) const {
#if defined(__CUDA_ARCH__)
    uint64_t offset;  // nvcc would take it apart, and multiply in 64 bits
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(offset) : "r"(step), "r"(i));
#else
    uint64_t offset = uint64_t(step) * i;
#endif
    return reinterpret_cast<const T*>(first + offset);
  }
  __device__ __forceinline__ T* to(unsigned i) const { return const_cast<T*>(at(i)); }
  __device__ __forceinline__ void advance(unsigned frames) { first = reinterpret_cast<const char*>(at(frames)); }
};

// Whether frame t of sequence b is one, and no padding where `padding` is given.
__device__ __forceinline__ bool heard(const uint8_t* padding, int64_t frames, int64_t b, int64_t t) {
  return t >= 0 && t < frames && !(padding && padding[b * frames + t]);
}

// N channels of memory as they stand there: by one access, and taken apart as one number.
template <class T, int N>
using Bits = std::conditional_t<sizeof(T) * N == 4, uint32_t, uint16_t>;

template <int N, class T>
__device__ __forceinline__ Bits<T, N> load_bits(const T* from, bool present) {
  Bits<T, N> bits = 0;
  if (present) bits = *reinterpret_cast<const Bits<T, N>*>(from);
  return bits;
}

// Conversions of two halves at once.
template <class T>
__device__ __forceinline__ Row<2> widen_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return {bit_cast<float>(bits << 16), bit_cast<float>(bits & 0xffff0000u)};
  } else {
    return {widen(T{uint16_t(bits)}), widen(T{uint16_t(bits >> 16)})};
  }
}

template <class T>
__device__ __forceinline__ uint32_t narrow_pair(const Row<2>& row) {
#if defined(__CUDACC__)
  uint32_t bits;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(row.of[1]), "f"(row.of[0]));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(row.of[1]), "f"(row.of[0]));
  }
  return bits;
#else
  return narrow<T>(row.of[0]).bits | uint32_t(narrow<T>(row.of[1]).bits) << 16;
#endif
}

template <class T, int N>
__device__ __forceinline__ Row<N> widened(Bits<T, N> bits) {
  if constexpr (N == 2) {
    return widen_pair<T>(bits);
  } else {
    return {widen(bit_cast<T>(bits))};
  }
}

// N channels from memory, zeros unless `present`.
template <int N, class T>
__device__ __forceinline__ Row<N> load_row(const T* from, bool present) {
  return widened<T, N>(load_bits<N>(from, present));
}

template <int N, class T>
__device__ __forceinline__ void store_row(T* to, const Row<N>& row) {
  if constexpr (N == 2) {
    *reinterpret_cast<uint32_t*>(to) = narrow_pair<T>(row);
  } else {
    *to = narrow<T>(row.of[0]);
  }
}

// Fills rows of `to` with the taps of the block's channels of a parameter (channels, taps), backwards in time if
// `flipped`; zeros up to whole groups.
template <int N>
__device__ __forceinline__ void fill_taps(Row<N>* to, const void* from, int taps, int64_t channels, bool flipped,
                                          Place<N> at, unsigned block) {
  constexpr int wide = lanes * N;
  auto values = static_cast<const float*>(from) + (int64_t(block) * wide + at.warp) * taps;
  int left = int(channels - int64_t(block) * wide) - at.warp;
#pragma unroll 1
  for (int k = at.lane; k < padded(taps); k += lanes) {
    const float* value = values + (flipped ? taps - 1 - k : k);
    float* room = reinterpret_cast<float*>(to + k * tap_row) + at.warp;
#pragma unroll
    for (int c = 0; c < wide; c += warps) {
      room[c] = k < taps && c < left ? *value : 0.0f;
      value += warps * taps;
    }
  }
}

// A parameter's values of the lane's channels; zeros without one.
template <int N, class T>
__device__ __forceinline__ Row<N> values_of(const T* parameter, Place<N> at) {
  Row<N> values = {};
#pragma unroll
  for (int c = 0; c < N; ++c) {
    if (parameter && at.inside) values.of[c] = widen(parameter[at.channel + c]);
  }
  return values;
}

// sums[i] += sum_j factors[j] rows[i + j]; rows of `factors` are `step` lanes apart.
template <int factors_count, int step, int sums_count, int N>
__device__ __forceinline__ void correlate(const Row<N>* rows, const Row<N>* factors, Row<N> (&sums)[sums_count]) {
  Row<N> held[sums_count + factors_count - 1];
#pragma unroll
  for (int i = 0; i < sums_count + factors_count - 1; ++i) held[i] = rows[i * lanes];
#pragma unroll
  for (int j = 0; j < factors_count; ++j) {
    Row<N> factor = factors[j * step];
#pragma unroll
    for (int i = 0; i < sums_count; ++i) {
#pragma unroll
      for (int c = 0; c < N; ++c) sums[i].of[c] += factor.of[c] * held[i + j].of[c];
    }
  }
}

// sums[i] += sum_k taps[k] rows[i + k] over all taps.
template <int N>
__device__ __forceinline__ void convolve(const Row<N>* rows, const Row<N>* taps, int count, Row<N> (&sums)[group]) {
#pragma unroll 1
  for (int k = 0; k < count; k += tap_group) correlate<tap_group, tap_row>(rows + k * lanes, taps + k * tap_row, sums);
}

// sigmoid(s): as `sigmoid` of common/math.h, whose exponential must not pass 1 on the host. Where it overflows here,
// its reciprocal is 0, and that is the result.
__device__ __forceinline__ float open(float s) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(s * -1.44269504f));
  return ratio(1.0f, 1.0f + power);
#else
  return sigmoid(s);
#endif
}

// SwooshR and its derivative from one exponential. For half precision the logarithm is the hardware's, which has an
// absolute error of 1.7e-7.
template <class Y>
struct SwooshRAt {
  using Kind = Swoosh<SwooshKind::r, float>;
  float x, u, z;

  __device__ explicit SwooshRAt(float x) : x(x), u(x - Kind::shift), z(exp_nonpositive(-magnitude(u))) {}

  __device__ __forceinline__ float value() const {
    return (u > 0.0f ? u : 0.0f) + logarithm() - (Kind::slope * x + Kind::offset);
  }
  __device__ __forceinline__ float derivative() const { return ratio(u > 0.0f ? 1.0f : z, 1.0f + z) - Kind::slope; }

 private:
  __device__ __forceinline__ float logarithm() const {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Y) == 2) {
      float log2;
      asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(1.0f + z));
      return 0.693147181f * log2;
    }
#endif
    return log1p_unit(z);
  }
};

// ---- launching ----

// Whether a lane may have two channels: of half precision, and all rows begin with a whole pair.
template <class X, class Y>
bool in_pairs(const ConvModuleInputs& in, std::initializer_list<const void*> others) {
  const ConvModuleShape& n = in.shape;
  bool even = n.channels % 2 == 0 && n.frame_stride % 2 == 0 && n.batch_stride % 2 == 0;
  auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 4 == 0; };
  even = even && aligned(in.a) && aligned(in.s);
  for (const void* x : others) even = even && aligned(x);
  return sizeof(X) == 2 && std::is_same_v<X, Y> && !in.chunked() && even;
}

// Calls f with zeros of the element types.
template <class F>
void with_types(const ConvModuleInputs& in, F f) {
  dispatch_conv_module([](DType dtype, auto&& g) { dispatch_gpu(dtype, g); }, in.x_dtype, in.y_dtype, f);
}

// Blocks of tiles, and of channels.
dim3 grid(const ConvModuleShape& n, int64_t blocks, int channels_of_a_lane) {
  if (n.frames > 0x7fffffff - lanes * warps) throw std::runtime_error("conv_module: more frames than 32 bits count");
  constexpr int64_t most = 0x7fffffff / int64_t(sizeof(float));
  if (n.frame_stride > most || n.batch * n.channels * 2 > most) {
    throw std::runtime_error("conv_module: more elements in a frame of all sequences than 32 bits address");
  }
  return dim3(grid_size(blocks), unsigned(ceil_div(n.channels, lanes * channels_of_a_lane)));
}

}  // namespace

}  // namespace zk
