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

  __device__ __forceinline__ void add(const RunningSum& other) {
    float to = fmaxf(largest, other.largest);
    raise(to);
    sum += other.sum * exp2_of((other.largest - to) * log2_of_e);
  }
};

template <class Shape>
__global__ void __launch_bounds__(score_threads) softmax_rows(const AttentionWeights args) {
  using T = typename Shape::Element;
  constexpr int M = Shape::tiles;
  ScorePlace place = score_place<Shape>(args, blockIdx.x);
  ScoreMasks<M> masks(args, place);
  int begin = masks.first_tile(true), end = masks.end_tile(true), visited = 0;
  T* shared = dynamic_shared<T>();
  ScoreLoader<Shape> loader(args, place, begin * score_sources);
  ScoreTargets<Shape> targets(args, place);
  RunningSum rows[M][2];

  loader.load(shared);
  commit_copies();
  masks.fetch(begin * score_sources);
  for (int tile = begin; tile < end; ++tile) {
    masks.take(tile * score_sources);
    masks.fetch((tile + 1) * score_sources);
    wait_for_copies<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before
    if (tile + 1 < end) loader.load(shared + (tile + 1 - begin) % 2 * Shape::size);
    commit_copies();
    if (masks.hidden()) continue;
    visited += masks.count();

    ScoreTile<M> s;
    targets.scores(shared + (tile - begin) % 2 * Shape::size, s);
    masks.apply(s);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RunningSum& row = rows[m][half];
        float largest = row.largest;
#pragma unroll
        for (int x = 0; x < score_columns; ++x) {
          largest = fmaxf(largest, fmaxf(s[m][x][2 * half], s[m][x][2 * half + 1]));
        }
        row.raise(largest);
        float base = largest * log2_of_e, sum = 0.0f;
#pragma unroll
        for (int x = 0; x < score_columns; ++x) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            sum += exp2_of(sizeof(T) == 4 ? (s[m][x][i] - largest) * log2_of_e : s[m][x][i] * log2_of_e - base);
          }
        }
        row.sum += sum;
      }
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
      if (visited < int(args.sources)) row.add({masked_score<float>, float(int(args.sources) - visited)});
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
