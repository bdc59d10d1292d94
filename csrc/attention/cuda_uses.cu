// Attention on the GPU: what lies before and behind the gradients of scores. Values and gradients of uses side by side,
// and delta, the sum over uses and channels of grad out; sums over sequences of what targets add to de.
#include <algorithm>

#include "attention/cuda_parts.h"
#include "common/launch.h"
#include "common/vectors.h"

namespace zk {

namespace {

constexpr int pack_threads = 256, lanes = 4, turns = 8, step = pack_threads / lanes, pack_rows = turns * step;
constexpr int most_uses = 8;  // of a launch

// What a launch packs.
struct Packed {
  AttentionPackedUse uses[most_uses];
  int count;
  void *values, *grads, *delta;
  int64_t targets, sources, sequences, heads, width;
  bool add;  // to delta
};

// Blocks of rows of a sequence and head: first those of targets, then those of sources.
__host__ __device__ __forceinline__ unsigned blocks_of(int64_t frames) {
  return unsigned((frames + pack_rows - 1) / pack_rows);
}

template <class T>
__device__ __forceinline__ const T* row_of_use(const AttentionRows& x, int64_t frame, int64_t b, int64_t head) {
  return static_cast<const T*>(x.data) + frame * x.frame + b * x.sequence + head * x.head;
}

// Four lanes have a target or a source of a sequence and head, N channels at a time.
template <class T, int N>
__global__ void __launch_bounds__(pack_threads) pack_kernel(const Packed n) {
  const unsigned of_targets = blocks_of(n.targets), blocks = of_targets + (n.values ? blocks_of(n.sources) : 0);
  const unsigned pair = blockIdx.x / blocks, block = blockIdx.x % blocks, sequences = unsigned(n.sequences);
  const int64_t b = pair % sequences, h = pair / sequences;
  const bool target = block < of_targets;
  const int64_t frames = target ? n.targets : n.sources, first = (target ? block : block - of_targets) * pack_rows;
  T* packed = static_cast<T*>(target ? n.grads : n.values) + pair * frames * n.width;
  float* delta = static_cast<float*>(n.delta) + pair * frames;
  const int lane = threadIdx.x % lanes;
  const int64_t begin = first + threadIdx.x / lanes;
  float sums[turns] = {};
#pragma unroll 1
  for (int u = 0; u < n.count; ++u) {
    const AttentionPackedUse& own = n.uses[u];
    const AttentionRows& rows = target ? own.use.grad : own.use.v;
    const int head = int(h) - int(own.first_head), width = int(own.end) - int(own.first);
    const int channels = unsigned(head) < unsigned(own.heads) ? int(own.use.channels) : 0;
    const int end = width > 0 ? width : target ? channels : 0;
    const T* row = channels > 0 ? row_of_use<T>(rows, begin, b, head) : nullptr;
    const T* result = channels > 0 && target ? row_of_use<T>(own.use.out, begin, b, head) : nullptr;
    T* to = packed + begin * n.width + own.first;
    const int64_t next_row = step * rows.frame, next_result = step * own.use.out.frame, next = step * n.width;
#pragma unroll 1
    for (int c = lane * N; c < end; c += lanes * N) {
      const T *from = row + c, *beside = result + c;
      T* place = to + c;
#pragma unroll
      for (int turn = 0; turn < turns; ++turn, from += next_row, beside += next_result, place += next) {
        if (begin + turn * step >= frames) break;
        Pack<T, N> x{};
        if (c < channels) x = *reinterpret_cast<const Pack<T, N>*>(from);
        if (width > 0) store_pack(place, x);
        if (!target || c >= channels) continue;
        auto y = *reinterpret_cast<const Pack<T, N>*>(beside);
#pragma unroll
        for (int i = 0; i < N; ++i) sums[turn] += widen(x.element[i]) * widen(y.element[i]);
      }
    }
  }
  if (!target) return;
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    float sum = sums[turn];
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const int64_t frame = begin + turn * step;
    if (frame >= frames || lane != 0) continue;
    if (n.add) sum += delta[frame];
    delta[frame] = sum;
  }
}

constexpr int columns = 64, groups = 8;

// A block has 16 offsets of a head, 4 channels each, and eight groups of threads that share the sequences.
template <class T>
__global__ void __launch_bounds__(columns* groups) offsets_kernel(const AttentionOffsets n) {
  __shared__ float shared[groups][columns];
  const int column = threadIdx.x % columns, group = threadIdx.x / columns, c = column % 4;
  const int64_t projections = n.targets + n.sources - 1, rows = PartOfTargets::rows(n.sources, n.share);
  const int64_t blocks = (projections + columns / 4 - 1) / (columns / 4);
  const int64_t h = blockIdx.x / blocks, offset = blockIdx.x % blocks * (columns / 4) + column / 4;
  float sum = 0.0f;
  if (offset < projections) {
    const int64_t of_part = rows * 8, of_sequence = n.parts * of_part;
    const float* of_group = static_cast<const float*>(n.offsets) + (h * n.sequences + group) * of_sequence + c;
    const int sequences = (int(n.sequences) - group + groups - 1) / groups;
    auto add = [&](const float* from) {
#pragma unroll 4
      for (int b = 0; b < sequences; ++b, from += groups * of_sequence) sum += *from;
    };
#pragma unroll 1
    for (int part = 0; part < int(n.parts); ++part, of_group += of_part) {
      const int64_t row = PartOfTargets(int(n.targets), int(n.share), part).row_of(offset);
      if (row + 1 >= 0 && row + 1 < rows) add(of_group + (row + 1) * 8);
      if (row >= 0 && row < rows) add(of_group + row * 8 + 4);
    }
  }
  shared[group][column] = sum;
  __syncthreads();
  if (group != 0 || offset >= projections) return;
  for (int g = 1; g < groups; ++g) sum += shared[g][column];
  static_cast<T*>(n.de.data)[offset * n.de.frame + h * n.de.head + c] = narrow<T>(sum);
}

// Whether N elements at a time can be read and written.
template <class T, int N>
bool aligned(const Packed& args) {
  bool all = args.width % N == 0;
  for (int u = 0; u < args.count; ++u) {
    const AttentionPackedUse& own = args.uses[u];
    all = all && (own.use.channels | own.first | own.end) % N == 0;
    for (const AttentionRows* rows : {&own.use.v, &own.use.out, &own.use.grad}) {
      all = all && reinterpret_cast<uintptr_t>(rows->data) % (N * sizeof(T)) == 0;
      all = all && (rows->frame | rows->sequence | rows->head) % N == 0;
    }
  }
  return all;
}

}  // namespace

void attention_pack_cuda(const AttentionPack& args, void* stream) {
  Packed packed{{},         0,          args.values, args.grads, args.delta, args.targets, args.sources, args.sequences,
                args.heads, args.width, false};
  int64_t of_pair = blocks_of(args.targets) + (args.values ? int64_t(blocks_of(args.sources)) : 0);
  unsigned blocks = grid_size(args.heads * args.sequences * of_pair);
  dispatch_gpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    for (size_t first = 0; first < args.uses.size(); first += most_uses) {
      packed.count = int(std::min<size_t>(args.uses.size() - first, most_uses));
      std::copy_n(args.uses.begin() + first, packed.count, packed.uses);
      packed.add = first > 0;
      auto kernel = aligned<T, 4>(packed) ? pack_kernel<T, 4> : pack_kernel<T, 1>;
      launch("attention_pack", kernel, dim3(blocks), dim3(pack_threads), 0, stream, packed);
    }
  });
}

void attention_offsets_cuda(const AttentionOffsets& args, void* stream) {
  int64_t blocks = ceil_div(args.targets + args.sources - 1, columns / 4) * args.heads;
  dispatch_gpu(args.dtype, [&](auto element) {
    launch("attention_offsets", offsets_kernel<decltype(element)>, dim3(grid_size(blocks)), dim3(columns * groups), 0,
           stream, args);
  });
}

}  // namespace zk
