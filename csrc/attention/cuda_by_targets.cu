// Attention on the GPU: the gradients of queries, position queries and position projections, of all uses at once. A
// block has 64 targets at a time, and goes over the sources; see cuda_targets.h. As in cuda_by_sources.cu,
// dS = W (G V^T - delta); then dq = dS k, and by offsets n, dp[i] = sum_n dS[i, n] e[n], de[n] = sum_i dS[i, n] p[i].
//
// A block takes several times 64 targets of one sequence and head in turn. What they add to de it adds up in memory of
// its own, always by the same thread; another kernel sums over blocks and sequences. So the order of sums is fixed.
#include "attention/cuda_channels.h"
#include "attention/cuda_parts.h"
#include "attention/cuda_targets.h"

namespace zk {

namespace {

template <class T, bool wide>
struct Layout {
  using Stage = SourceStage<T, !wide>;
  static constexpr int diagonals = 2 * Stage::bytes;
  static constexpr int ranges = diagonals + Diagonals<T>::bytes;
  static constexpr int channels = ranges + attention_step * int(sizeof(FrameRange));
  static constexpr int bytes = channels + (wide ? ChannelBlocks<T>::bytes : 0);
};

template <class T, bool wide>
__global__ void __launch_bounds__(attention_threads, 2) by_targets(const AttentionScoresGradients args) {
  using Memory = Layout<T, wide>;
  using Stage = typename Memory::Stage;
  const AttentionWeights& w = args.weights;
  const int targets = int(w.targets), sources = int(w.sources), sequences = int(w.sequences);
  const int parts = int(args.parts), part = int(blockIdx.x % parts), item = int(blockIdx.x / parts);
  const int b = item % sequences, h = item / sequences;
  const int warp = threadIdx.x / 32, lane = lane_of_warp(), g = lane / 4, t = lane % 4;

  unsigned char* memory = dynamic_shared<unsigned char>();
  auto stage_of = [&](int n) { return Stage{reinterpret_cast<T*>(memory + n % 2 * Stage::bytes)}; };
  Diagonals<T> diagonals(reinterpret_cast<T*>(memory + Memory::diagonals));
  const PartOfTargets own_part(targets, int(args.share), part);
  // Each thread's place in a row of sums over diagonals: of the lower 16 offsets of a warp.
  float* offsets = nullptr;
  if (args.offsets) {
    int rows = int(PartOfTargets::rows(sources, args.share));
    offsets = static_cast<float*>(args.offsets) + (int64_t(item) * parts + part) * rows * 8;
    for (int n = threadIdx.x; n < 2 * rows; n += attention_threads) {
      *reinterpret_cast<Pack<float, 4>*>(offsets + 4 * n) = Pack<float, 4>{};
    }
    offsets += (16 * warp + g) * 8 + 2 * t;
  }

  const int64_t pair = h * int64_t(sequences) + b;
  const AttentionChannels& uses = args.uses;
  auto values = ChannelRows<T>::of(uses.v, uses.values, sources, args, b, h);
  auto grads = ChannelRows<T>::of(uses.grad, uses.grads, targets, args, b, h);
  const float* deltas = static_cast<const float*>(uses.delta) + pair * targets;
  auto* rows = static_cast<const SoftmaxRow<float>*>(w.softmax) + pair * targets;

  auto* ranges = reinterpret_cast<FrameRange*>(memory + Memory::ranges);
  const MaskEdges edges = mask_edges<ScoreShape<T, 1>>(w, {0, b, h}, false);

  for (int block = own_part.begin; block < own_part.end; ++block) {
    const int first_target = block * attention_step, own = first_target + 16 * warp;
    const int last_target = (first_target + attention_step < targets ? first_target + attention_step : targets) - 1;
    // Where a target does not see a source, only the penalty adds to the gradient.
    int begin = 0, end = sources;
    if (args.penalty == 0.0f) {
      begin = seen_by(w, first_target).begin / attention_step * attention_step;
      end = seen_by(w, last_target).end;
      end = end < edges.end_unpadded ? end : edges.end_unpadded;
    }
    const int steps = end > begin ? (end - begin + attention_step - 1) / attention_step : 0;

    TileLoader<T, score_channels, 8> keys(head_of<T>(w.k, b, h) + begin * w.k.frame, w.k.frame, int(w.query_channels));
    TileLoader<T, 32, 8, int> values_loader(values.packed + int64_t(begin) * values.packed_channels,
                                            values.packed_channels, values.packed_channels);
    // The first row of a window is that of the offset before the lowest.
    WindowLoader<T, Stage::window_rows> window(head_of<T>(w.e, 0, h), w.e.frame, targets + sources - 1,
                                               targets - 1 - (first_target + attention_step - 1) + begin - 1,
                                               attention_step);
    ChannelBlocks<T> channel_blocks(reinterpret_cast<T*>(memory + Memory::channels), grads, first_target, targets,
                                    values, begin, sources, steps);
    auto load = [&](int n) {
      int left = sources - (begin + n * attention_step);
      keys.load(stage_of(n).key_tile(), left);
      window.load(stage_of(n).window_tile());
      if constexpr (!wide) values_loader.load(stage_of(n).value_tile(), left);
    };
    __syncthreads();
    if (threadIdx.x < attention_step) ranges[threadIdx.x] = seen_by(w, first_target + int(threadIdx.x));
    if (steps > 0) {
      load(0);
      if constexpr (wide) channel_blocks.load();
      commit_copies();
    }

    TargetScores<T> scores(w, b, h, own);
    [[maybe_unused]] const int eight = first_eight<T>();
    Pair<T> own_grads[1][2][4], p[4][2];
    if constexpr (!wide) {
      load_operands<T, 32, 1>(own_grads, grads.packed, grads.packed_channels, own, targets, grads.packed_channels);
    }
    constexpr bool keeps = sizeof(T) == 2;  // for float that takes too many registers
    if constexpr (keeps) diagonals.load_positions(p, w, b, h, first_target);
    Shift<T> shifts[2];
    float negative[2];
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      int i = own + g + 8 * high;
      SoftmaxRow<float> row = i < targets ? rows[i] : SoftmaxRow<float>{};
      shifts[high] = i < targets ? Shift<T>::of(row.largest, row.scale) : Shift<T>::outside();
      negative[high] = i < targets ? -deltas[i] : 0.0f;
    }
    FrameRange all_seen = {seen_by(w, own + 15).begin, seen_by(w, own).end};
    if (edges.first_padded < all_seen.end) all_seen.end = edges.first_padded;

    float dq[1][score_channels / 8][4] = {}, dp[1][1][4] = {}, de[2][4] = {};
    for (int n = 0; n < steps; ++n) {
      float dw_all[wide ? 4 : 1][1][2][4];
      if constexpr (wide) {
#pragma unroll
        for (int i = 0; i < 32; ++i) dw_all[i / 8][0][i / 4 % 2][i % 4] = negative[i % 4 / 2];
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
      // Sums over diagonals that this step ends begin with those of targets before.
      float* sums = offsets + own_part.row(block, first) * 8;
      float before[4];
      if (keeps && offsets) {
#pragma unroll
        for (int i = 0; i < 4; ++i) before[i] = sums[i / 2 * 64 + i % 2];
      }
      const bool free =
          args.penalty == 0.0f && !w.mask && first >= all_seen.begin && first + attention_step <= all_seen.end;
      if (n == 0) scores.begin(stage);
#pragma unroll(wide ? 4 : unrolled<T>)
      for (int y = 0; y < attention_step / 16; ++y) {
        float s[1][2][4], dw[1][2][4];
        scores.pair(stage, y, s);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            dw[0][half][i] = wide ? dw_all[wide ? y : 0][0][half][i] : negative[i / 2];
          }
        }
        if constexpr (!wide) multiply<1, T>(stage.value_tile(), eight, own_grads, y, dw);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dw[0][half][i] *= shifts[i / 2].weight(s[0][half][i]);
        }
        if (!free) {
          unsigned hidden = hidden_sums<1, true>(w, b, ranges + 16 * warp, own, first + 16 * y);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            float& sum = dw[0][n / 4][n % 4];
            if (hidden >> n & 1) sum = 0.0f;
            bool exists = first + 16 * y + n / 4 * 8 + 2 * t + n % 2 < sources;
            if (args.penalty != 0.0f && exists) sum += penalty_of(s[0][n / 4][n % 4], args.penalty, args.limit);
          }
        }
        Pair<T> a[1][4];
        to_operand<T>(dw[0], a[0]);
        diagonals.store(a[0], y);
        multiply_rows<T, score_channels, score_channels / 8, 1>(stage.key_tile(), a, y, dq);
      }
      __syncwarp();
      diagonals.multiply_window(stage.window_tile(), dp[0][0]);
      __syncthreads();
      if (offsets) {
        if constexpr (!keeps) diagonals.load_positions(p, w, b, h, first_target);
        diagonals.multiply_positions(p, 16 * warp, de[0]);
        diagonals.multiply_positions(p, 16 * warp + attention_step, de[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[i / 2 * 64 + i % 2] = (keeps ? before[i] : sums[i / 2 * 64 + i % 2]) + de[0][i];
          de[0][i] = de[1][i];
          de[1][i] = 0.0f;
        }
      }
    }

    if (args.dq.data) {
      store_rows<T, 1, score_channels / 8>(head_to<T>(args.dq, b, h), args.dq.frame, own, targets,
                                           int(w.query_channels), dq);
    }
    if (offsets && steps > 0) {
      float* sums = offsets + own_part.row(block, begin + steps * attention_step) * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i / 2 * 64 + i % 2] += de[0][i];
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      int64_t i = own + g + 8 * high;
      if (!args.dp.data || t / 2 != g % 2 || i >= targets) continue;
      T* to = head_to<T>(args.dp, b, h) + i * args.dp.frame + t % 2 * 2;
      store_pair(to, make_pair<T>(dp[0][0][2 * high], dp[0][0][2 * high + 1]));
    }
  }
}

template <class T, bool wide>
void run(const AttentionScoresGradients& args, void* stream) {
  using Memory = Layout<T, wide>;
  const AttentionWeights& w = args.weights;
  launch("attention_by_targets", by_targets<T, wide>, dim3(grid_size(args.parts * w.sequences * w.heads)),
         dim3(attention_threads), Memory::bytes, stream, args);
}

}  // namespace

void attention_by_targets_cuda(const AttentionScoresGradients& given, void* stream) {
  AttentionScoresGradients args = given;
  args.weights = for_kernels(given.weights);
  dispatch_attention(args.weights, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (args.uses.channels == 0 && args.uses.packed <= 32) return run<T, false>(args, stream);
    }
    run<T, true>(args, stream);  // of float always: gradients of 32 channels take too many registers
  });
}

}  // namespace zk
