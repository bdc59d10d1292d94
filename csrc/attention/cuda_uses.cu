// Attention on the GPU: what lies before and behind the gradients of scores. Values and gradients of uses side by side,
// and delta, the sum over uses and channels of grad out; sums over sequences of what targets add to de.
#include "attention/attention.h"
#include "common/launch.h"
#include "common/reduce.h"

namespace zk {

namespace {

constexpr int warps = 8;

template <class T>
__device__ __forceinline__ const T* row_of(const AttentionRows& x, int64_t frame, int64_t sequence, int64_t head) {
  return static_cast<const T*>(x.data) + frame * x.frame + sequence * x.sequence + head * x.head;
}

// A warp has a target or a source of a sequence and head.
template <class T>
__global__ void __launch_bounds__(warps * 32) pack_kernel(const AttentionPack n) {
  const int64_t pairs = n.heads * n.sequences;
  int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (row >= pairs * (n.targets + n.sources)) return;
  const bool target = row < pairs * n.targets;
  if (!target) row -= pairs * n.targets;
  const int64_t frames = target ? n.targets : n.sources, pair = row / frames, frame = row % frames;
  const int64_t b = pair % n.sequences, h = pair / n.sequences;
  const T* from = row_of<T>(target ? n.use.grad : n.use.v, frame, b, h);
  const T* out = row_of<T>(n.use.out, frame, b, h);
  T* to = static_cast<T*>(target ? n.grads : n.values) + row * n.width + n.first;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x % 32; c < n.end - n.first; c += 32) {
    bool own = c < n.use.channels;
    T x = own ? from[c] : narrow<T>(0.0f);
    to[c] = x;
    if (target && own) sum += widen(x) * widen(out[c]);
  }
  if (!target) return;
  sum = warp_sum(sum);
  float* delta = static_cast<float*>(n.delta) + row;
  if (threadIdx.x % 32 == 0) *delta = n.add ? *delta + sum : sum;
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
  int64_t rows = args.heads * args.sequences * (args.targets + args.sources);
  dispatch_gpu(args.dtype, [&](auto element) {
    launch("attention_pack", pack_kernel<decltype(element)>, dim3(grid_size(ceil_div(rows, warps))), dim3(warps * 32),
           0, stream, args);
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
