// Attention on the GPU: dv = W^T g, the gradient of the values of one use, weights computed again from their softmax
// rows. A block has sources, and goes over the targets; see cuda_sources.h. Wide values are taken in blocks of
// channels, and each computes the weights again.
#include "attention/cuda_sources.h"

namespace zk {

namespace {

// N eights of channels; a block of four warps, each of 16 MT sources.
template <class T, int MT, int N>
__global__ void __launch_bounds__(attention_threads, N == 2 && sizeof(T) == 2 ? 3 : 2)
    values_gradient(const AttentionValuesGradient args, int blocks) {
  using Stage = TargetStage<T, MT>;
  constexpr int channels = 8 * N, copied = N == 2 ? 4 : 8;
  constexpr int stage_bytes = Stage::bytes + Tile<T, channels>::template bytes<attention_step>;
  const AttentionWeights& w = args.weights;
  const int targets = int(w.targets), sources = int(w.sources), sequences = int(w.sequences);
  unsigned x = blockIdx.x;
  const int block = int(x % blocks), first_channel = int(blockIdx.y) * channels;
  const int b = int(x / blocks % sequences), h = int(x / blocks / sequences);
  const int warp = threadIdx.x / 32, lane = lane_of_warp(), t = lane % 4;
  const int first_source = block * Stage::sources, own = first_source + 16 * MT * warp;

  unsigned char* memory = dynamic_shared<unsigned char>();
  auto stage_of = [&](int n) { return Stage{reinterpret_cast<T*>(memory + n % 2 * stage_bytes)}; };
  auto grads_of = [&](int n) { return reinterpret_cast<T*>(memory + n % 2 * stage_bytes + Stage::bytes); };

  auto* ranges = reinterpret_cast<FrameRange*>(memory + 2 * stage_bytes);
  const SourceMasks<MT> masks(w, b, first_source, ranges);

  // Targets that see any of the sources; all, if some see nothing and so count all sources alike.
  int begin = 0, end = targets;
  auto* votes = reinterpret_cast<unsigned*>(memory);
  const bool seen = any_of_block(int(threadIdx.x) < Stage::sources && ranges[threadIdx.x].end > 0, votes);
  if (w.chunk > 0 || !seen) {
    auto* rows = static_cast<const SoftmaxRow<float>*>(w.softmax) + (h * int64_t(sequences) + b) * targets;
    bool blind = false;
    for (int i = threadIdx.x; i < targets; i += attention_threads) blind |= !(rows[i].largest > visible_limit<float>);
    if (!any_of_block(blind, votes)) {
      int last = first_source + Stage::sources < sources ? first_source + Stage::sources : sources;
      begin = seeing(w, first_source).begin / attention_step * attention_step;
      end = seen ? seeing(w, last - 1).end : begin;
    }
  }

  TargetLoader<T, MT, false> loader(w, nullptr, b, h, first_source, begin);
  TileLoader<T, channels, copied> grads(head_of<T>(args.grad, b, h) + begin * args.grad.frame + first_channel,
                                        args.grad.frame, int(args.channels) - first_channel);
  for (int n = 0; n < 2; ++n) loader.clear(stage_of(n));
  __syncthreads();

  SourceScores<T, MT> scores(w, b, h, own);
  float acc[MT][N][4] = {};
  const int steps = (end - begin + attention_step - 1) / attention_step;
  auto load = [&](int n) {
    loader.load(stage_of(n));
    grads.load(grads_of(n), targets - (begin + n * attention_step));
    commit_copies();
  };
  if (steps > 0) {
    load(0);
    loader.finish(stage_of(0));
  }
  for (int n = 0; n < steps; ++n) {
    wait_for_copies<0>();
    __syncthreads();
    if (n + 1 < steps) load(n + 1);
    const Stage stage = stage_of(n);
    const T* grad_tile = grads_of(n);
    const int first = begin + n * attention_step;
    const bool free = !masks.any_empty && masks.all_see(w, first);
    if (n == 0) scores.begin(stage);
#pragma unroll(N == 24 ? 2 : unrolled<T>)
    for (int y = 0; y < attention_step / 16; ++y) {
      float s[MT][2][4];
      scores.pair(stage, y, s);
      Pair<T> a[MT][4];
      if (!free) {
        unsigned hidden = masks.hidden(w, b, first + 16 * y);
#pragma unroll
        for (int n = 0; n < 8 * MT; ++n) {
          if (hidden >> n & 1) s[n / 8][n / 4 % 2][n % 4] = masked_score<float>;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Shift<T> shifts[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int target = 16 * y + 8 * half + 2 * t + i;
          shifts[i] = {stage.shifts()[target], sizeof(T) == 4 ? stage.scales()[target] : 1.0f};
        }
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][half][i] = shifts[i % 2].weight(s[m][half][i]);
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) to_operand<T>(s[m], a[m]);
      multiply_rows<T, channels, N, MT>(grad_tile, a, y, acc);
    }
    if (n + 1 < steps) loader.finish(stage_of(n + 1));
  }

  T* dv = head_to<T>(args.dv, b, h) + first_channel;
  store_rows<T, MT, N>(dv, args.dv.frame, own, sources, int(args.channels) - first_channel, acc);
}

template <class T, int MT, int N>
void run(const AttentionValuesGradient& args, void* stream) {
  using Stage = TargetStage<T, MT>;
  const AttentionWeights& w = args.weights;
  int64_t blocks = ceil_div(w.sources, Stage::sources), parts = ceil_div(args.channels, 8 * N);
  dim3 grid(grid_size(blocks * w.sequences * w.heads), unsigned(parts));
  size_t bytes =
      2 * (Stage::bytes + Tile<T, 8 * N>::template bytes<attention_step>)+Stage::sources * sizeof(FrameRange);
  launch("attention_values_gradient", values_gradient<T, MT, N>, grid, dim3(attention_threads), bytes, stream, args,
         int(blocks));
}

}  // namespace

void attention_values_gradient_cuda(const AttentionValuesGradient& given, void* stream) {
  AttentionValuesGradient args = given;
  args.weights = for_kernels(given.weights);
  dispatch_attention(args.weights, [&](auto element) {
    using T = decltype(element);
    constexpr int half = sizeof(T) == 2;
    if (args.channels <= 16) return run<T, half ? 2 : 1, 2>(args, stream);
    if constexpr (half) {
      if (ceil_div(args.channels, 144) * 18 <= ceil_div(args.channels, 192) * 24) {
        return run<T, 1, 18>(args, stream);
      }
      return run<T, 1, 24>(args, stream);
    } else {
      return run<T, 1, 8>(args, stream);
    }
  });
}

}  // namespace zk
