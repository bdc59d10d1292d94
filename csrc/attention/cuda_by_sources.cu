// Attention on the GPU: dk = dS^T q, the gradient of the keys, of all uses at once. A block has sources, and goes over
// the targets; see cuda_sources.h. With V and G the values and gradients of all uses, channels side by side:
// dS = W (G V^T - delta), zero where masked, and what the penalty adds. More than 32 channels come in blocks; see
// cuda_channels.h.
#include "attention/cuda_channels.h"
#include "attention/cuda_sources.h"

namespace zk {

namespace {

template <class T, bool wide>
struct Layout {
  static constexpr int MT = wide || sizeof(T) == 4 ? 1 : 2;
  using Stage = TargetStage<T, MT>;
  static constexpr int stage = Stage::bytes + (wide ? 0 : Tile<T, 32>::template bytes<attention_step>);
  static constexpr int ranges = 2 * stage, channels = ranges + Stage::sources * int(sizeof(FrameRange));
  static constexpr int bytes = channels + (wide ? ChannelBlocks<T>::bytes : 0);
};

template <class T, bool wide>
__global__ void __launch_bounds__(attention_threads, wide && sizeof(T) == 2 ? 3 : 2)
    by_sources(const AttentionScoresGradients args, int blocks) {
  using Memory = Layout<T, wide>;
  using Stage = typename Memory::Stage;
  constexpr int MT = Memory::MT;
  const AttentionWeights& w = args.weights;
  const int targets = int(w.targets), sources = int(w.sources), sequences = int(w.sequences);
  const int block = int(blockIdx.x % blocks), item = int(blockIdx.x / blocks), b = item % sequences,
            h = item / sequences;
  const int warp = threadIdx.x / 32, lane = lane_of_warp(), t = lane % 4;
  const int first_source = block * Stage::sources, own = first_source + 16 * MT * warp;

  unsigned char* memory = dynamic_shared<unsigned char>();
  auto stage_of = [&](int n) { return Stage{reinterpret_cast<T*>(memory + n % 2 * Memory::stage)}; };
  auto grads_of = [&](int n) { return reinterpret_cast<T*>(memory + n % 2 * Memory::stage + Stage::bytes); };

  auto* ranges = reinterpret_cast<FrameRange*>(memory + Memory::ranges);
  const SourceMasks<MT> masks(w, b, first_source, ranges);
  const bool seen = any_of_block(int(threadIdx.x) < Stage::sources && ranges[threadIdx.x].end > 0,
                                 reinterpret_cast<unsigned*>(memory));

  // Where a target does not see a source, only the penalty adds to the gradient.
  int begin = 0, end = targets;
  if (args.penalty == 0.0f) {
    int last = first_source + Stage::sources < sources ? first_source + Stage::sources : sources;
    begin = seeing(w, first_source).begin / attention_step * attention_step;
    end = seen ? seeing(w, last - 1).end : begin;
  }
  const int steps = end > begin ? (end - begin + attention_step - 1) / attention_step : 0;

  const AttentionChannels& uses = args.uses;
  auto values = ChannelRows<T>::of(uses.v, uses.values, sources, args, b, h);
  auto grads = ChannelRows<T>::of(uses.grad, uses.grads, targets, args, b, h);
  TargetLoader<T, MT, true> loader(w, static_cast<const float*>(uses.delta), b, h, first_source, begin);
  TileLoader<T, 32, 8, int> grads_loader(grads.packed + int64_t(begin) * grads.packed_channels, grads.packed_channels,
                                         grads.packed_channels);
  ChannelBlocks<T> channel_blocks(reinterpret_cast<T*>(memory + Memory::channels), values, first_source, sources, grads,
                                  begin, targets, steps);
  for (int n = 0; n < 2; ++n) loader.clear(stage_of(n));
  __syncthreads();
  auto load = [&](int n) {
    loader.load(stage_of(n));
    if constexpr (!wide) grads_loader.load(grads_of(n), targets - (begin + n * attention_step));
  };
  if (steps > 0) {
    load(0);
    if constexpr (wide) channel_blocks.load();
    commit_copies();
    loader.finish(stage_of(0));
  }

  SourceScores<T, MT> scores(w, b, h, own);
  [[maybe_unused]] const int eight = first_eight<T>();
  Pair<T> own_values[MT][2][4];
  if constexpr (!wide) {
    load_operands<T, 32, MT>(own_values, values.packed, values.packed_channels, own, sources, values.packed_channels);
  }

  float acc[MT][score_channels / 8][4] = {};
  for (int n = 0; n < steps; ++n) {
    float dw_all[wide ? 4 : 1][MT][2][4] = {};
    if constexpr (wide) {
      channel_blocks.multiply(dw_all, 16 * warp, [&] {
        if (n + 1 < steps) load(n + 1);
      });
    } else {
      wait_for_copies<0>();
      __syncthreads();
      if (n + 1 < steps) {
        load(n + 1);
        commit_copies();
      }
    }
    const Stage stage = stage_of(n);
    const int first = begin + n * attention_step;
    // Rows of padded sources come to nothing in the end, unless there is a penalty.
    const bool free = args.penalty == 0.0f && masks.all_see(w, first);
    if (n == 0) scores.begin(stage);
#pragma unroll(wide ? 4 : unrolled<T>)
    for (int y = 0; y < attention_step / 16; ++y) {
      float s[MT][2][4], dw[MT][2][4];
      scores.pair(stage, y, s);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float negative = stage.deltas()[16 * y + 8 * half + 2 * t + i % 2];
#pragma unroll
          for (int m = 0; m < MT; ++m) dw[m][half][i] = wide ? dw_all[wide ? y : 0][m][half][i] + negative : negative;
        }
      }
      if constexpr (!wide) multiply<MT, T>(grads_of(n), eight, own_values, y, dw);
      Pair<T> a[MT][4];
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
          for (int i = 0; i < 4; ++i) dw[m][half][i] *= shifts[i % 2].weight(s[m][half][i]);
        }
      }
      if (!free) {
        unsigned hidden = masks.hidden(w, b, first + 16 * y);
#pragma unroll
        for (int n = 0; n < 8 * MT; ++n) {
          float& sum = dw[n / 8][n / 4 % 2][n % 4];
          if (hidden >> n & 1) sum = 0.0f;
          if (args.penalty != 0.0f) sum += penalty_of(s[n / 8][n / 4 % 2][n % 4], args.penalty, args.limit);
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) to_operand<T>(dw[m], a[m]);
      multiply_rows<T, score_channels, score_channels / 8, MT>(stage.query_tile(), a, y, acc);
    }
    if (n + 1 < steps) loader.finish(stage_of(n + 1));
  }

  if (args.penalty == 0.0f && masks.any_empty) {
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
#pragma unroll
      for (int c = 0; c < score_channels / 8; ++c) {
        if (masks.empty(8 * r + lane / 4)) acc[r / 2][c][r % 2 * 2] = acc[r / 2][c][r % 2 * 2 + 1] = 0.0f;
      }
    }
  }
  store_rows<T, MT, score_channels / 8>(head_to<T>(args.dk, b, h), args.dk.frame, own, sources, int(w.query_channels),
                                        acc);
}

template <class T, bool wide>
void run(const AttentionScoresGradients& args, void* stream) {
  using Memory = Layout<T, wide>;
  const AttentionWeights& w = args.weights;
  int64_t blocks = ceil_div(w.sources, Memory::Stage::sources);
  launch("attention_by_sources", by_sources<T, wide>, dim3(grid_size(blocks * w.sequences * w.heads)),
         dim3(attention_threads), Memory::bytes, stream, args, int(blocks));
}

}  // namespace

void attention_by_sources_cuda(const AttentionScoresGradients& given, void* stream) {
  AttentionScoresGradients args = given;
  args.weights = for_kernels(given.weights);
  dispatch_attention(args.weights, [&](auto element) {
    using T = decltype(element);
    if (args.uses.channels > 0 || args.uses.packed > 32) return run<T, true>(args, stream);
    run<T, false>(args, stream);
  });
}

}  // namespace zk
