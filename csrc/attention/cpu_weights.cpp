// Attention weights on the CPU as a dense tensor, for lengths at which reading them again is cheaper than computing
// them again: scores, masks and softmax of a block of targets while its rows are in cache, each weight written once.
#include <cmath>

#include "attention/block.h"

namespace zk::ZK_ISA {

namespace {

template <class T>
class Softmax {
 public:
  using W = Wide<T>;

  explicit Softmax(const AttentionDense& args)
      : scores_(args.weights, args.threads), to_(static_cast<T*>(args.w)), row_pitch_(scores_.pitch + lanes<W>) {}

  void run() {
    const AttentionWeights& args = scores_.args;
    int64_t blocks = scores_.row_blocks, size = tile_rows * row_pitch_ + Block<W>::size(args);
    int threads = scores_.threads_for(scores_.pairs * args.targets * args.sources);
    for_each_item<W>(scores_.pairs * blocks, threads, size, [&](int64_t item, W* scratch) {
      int64_t pair = item / blocks, block = item % blocks;
      Block<W> memory(scratch + tile_rows * row_pitch_, args);
      memory.load(scores_, pair, block);
      Range all = scores_.all_sources(), seen = scores_.visible_to_block(block);
      bool partial = seen.begin > 0 || seen.end < all.end;
      W tops[tile_rows];
      fill(pair, block, seen, memory, scratch, tops);
      if (partial && !see(tops, scores_.rows_of(block))) fill(pair, block, seen = all, memory, scratch, tops);
      for (int64_t i = 0; i < scores_.rows_of(block); ++i) {
        T* to = to_ + (pair * args.targets + block * tile_rows + i) * args.sources;
        for (int64_t j = 0; j < seen.begin; ++j) to[j] = T{};
        normalise(scratch + i * row_pitch_, tops[i], seen.end - seen.begin, to + seen.begin);
        for (int64_t j = seen.end; j < all.end; ++j) to[j] = T{};
      }
    });
  }

 private:
  // Masked scores of a block over some sources, as rows, and the largest of each.
  void fill(int64_t pair, int64_t block, Range sources, const Block<W>& memory, W* rows, W* tops) const {
    for (int64_t source = sources.begin; source < sources.end; source += tile_columns) {
      int64_t columns = scores_.columns_from(source, sources.end);
      scores_.fill(pair, block, source, columns, memory.q, memory.p, memory.tile);
      for (int64_t i = 0; i < scores_.rows_of(block); ++i) {
        W* from = memory.tile + tile_skew + i * tile_step;
        scores_.mask(pair, block * tile_rows + i, source, columns, masked_score<W>, from);
        W top = copy(from, columns, rows + i * row_pitch_ + source - sources.begin);
        tops[i] = source == sources.begin || top > tops[i] ? top : tops[i];
      }
    }
  }

  // Whether sources out of sight, whose scores are those of masked ones, have no weight for any target.
  static bool see(const W* tops, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      if (!(tops[i] > visible_limit<W>)) return false;
    }
    return true;
  }

  // Returns the largest.
  static W copy(const W* __restrict from, int64_t n, W* __restrict to) {
    W top = -W(HUGE_VAL);
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) {
      to[j] = from[j];
      top = from[j] > top ? from[j] : top;
    }
    return top;
  }

  // Not inlined: compiled once, a row gets the same bits on one thread and on several.
  __attribute__((noinline)) static void normalise(W* __restrict row, W top, int64_t n, T* __restrict to) {
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      W u = row[j] - top, w = exp_nonpositive(u);
      row[j] = w = u < exp_limit<W> ? W(0) : w;
      sum += w;
    }
    W scale = W(1) / sum;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = narrow<T>(row[j] * scale);
  }

  const Scores<T> scores_;
  T* const to_;
  const int64_t row_pitch_;
};

}  // namespace

void attention_weights_forward(const AttentionDense& args) {
  dispatch_cpu(args.weights.dtype, [&](auto element) { Softmax<decltype(element)>(args).run(); });
}

}  // namespace zk::ZK_ISA
