// Attention's forward on the GPU, out = W v: weights are made tile by tile and go from registers into the product.
//
// Values of up to 16 channels a head are one block. Wide values are split into blocks of as many channels as registers
// have sums for, each of which makes the weights again.
#include "attention/cuda_masks.h"
#include "attention/cuda_values.h"

namespace zk {

namespace {

template <class Shape, class Values>
constexpr bool is_narrow_half = Values::columns == 2 && sizeof(typename Shape::Element) == 2;

// Two blocks of threads a multiprocessor; three of narrow values in half precision.
template <class Shape, class Values>
constexpr int resident = is_narrow_half<Shape, Values> ? 3 : 2;

// Columns of scores at a time: all, but for narrow values, whose two tiles of targets a warp leave no registers for
// them, and for float, whose products are long code.
template <class Shape, class Values>
constexpr int columns_at_once = sizeof(typename Shape::Element) == 4 ? 2
                                : is_narrow_half<Shape, Values>      ? 4
                                                                     : score_columns;

template <class Shape, class Values>
constexpr int stage_size = Shape::size + Values::size;

template <class Shape, class Values>
__global__ void __launch_bounds__(score_threads, resident<Shape, Values>) average(const AttentionGated args) {
  using T = typename Shape::Element;
  constexpr int M = Shape::tiles, N = Values::columns, columns = columns_at_once<Shape, Values>;
  const AttentionWeights& weights = args.weights;
  int blocks = (int(args.channels) + Values::channels - 1) / Values::channels;
  int first_channel = int(blockIdx.x % blocks) * Values::channels;
  ScorePlace place = score_place<Shape>(weights, blockIdx.x / blocks);
  ScoreMasks<Shape> masks(weights, place, mask_edges<Shape>(weights, place, true));
  T* shared = dynamic_shared<T>();
  ScoreLoader<Shape> loader(weights, place, masks.begin() * score_sources);
  ValueLoader<Values> values(row_of<T>(args.v, place) + first_channel, args.v.frame, int(weights.sources),
                             int(args.channels) - first_channel, masks.begin() * score_sources);
  ScoreTargets<Shape> targets(weights, place);
  WeightRows<T, M> rows(weights, place);
  float sums[M][N][4] = {};

  int stage = 0;
  auto load = [&] {
    loader.load(shared + stage);
    values.load(shared + stage + Shape::size);
    commit_copies();
  };
  load();
  for (int tile = masks.begin(); tile < masks.end(); ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before
    const T* here = shared + stage;
    stage = stage_size<Shape, Values> - stage;
    if (tile + 1 < masks.end()) load();

    auto add = [&](auto masked) {
      ScoreBits<M> bits{};
      if constexpr (decltype(masked)::value) bits = masks.bits(tile);
#pragma unroll 1
      for (int first = 0; first < score_columns; first += columns) {
        float s[M][columns][4];
        targets.scores(here, first, s, [&](int x) {
          float w[M][2][4];
#pragma unroll
          for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
              float& score = s[m][x + n / 4][n % 4];
              if constexpr (decltype(masked)::value) bits.apply(m, first + x + n / 4, n % 4, score);
              w[m][n / 4][n % 4] = rows.weight(score, m, n % 4 / 2);
            }
          }
          add_products<Values, M>(w, 8 * (first + x), here + Shape::size, sums);
        });
      }
    };
    if (sizeof(T) == 2 && masks.plain(tile)) {
      add(std::false_type{});
    } else {
      add(std::true_type{});
    }
  }

  int64_t pairs = weights.sequences * weights.heads, pair = place.sequence * weights.heads + place.head;
  int lane = lane_of_warp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int i = target_of<M>(place, m, half);
      if (i >= int(weights.targets)) continue;
      int64_t row = (i * pairs + pair) * args.channels;
      const T* y = args.y.data ? row_of<T>(args.y, place) + i * args.y.frame : nullptr;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        int c = first_channel + 8 * n + lane % 4 * 2;
        if (c >= int(args.channels)) continue;
        float lower = sums[m][n][2 * half], upper = sums[m][n][2 * half + 1];
        *reinterpret_cast<Pair<T>*>(static_cast<T*>(args.out) + row + c) = make_pair<T>(lower, upper);
        if (!y) continue;
        auto gate = *reinterpret_cast<const Pack<T, 2>*>(y + c);
        *reinterpret_cast<Pair<T>*>(static_cast<T*>(args.gated) + row + c) =
            make_pair<T>(lower * widen(gate.element[0]), upper * widen(gate.element[1]));
      }
    }
  }
}

template <class Shape, int N>
void run(const AttentionGated& args, void* stream) {
  using T = typename Shape::Element;
  using Values = ValueShape<T, N>;
  int64_t blocks = score_blocks<Shape>(args.weights) * ceil_div(args.channels, Values::channels);
  launch("attention forward", average<Shape, Values>, grid_size(blocks), score_threads,
         2 * stage_size<Shape, Values> * sizeof(T), stream, args);
}

// What blocks of N products side by side cost in all, in products: those of the scores are made again for each.
int64_t cost(int64_t channels, int n) { return ceil_div(channels, 8 * n) * (n + 12); }

}  // namespace

void attention_gated_forward_cuda(const AttentionGated& given, void* stream) {
  AttentionGated args = given;
  args.weights = for_kernels(given.weights);
  if (args.channels <= 16) {
    dispatch_scores<2>(args.weights, [&](auto shape) { run<decltype(shape), 2>(args, stream); });
    return;
  }
  dispatch_scores<1>(args.weights, [&](auto shape) {
    using Shape = decltype(shape);
    if constexpr (sizeof(typename Shape::Element) == 4) {
      run<Shape, 4>(args, stream);
    } else if (cost(args.channels, 18) < cost(args.channels, 24)) {
      run<Shape, 18>(args, stream);
    } else {
      run<Shape, 24>(args, stream);
    }
  });
}

void attention_forward_cuda(const AttentionForward& args, void* stream) {
  AttentionGated gated{};
  static_cast<AttentionForward&>(gated) = args;
  attention_gated_forward_cuda(gated, stream);
}

}  // namespace zk
