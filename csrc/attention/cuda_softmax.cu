// The softmax rows of attention on the GPU: for each target the largest score and 1 / sum_j exp(s - largest).
//
// Every lane keeps a largest score and a sum of its own for the columns that it holds, which are brought together at
// the end. Tiles of sources that nobody in the block sees are not visited: all their scores are -1000.
#include "attention/cuda_masks.h"

namespace zk {

namespace {

// A largest score that no score is below; finite, for infinity less infinity is no number.
constexpr float below_all = -1e38f;

// The sum of exp(s - largest) so far. A larger score scales it down.
struct RunningSum {
  float largest = below_all, sum = 0.0f;

  __device__ __forceinline__ void raise(float to) {
    sum *= exp2_of((largest - to) * log2_of_e);
    largest = to;
  }

  // Adds the scores of row g + 8 `half`. What float asks for is done `apart`: a score less the largest, which is exact
  // where they are close, before the factor of base 2; and the sum of these few exponentials before that of all.
  template <int columns>
  __device__ __forceinline__ void add(const float (&s)[columns][4], int half, bool apart) {
    float to = largest;
#pragma unroll
    for (int x = 0; x < columns; ++x) to = fmaxf(to, fmaxf(s[x][2 * half], s[x][2 * half + 1]));
    raise(to);
    float base = to * log2_of_e, part = apart ? 0.0f : sum;
#pragma unroll
    for (int x = 0; x < columns; ++x) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        part += exp2_of(apart ? (s[x][i] - to) * log2_of_e : s[x][i] * log2_of_e - base);
      }
    }
    sum = apart ? sum + part : part;
  }

  __device__ __forceinline__ void add(const RunningSum& other) {
    float to = fmaxf(largest, other.largest);
    raise(to);
    sum += other.sum * exp2_of((other.largest - to) * log2_of_e);
  }
};

template <class Shape>
__global__ void __launch_bounds__(score_threads, sizeof(typename Shape::Element) == 2 ? 3 : 2)
    softmax_rows(const AttentionWeights args) {
  using T = typename Shape::Element;
  constexpr int M = Shape::tiles, columns = sizeof(T) == 4 ? 2 : 4;  // at once
  ScorePlace place = score_place<Shape>(args, blockIdx.x);
  ScoreMasks<Shape> masks(args, place, mask_edges<Shape>(args, place, false));
  T* shared = dynamic_shared<T>();
  ScoreLoader<Shape> loader(args, place, masks.begin() * score_sources);
  ScoreTargets<Shape> targets(args, place);
  RunningSum rows[M][2];

  int stage = 0;
  loader.load(shared);
  commit_copies();
  for (int tile = masks.begin(); tile < masks.end(); ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before
    const T* here = shared + stage;
    stage = Shape::size - stage;
    if (tile + 1 < masks.end()) loader.load(shared + stage);
    commit_copies();

    auto add = [&](auto masked) {
      ScoreBits<M> bits{};
      if constexpr (decltype(masked)::value) bits = masks.bits(tile);
#pragma unroll 1
      for (int first = 0; first < score_columns; first += columns) {
        float s[M][columns][4];
        targets.scores(here, first, s, [&](int x) {
          if constexpr (decltype(masked)::value) {
#pragma unroll
            for (int n = 0; n < 8 * M; ++n) {
              int m = n / 8, column = x + n / 4 % 2, i = n % 4;
              bits.apply(m, first + column, i, s[m][column][i]);
            }
          }
        });
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) rows[m][half].add(s[m], half, sizeof(T) == 4);
        }
      }
    };
    if (sizeof(T) == 2 && masks.plain(tile)) {
      add(std::false_type{});
    } else {
      add(std::true_type{});
    }
  }

  auto out = static_cast<SoftmaxRow<float>*>(args.softmax);
  out += (place.head * args.sequences + place.sequence) * args.targets;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RunningSum& row = rows[m][half];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        row.add({__shfl_xor_sync(~0u, row.largest, lanes), __shfl_xor_sync(~0u, row.sum, lanes)});
      }
      if (masks.unvisited() > 0) row.add({masked_score<float>, float(masks.unvisited())});
      int i = target_of<M>(place, m, half);
      if (lane_of_warp() % 4 == 0 && i < int(args.targets)) out[i] = {row.largest, 1.0f / row.sum};
    }
  }
}

}  // namespace

void attention_softmax_cuda(const AttentionSoftmax& given, void* stream) {
  AttentionWeights args = for_kernels(given.weights);
  dispatch_scores<2>(args, [&](auto shape) {
    using Shape = decltype(shape);
    launch("attention softmax", softmax_rows<Shape>, grid_size(score_blocks<Shape>(args)), score_threads,
           2 * Shape::size * sizeof(typename Shape::Element), stream, args);
  });
}

}  // namespace zk
