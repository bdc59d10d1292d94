// Tiles of scores: what forward and backward share. Compiled once for each instruction set.
//
// A tile holds the scores of `tile_rows` targets against `tile_columns` sources and stays in cache. It is stored
// skewed: row i, whose columns count sources j, begins one element before where a rectangle of row length `tile_pitch`
// has it:
//
//     address of (i, j) = tile_rows - 1 + i (tile_pitch - 1) + j
//
// Read as that rectangle, column n of every row is the same offset j - i. So the positional term, p_i . e[T - 1 - i +
// j], is an ordinary product of the block's p with consecutive columns of e, and so are its gradients.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "attention/attention.h"
#include "common/gemm.h"
#include "common/math.h"
#include "common/parallel.h"
#include "common/transpose.h"

namespace zk::ZK_ISA {

constexpr int64_t tile_rows = 32;
constexpr int64_t tile_columns = 384;
constexpr int64_t tile_pitch = tile_rows + tile_columns;
constexpr int64_t tile_skew = tile_rows - 1;   // where the first row begins
constexpr int64_t tile_step = tile_pitch - 1;  // from row to row
constexpr int64_t tile_size = tile_rows * tile_pitch;

// Below this, exp is taken for zero: subnormal weights would slow down everything behind them.
template <class W>
constexpr W exp_limit = sizeof(W) == 4 ? W(-87) : W(-700);

// Uninitialised memory on a cache line's boundary.
template <class W>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    size_t bytes = (size_t(size) * sizeof(W) + 63) / 64 * 64;
    data_ = bytes ? static_cast<W*>(std::aligned_alloc(64, bytes)) : nullptr;
    if (bytes && !data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator W*() const { return data_; }

 private:
  W* data_;
};

// Calls f(item, scratch) for every item, in any order; each thread has `scratch_size` elements of its own, zero at
// first.
template <class W, class F>
void for_each_item(int64_t items, int threads, int64_t scratch_size, F&& f) {
  scratch_size = (scratch_size + 63) / 64 * 64;
  threads = team_size(items, threads);
  Buffer<W> scratch(threads * scratch_size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    W* mine = scratch + omp_get_thread_num() * scratch_size;
    for (int64_t n = 0; n < scratch_size; ++n) mine[n] = 0;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) f(item, mine);
  }
}

template <class T>
const T* row_of(const AttentionRows& x, int64_t frame, int64_t sequence, int64_t head) {
  return static_cast<const T*>(x.data) + frame * x.frame + sequence * x.sequence + head * x.head;
}

// Copies frames into rows of `pitch` elements of W, zero beyond the channels.
template <class T, class W = Wide<T>>
void load_rows(const AttentionRows& x, int64_t frame, int64_t count, int64_t sequence, int64_t head, int64_t channels,
               W* to, int64_t pitch) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = row_of<T>(x, frame + i, sequence, head);
    W* row = to + i * pitch;
    for (int64_t c = 0; c < channels; ++c) row[c] = widen(from[c]);
    for (int64_t c = channels; c < pitch; ++c) row[c] = 0;
  }
}

// Copies frames into columns: to[c * pitch + i].
template <class T, class W = Wide<T>>
void load_columns(const AttentionRows& x, int64_t frame, int64_t count, int64_t sequence, int64_t head,
                  int64_t channels, W* to, int64_t pitch) {
  transpose(row_of<T>(x, frame, sequence, head), x.frame, count, channels, to, pitch);
}

struct Range {
  int64_t begin, end;
};

// The weights' side of every kernel: keys and position projections repacked, tiles of scores, masks.
template <class T>
class Scores {
 public:
  using W = Wide<T>;

  Scores(const AttentionWeights& args, int threads)
      : args(args),
        threads(threads),
        pairs(args.sequences * args.heads),
        row_blocks((args.targets + tile_rows - 1) / tile_rows),
        column_blocks((args.sources + tile_columns - 1) / tile_columns),
        pitch(whole_lanes<W>(args.sources)),
        // Tiles at the edges reach beyond the offsets that exist, on either side.
        offset_pitch((row_blocks - 1) * tile_rows + (column_blocks - 1) * tile_columns + tile_pitch),
        offset_sets(args.p.data ? (args.e.sequence ? pairs : args.heads) : 0),
        keys_(pairs * args.query_channels * pitch),
        offsets_(offset_sets * args.position_channels * offset_pitch) {
    parallel_for(pairs * column_blocks, 1, threads_for(pairs * args.sources * args.query_channels),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t n = begin; n < end; ++n) pack_keys(n / column_blocks, n % column_blocks);
                 });
    for (int64_t set = 0; set < offset_sets; ++set) pack_offsets(set);
    if (!args.padding) return;
    for (int64_t b = 0; b < args.sequences; ++b) {
      const uint8_t* masked = args.padding + b * args.sources;
      first_padded_.push_back(std::find_if(masked, masked + args.sources, [](uint8_t m) { return m != 0; }) - masked);
    }
  }

  int64_t sequence_of(int64_t pair) const { return pair % args.sequences; }
  int64_t head_of(int64_t pair) const { return pair / args.sequences; }
  SoftmaxRow<W>* softmax(int64_t pair) const { return static_cast<SoftmaxRow<W>*>(args.softmax) + pair * args.targets; }

  // So many threads that each has some 50 us of work.
  int threads_for(int64_t elements) const { return elements < (1 << 16) ? 1 : threads; }

  int64_t rows_of(int64_t block) const {
    int64_t left = args.targets - block * tile_rows;
    return left < tile_rows ? left : tile_rows;
  }

  // How many columns of a tile's rectangle `width` columns of its rows reach.
  static int64_t reach(int64_t width) { return whole_lanes<W>(tile_skew + width); }

  // How many sources a tile holds that begins at one.
  int64_t columns_from(int64_t first, int64_t end) const {
    return end - first < tile_columns ? end - first : tile_columns;
  }

  Range all_sources() const { return {0, args.sources}; }

  // The sources that the chunk rule lets target i see.
  Range visible(int64_t i) const {
    if (args.chunk <= 0) return all_sources();
    int64_t own = i / args.chunk, end = (own + 1) * args.chunk;
    int64_t first = args.left_chunks < 0 || own < args.left_chunks ? 0 : own - args.left_chunks;
    return {first * args.chunk, end < args.sources ? end : args.sources};
  }

  // Whole tiles that cover what the targets of a block see.
  Range visible_to_block(int64_t block) const {
    int64_t first = block * tile_rows;
    return {visible(first).begin / tile_columns * tile_columns, visible(first + rows_of(block) - 1).end};
  }

  // The columns of the packed position projections that lie under a tile; a matrix of rows of `offset_pitch`.
  int64_t offset_of(int64_t block, int64_t source) const { return (row_blocks - 1 - block) * tile_rows + source; }
  // Their column 0 belongs to the last row of a whole last block: T - 1 - (row_blocks tile_rows - 1), not positive.
  int64_t first_offset() const { return args.targets - row_blocks * tile_rows; }
  int64_t offset_set(int64_t pair) const { return args.e.sequence ? pair : head_of(pair); }
  const W* offsets(int64_t pair) const { return offsets_ + offset_set(pair) * args.position_channels * offset_pitch; }

  // Scores before masking; `q` and `p` are the block's rows.
  void fill(int64_t pair, int64_t block, int64_t source, int64_t columns, const W* q, const W* p, W* tile) const {
    int64_t rows = rows_of(block), depth = args.query_channels, width = whole_lanes<W>(columns);
    const W* keys = keys_ + pair * depth * pitch + source;
    if (!args.p.data) {
      gemm<false>(rows, width, depth, q, depth, 1, keys, pitch, tile + tile_skew, tile_step);
      return;
    }
    const W* e = offsets(pair) + offset_of(block, source);
    int64_t positions = args.position_channels;
    gemm<false>(rows, reach(width), positions, p, positions, 1, e, offset_pitch, tile, tile_pitch);
    gemm<true>(rows, width, depth, q, depth, 1, keys, pitch, tile + tile_skew, tile_step);
  }

  // Sets the masked ones among `columns` scores of target i to `value`.
  void mask(int64_t pair, int64_t i, int64_t source, int64_t columns, W value, W* __restrict row) const {
    int64_t b = sequence_of(pair);
    if (args.padding && first_padded_[b] < source + columns) {
      blend(args.padding + b * args.sources + source, columns, value, row);
    }
    if (args.mask) {
      blend(args.mask + b * args.mask_sequence + i * args.mask_frame + source, columns, value, row);
    }
    if (args.chunk > 0) {
      Range seen = visible(i);
      int64_t begin = seen.begin - source, end = seen.end - source;
      for (int64_t j = 0; j < (begin < columns ? begin : columns); ++j) row[j] = value;
      for (int64_t j = end < 0 ? 0 : end; j < columns; ++j) row[j] = value;
    }
  }

  // Turns scores of target i into weights, up to the row's scale. Zero from `columns` on to a whole register. Not
  // inlined: between the products the loop took 6% longer.
  __attribute__((noinline)) void exponentiate(int64_t pair, int64_t i, int64_t source, int64_t columns,
                                              W* __restrict row) const {
    W largest = softmax(pair)[i].largest;
    int64_t width = whole_lanes<W>(columns);
    mask(pair, i, source, columns, masked_score<W>, row);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      W u = row[j] - largest;
      W w = exp_nonpositive(u);
      row[j] = u < exp_limit<W> ? W(0) : w;
    }
    for (int64_t j = columns; j < width; ++j) row[j] = 0;
  }

  // Whether masked sources have no weight for target i.
  bool sees(int64_t pair, int64_t i) const { return softmax(pair)[i].largest > visible_limit<W>; }

  // Whether they have none for any target of a block.
  bool block_sees(int64_t pair, int64_t block) const {
    int64_t first = block * tile_rows, end = first + rows_of(block);
    while (first < end && sees(pair, first)) ++first;
    return first == end;
  }

  const AttentionWeights& args;
  const int threads;
  const int64_t pairs, row_blocks, column_blocks, pitch, offset_pitch, offset_sets;

 private:
  static void blend(const uint8_t* __restrict masked, int64_t columns, W value, W* __restrict row) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) row[j] = masked[j] ? value : row[j];
  }

  void pack_keys(int64_t pair, int64_t block) {
    int64_t first = block * tile_columns, count = columns_from(first, args.sources), depth = args.query_channels;
    W* to = keys_ + pair * depth * pitch + first;
    load_columns<T>(args.k, first, count, sequence_of(pair), head_of(pair), depth, to, pitch);
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t j = count; j < whole_lanes<W>(count); ++j) to[d * pitch + j] = 0;
    }
  }

  // Column n of the packed set is offset n + first_offset() of e.
  void pack_offsets(int64_t set) {
    int64_t sequence = args.e.sequence ? sequence_of(set) : 0, head = args.e.sequence ? head_of(set) : set;
    int64_t count = args.targets + args.sources - 1, positions = args.position_channels;
    W* to = offsets_ + set * positions * offset_pitch;
    for (int64_t n = 0; n < positions * offset_pitch; ++n) to[n] = 0;
    load_columns<T>(args.e, 0, count, sequence, head, positions, to - first_offset(), offset_pitch);
  }

  Buffer<W> keys_, offsets_;
  std::vector<int64_t> first_padded_;  // source of each sequence; `sources` where none is
};

}  // namespace zk::ZK_ISA
