// Attention on the GPU: what lies before and behind the gradients of scores. Values and gradients of uses side by side,
// and delta, the sum over uses and channels of grad out; sums over sequences of what targets add to de.
#include "attention/attention.h"
#include "common/launch.h"
#include "common/vectors.h"

namespace zk {

namespace {

constexpr int pack_threads = 256, lanes = 8, turns = 4, pack_rows = turns * pack_threads / lanes;

// Blocks of rows of a sequence and head: first those of targets, then those of sources.
__host__ __device__ __forceinline__ unsigned blocks_of(int64_t frames) {
  return unsigned((frames + pack_rows - 1) / pack_rows);
}

// Eight lanes have a target or a source of a sequence and head, N channels at a time.
template <class T, int N>
__global__ void __launch_bounds__(pack_threads) pack_kernel(const AttentionPack n) {
  const unsigned of_targets = blocks_of(n.targets), blocks = of_targets + blocks_of(n.sources);
  const unsigned pair = blockIdx.x / blocks, block = blockIdx.x % blocks, sequences = unsigned(n.sequences);
  const int64_t b = pair % sequences, h = pair / sequences;
  const bool target = block < of_targets;
  const int64_t frames = target ? n.targets : n.sources, first = (target ? block : block - of_targets) * pack_rows;
  const AttentionRows& rows = target ? n.use.grad : n.use.v;
  const T* from = static_cast<const T*>(rows.data) + b * rows.sequence + h * rows.head;
  const T* out = static_cast<const T*>(n.use.out.data) + b * n.use.out.sequence + h * n.use.out.head;
  T* to = static_cast<T*>(target ? n.grads : n.values) + pair * frames * n.width + n.first;
  float* delta = static_cast<float*>(n.delta) + pair * frames;
  const int width = int(n.end - n.first), channels = int(n.use.channels), lane = threadIdx.x % lanes;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int64_t frame = first + turn * (pack_threads / lanes) + threadIdx.x / lanes;
    float sum = 0.0f;
    if (frame < frames) {
      const T *row = from + frame * rows.frame, *result = out + frame * n.use.out.frame;
      T* packed = to + frame * n.width;
#pragma unroll 1
      for (int c = lane * N; c < width; c += lanes * N) {
        Pack<T, N> x{};
        if (c < channels) x = *reinterpret_cast<const Pack<T, N>*>(row + c);
        store_pack(packed + c, x);
        if (!target || c >= channels) continue;
        auto y = *reinterpret_cast<const Pack<T, N>*>(result + c);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += widen(x.element[i]) * widen(y.element[i]);
      }
    }
    if (!target) continue;
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (frame < frames && lane == 0) delta[frame] = n.add ? delta[frame] + sum : sum;
  }
}

constexpr int columns = 64, groups = 8;

// A block has 16 offsets of a head, 4 channels each, and eight groups of threads that share the parts.
template <class T>
__global__ void __launch_bounds__(columns* groups) offsets_kernel(const AttentionOffsets n) {
  __shared__ float shared[groups][columns];
  const int column = threadIdx.x % columns, group = threadIdx.x / columns, c = column % 4;
  const int64_t blocks = (n.projections + columns / 4 - 1) / (columns / 4);
  const int64_t h = blockIdx.x / blocks, offset = blockIdx.x % blocks * (columns / 4) + column / 4;
  float sum = 0.0f;
  if (offset < n.projections) {
    // Row 64 is that of offset 0; what even targets add lies one row later, in the first four columns.
    const float* from = static_cast<const float*>(n.offsets) + (h * n.parts * n.offset_rows + offset + 64) * 8;
    for (int64_t part = group; part < n.parts; part += groups) {
      const float* row = from + part * n.offset_rows * 8;
      sum += row[8 + c] + row[4 + c];
    }
  }
  shared[group][column] = sum;
  __syncthreads();
  if (group != 0 || offset >= n.projections) return;
  for (int g = 1; g < groups; ++g) sum += shared[g][column];
  static_cast<T*>(n.de.data)[offset * n.de.frame + h * n.de.head + c] = narrow<T>(sum);
}

}  // namespace

void attention_pack_cuda(const AttentionPack& args, void* stream) {
  int64_t blocks = args.heads * args.sequences * (blocks_of(args.targets) + int64_t(blocks_of(args.sources)));
  dispatch_gpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    bool by_four = (args.use.channels | args.first | args.end) % 4 == 0;
    for (const AttentionRows* rows : {&args.use.v, &args.use.out, &args.use.grad}) {
      by_four = by_four && reinterpret_cast<uintptr_t>(rows->data) % (4 * sizeof(T)) == 0;
      by_four = by_four && (rows->frame | rows->sequence | rows->head) % 4 == 0;
    }
    auto kernel = by_four ? pack_kernel<T, 4> : pack_kernel<T, 1>;
    launch("attention_pack", kernel, dim3(grid_size(blocks)), dim3(pack_threads), 0, stream, args);
  });
}

void attention_offsets_cuda(const AttentionOffsets& args, void* stream) {
  int64_t blocks = ceil_div(args.projections, columns / 4) * args.heads;
  dispatch_gpu(args.dtype, [&](auto element) {
    launch("attention_offsets", offsets_kernel<decltype(element)>, dim3(grid_size(blocks)), dim3(columns * groups), 0,
           stream, args);
  });
}

}  // namespace zk
