// Attention on the CPU, forward: a block of targets walks over the sources, a tile in cache at a time.
#include <cmath>

#include "attention/block.h"

namespace zk::ZK_ISA {

namespace {

// Running sum of a target's exponentials: sum = total exp(largest).
template <class W>
struct Sum {
  W largest = -W(HUGE_VAL), total = 0;

  __attribute__((noinline)) void add(const W* __restrict s, int64_t n) {
    W top = largest;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) top = s[j] > top ? s[j] : top;
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += exp_nonpositive(s[j] - top);
    total = total * exp_nonpositive(largest - top) + sum;
    largest = top;
  }
};

// Softmax rows of a block over some sources, in whole tiles.
template <class T, class W = Wide<T>>
void sum_block(const Scores<T>& scores, int64_t pair, int64_t block, Range sources, const Block<W>& memory) {
  int64_t first = block * tile_rows, rows = scores.rows_of(block);
  Sum<W> sums[tile_rows];
  for (int64_t source = sources.begin; source < sources.end; source += tile_columns) {
    int64_t columns = scores.columns_from(source, sources.end), width = whole_lanes<W>(columns);
    scores.fill(pair, block, source, columns, memory.q, memory.p, memory.tile);
    for (int64_t i = 0; i < rows; ++i) {
      W* row = memory.tile + tile_skew + i * tile_step;
      scores.mask(pair, first + i, source, columns, masked_score<W>, row);
      for (int64_t j = columns; j < width; ++j) row[j] = -W(HUGE_VAL);  // exp is next to nothing: 1e-38
      sums[i].add(row, width);
    }
  }
  SoftmaxRow<W>* softmax = scores.softmax(pair) + first;
  for (int64_t i = 0; i < rows; ++i) {
    W total = sums[i].total;
    softmax[i] = {sums[i].largest, W(1) / (total == 0 ? W(1) : total)};  // zero: no sources
  }
}

// out = exp(s - largest) v for a block: w v, up to the scale of each row.
template <class T, class W = Wide<T>>
void average_block(const Scores<T>& scores, int64_t pair, int64_t block, const W* values, int64_t pitch, W* out,
                   const Block<W>& memory) {
  int64_t first = block * tile_rows, rows = scores.rows_of(block);
  Range sources = scores.block_sees(pair, block) ? scores.visible_to_block(block) : scores.all_sources();
  for (int64_t n = 0; n < rows * pitch; ++n) out[n] = 0;
  for (int64_t source = sources.begin; source < sources.end; source += tile_columns) {
    int64_t columns = scores.columns_from(source, sources.end);
    scores.fill(pair, block, source, columns, memory.q, memory.p, memory.tile);
    W* tile = memory.tile + tile_skew;
    for (int64_t i = 0; i < rows; ++i) scores.exponentiate(pair, first + i, source, columns, tile + i * tile_step);
    gemm<true>(rows, pitch, columns, tile, tile_step, 1, values + source * pitch, pitch, out, pitch);
  }
}

}  // namespace

void attention_softmax(const AttentionSoftmax& softmax) {
  const AttentionWeights& args = softmax.weights;
  dispatch_cpu(args.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Scores<T> scores(args, softmax.threads);
    int64_t blocks = scores.row_blocks;
    int threads = scores.threads_for(scores.pairs * args.targets * args.sources);
    for_each_item<W>(scores.pairs * blocks, threads, Block<W>::size(args), [&](int64_t item, W* scratch) {
      int64_t pair = item / blocks, block = item % blocks;
      Block<W> memory(scratch, args);
      memory.load(scores, pair, block);
      Range seen = scores.visible_to_block(block), all = scores.all_sources();
      sum_block(scores, pair, block, seen, memory);
      bool partial = seen.begin > 0 || seen.end < all.end;
      if (partial && !scores.block_sees(pair, block)) sum_block(scores, pair, block, all, memory);
    });
  });
}

void attention_forward(const AttentionForward& args) {
  const AttentionWeights& weights = args.weights;
  dispatch_cpu(weights.dtype, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Scores<T> scores(weights, args.threads);
    int64_t blocks = scores.row_blocks, sources = weights.sources, channels = args.channels;
    int64_t pitch = whole_lanes<W>(channels);
    Buffer<W> values(scores.pairs * sources * pitch);
    parallel_for(scores.pairs, 1, scores.threads_for(scores.pairs * sources * pitch), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        W* to = values + pair * sources * pitch;
        load_rows<T>(args.v, 0, sources, scores.sequence_of(pair), scores.head_of(pair), channels, to, pitch);
      }
    });
    auto out = static_cast<T*>(args.out);
    int threads = scores.threads_for(scores.pairs * weights.targets * sources);
    int64_t size = tile_rows * pitch + Block<W>::size(weights);
    for_each_item<W>(scores.pairs * blocks, threads, size, [&](int64_t item, W* scratch) {
      int64_t pair = item / blocks, block = item % blocks;
      Block<W> memory(scratch + tile_rows * pitch, weights);
      memory.load(scores, pair, block);
      average_block(scores, pair, block, values + pair * sources * pitch, pitch, scratch, memory);
      for (int64_t i = 0; i < scores.rows_of(block); ++i) {
        int64_t frame = (block * tile_rows + i) * weights.sequences + scores.sequence_of(pair);
        T* to = out + (frame * weights.heads + scores.head_of(pair)) * channels;
        const W *from = scratch + i * pitch, scale = scores.softmax(pair)[block * tile_rows + i].scale;
        for (int64_t c = 0; c < channels; ++c) to[c] = narrow<T>(from[c] * scale);
      }
    });
  });
}

}  // namespace zk::ZK_ISA
