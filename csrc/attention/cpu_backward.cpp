// Attention on the CPU, backward: weights once more, tile by tile, and every gradient from the tile while it is in
// cache.
//
// With g the gradients of all results next to each other and v the values likewise, dw = g v^T and delta[i] = g[i] .
// out[i], the scores' gradient is ds = w (dw - delta). Where w is given, dense, nothing is computed again; a dense part
// of dw is added to the rest, and sum_j w dw of it to delta. The targets of a sequence and head are cut into parts.
// Each part sums what it adds to the gradients of keys, values and position projections in memory of its own, and the
// parts are added up in order: results do not depend on the threads.
#include <utility>

#include "attention/tiles.h"

namespace zk::ZK_ISA {

namespace {

// Position channels from which the gradients of position queries are a product with rows of positions, which have to be
// packed, rather than one dot product each.
constexpr int64_t wide_positions = 16;

constexpr int64_t least_items = 16;  // parts of all sequences and heads: enough for many threads to share evenly

template <class T>
class Backward {
 public:
  using W = Wide<T>;

  explicit Backward(const AttentionBackward& args)
      : args_(args),
        weights_(args.weights),
        scores_(args.weights, args.threads),
        depth_(weights_.query_channels),
        positions_(weights_.p.data ? weights_.position_channels : 0),
        channels_(channels_of(args.uses)),
        wants_scores_(args.dq.data || args.dk.data || args.dp.data || args.de.data),
        query_pitch_(whole_lanes<W>(depth_)),
        position_pitch_(positions_ < wide_positions ? positions_ : whole_lanes<W>(positions_)),
        pitch_(scores_.pitch),
        parts_(parts()),
        items_(scores_.pairs * parts_),
        key_rows_(args.dq.data ? scores_.pairs * weights_.sources * query_pitch_ : 0),
        value_columns_(wants_scores_ ? scores_.pairs * channels_ * pitch_ : 0),
        offset_rows_(args.dp.data && wide() ? scores_.offset_sets * scores_.offset_pitch * position_pitch_ : 0),
        dkeys_(args.dk.data ? items_ * depth_ * pitch_ : 0),
        dvalues_(args.dv.data ? items_ * channels_ * pitch_ : 0),
        doffsets_(args.de.data ? items_ * positions_ * scores_.offset_pitch : 0) {}

  void run() {
    if (!wants_scores_ && !args_.dv.data) return;
    int64_t pairs = scores_.pairs, sources = weights_.sources;
    if (wants_scores_) {
      parallel_for(pairs, 1, scores_.threads_for(pairs * sources * depth_), [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) pack(pair);
      });
    }
    if (args_.dp.data && wide()) {
      for (int64_t set = 0; set < scores_.offset_sets; ++set) pack_offsets(set);
    }
    for_each_item<W>(items_, scores_.threads_for(pairs * weights_.targets * sources), Memory::size(*this),
                     [&](int64_t item, W* scratch) {
                       Memory memory(*this, scratch);
                       gather(item, memory);
                     });
    if (args_.dk.data) scatter(dkeys_, depth_, args_.dk);
    if (args_.dv.data) scatter(dvalues_, channels_, args_.dv);
    if (args_.de.data) scatter_offsets();
  }

 private:
  // Memory of one thread: rows of its block of targets, and tiles.
  struct Memory {
    Memory(const Backward& b, W* scratch) {
      auto take = [&](int64_t size) { return std::exchange(scratch, scratch + size); };
      q = take(tile_rows * b.depth_);
      p = take(tile_rows * b.positions_);
      g = take(tile_rows * b.channels_);
      out = take(tile_rows * b.channels_);
      dq = take(tile_rows * b.query_pitch_);
      dp = take(tile_rows * b.position_pitch_);
      delta = take(tile_rows);
      w = take(tile_size);
      ds = take(tile_size);
      dw = take(tile_rows * tile_columns);
      extra = take(tile_rows * tile_columns);
    }

    static int64_t size(const Backward& b) {
      int64_t rows = b.depth_ + b.positions_ + 2 * b.channels_ + b.query_pitch_ + b.position_pitch_;
      return tile_rows * (rows + 1 + 2 * tile_columns) + 2 * tile_size;
    }

    W *q, *p, *g, *out, *dq, *dp, *delta;
    W *w, *ds;      // skewed; outside of its rows ds stays zero
    W *dw, *extra;  // rectangular
  };

  static int64_t channels_of(const std::vector<AttentionUse>& uses) {
    int64_t sum = 0;
    for (const AttentionUse& use : uses) sum += use.channels;
    return sum;
  }

  int64_t parts() const {
    int64_t wanted = (least_items + scores_.pairs - 1) / scores_.pairs;
    return wanted < scores_.row_blocks ? wanted : scores_.row_blocks;
  }

  void pack(int64_t pair) {
    int64_t sources = weights_.sources, b = scores_.sequence_of(pair), h = scores_.head_of(pair);
    W* values = value_columns_ + pair * channels_ * pitch_;
    for (const AttentionUse& use : args_.uses) {
      load_columns<T>(use.v, 0, sources, b, h, use.channels, values, pitch_);
      for (int64_t c = 0; c < use.channels; ++c, values += pitch_) clear(values + sources, pitch_ - sources);
    }
    if (!args_.dq.data) return;
    load_rows<T>(weights_.k, 0, sources, b, h, depth_, key_rows_ + pair * sources * query_pitch_, query_pitch_);
  }

  bool wide() const { return positions_ >= wide_positions; }

  // Position projections as rows, of the offsets that `Scores` has packed as columns.
  void pack_offsets(int64_t set) {
    int64_t pitch = scores_.offset_pitch, first = -scores_.first_offset();
    int64_t count = weights_.targets + weights_.sources - 1;
    bool own = weights_.e.sequence != 0;
    int64_t sequence = own ? scores_.sequence_of(set) : 0, head = own ? scores_.head_of(set) : set;
    W* to = offset_rows_ + set * pitch * position_pitch_;
    clear(to, first * position_pitch_);
    load_rows<T>(weights_.e, 0, count, sequence, head, positions_, to + first * position_pitch_, position_pitch_);
    clear(to + (first + count) * position_pitch_, (pitch - first - count) * position_pitch_);
  }

  static void clear(W* from, int64_t size) {
    for (int64_t n = 0; n < size; ++n) from[n] = 0;
  }

  void gather(int64_t item, const Memory& memory) {
    int64_t pair = item / parts_, part = item % parts_;
    if (args_.dk.data) clear(dkeys_ + item * depth_ * pitch_, depth_ * pitch_);
    if (args_.dv.data) clear(dvalues_ + item * channels_ * pitch_, channels_ * pitch_);
    if (args_.de.data) clear(doffsets_ + item * positions_ * scores_.offset_pitch, positions_ * scores_.offset_pitch);
    int64_t blocks = scores_.row_blocks;
    for (int64_t block = blocks * part / parts_; block < blocks * (part + 1) / parts_; ++block) {
      load(pair, block, memory);
      bool partial = args_.penalty == 0 && (args_.w || scores_.block_sees(pair, block));
      Range sources = partial ? scores_.visible_to_block(block) : scores_.all_sources();
      for (int64_t source = sources.begin; source < sources.end; source += tile_columns) {
        int64_t columns = scores_.columns_from(source, sources.end);
        args_.w ? read(pair, block, source, columns, memory) : fill(pair, block, source, columns, memory);
        spread(item, pair, block, source, columns, memory);
      }
      if (args_.dq.data) store(memory.dq, query_pitch_, depth_, pair, block, args_.dq);
      if (args_.dp.data) store(memory.dp, position_pitch_, positions_, pair, block, args_.dp);
    }
  }

  void load(int64_t pair, int64_t block, const Memory& m) const {
    int64_t first = block * tile_rows, rows = scores_.rows_of(block);
    int64_t b = scores_.sequence_of(pair), h = scores_.head_of(pair);
    load_rows<T>(weights_.q, first, rows, b, h, depth_, m.q, depth_);
    if (positions_) load_rows<T>(weights_.p, first, rows, b, h, positions_, m.p, positions_);
    clear(m.dq, rows * query_pitch_);
    clear(m.dp, rows * position_pitch_);
    int64_t channel = 0;
    for (const AttentionUse& use : args_.uses) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* g = row_of<T>(use.grad, first + i, b, h);
        // All that is made of weights has g as a factor: the scale that exponentials lack goes there.
        W scale = args_.w ? W(1) : scores_.softmax(pair)[first + i].scale;
        for (int64_t c = 0; c < use.channels; ++c) m.g[i * channels_ + channel + c] = widen(g[c]) * scale;
        if (!wants_scores_) continue;
        const T* out = row_of<T>(use.out, first + i, b, h);
        for (int64_t c = 0; c < use.channels; ++c) m.out[i * channels_ + channel + c] = widen(out[c]);
      }
      channel += use.channels;
    }
    for (int64_t i = 0; wants_scores_ && i < rows; ++i) {
      m.delta[i] = dot(m.g + i * channels_, m.out + i * channels_, channels_);
      if (!args_.dw) continue;
      m.delta[i] += dot(dense(args_.w, pair, first + i), dense(args_.dw, pair, first + i), weights_.sources);
    }
  }

  template <class E>
  __attribute__((noinline)) static W dot(const E* __restrict a, const E* __restrict b, int64_t n) {
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += widen(a[j]) * widen(b[j]);
    return sum;
  }

  // A target's row of a dense tensor.
  const T* dense(const void* x, int64_t pair, int64_t target) const {
    return static_cast<const T*>(x) + (pair * weights_.targets + target) * weights_.sources;
  }

  // What the uses add to the weights' gradient, in one tile.
  void multiply(int64_t pair, int64_t block, int64_t source, int64_t width, const Memory& m) const {
    const W* values = value_columns_ + pair * channels_ * pitch_ + source;
    gemm<false>(scores_.rows_of(block), width, channels_, m.g, channels_, 1, values, pitch_, m.dw, tile_columns);
  }

  // The scores' gradient of one tile from dense weights.
  void read(int64_t pair, int64_t block, int64_t source, int64_t columns, const Memory& m) const {
    if (args_.penalty != 0) scores_.fill(pair, block, source, columns, m.q, m.p, m.w);
    multiply(pair, block, source, whole_lanes<W>(columns), m);
    for (int64_t i = 0; i < scores_.rows_of(block); ++i) {
      int64_t target = block * tile_rows + i;
      W *ds = m.ds + tile_skew + i * tile_step, *dw = m.dw + i * tile_columns;
      if (args_.dw) add(dense(args_.dw, pair, target) + source, columns, dw);
      differentiate(dense(args_.w, pair, target) + source, dw, m.delta[i], columns, ds);
      scores_.mask(pair, target, source, columns, 0, ds);
      if (args_.penalty != 0) {
        penalize(m.w + tile_skew + i * tile_step, columns, m.extra);
        add(m.extra, columns, ds);
      }
      clear_behind(columns, ds);
    }
  }

  // Zeroes what an earlier tile left to the right of `columns`; more is not read.
  static void clear_behind(int64_t columns, W* row) {
    int64_t end = whole_lanes<W>(columns) + 2 * tile_rows;
    clear(row + columns, (end < tile_columns ? end : tile_columns) - columns);
  }

  // Weights and, if any gradient is made from it, the scores' gradient of one tile.
  void fill(int64_t pair, int64_t block, int64_t source, int64_t columns, const Memory& m) const {
    int64_t rows = scores_.rows_of(block), width = whole_lanes<W>(columns);
    scores_.fill(pair, block, source, columns, m.q, m.p, m.w);
    if (wants_scores_) multiply(pair, block, source, width, m);
    for (int64_t i = 0; i < rows; ++i) {
      int64_t target = block * tile_rows + i;
      W* w = m.w + tile_skew + i * tile_step;
      W* ds = m.ds + tile_skew + i * tile_step;
      if (args_.penalty != 0) penalize(w, columns, m.extra + i * tile_columns);
      scores_.exponentiate(pair, target, source, columns, w);
      if (!wants_scores_) continue;
      differentiate(w, m.dw + i * tile_columns, m.delta[i], width, ds);
      if (!scores_.sees(pair, target)) scores_.mask(pair, target, source, columns, 0, ds);
      if (args_.penalty != 0) add(m.extra + i * tile_columns, columns, ds);
      clear_behind(width, ds);
    }
  }

  template <class E>
  static void differentiate(const E* __restrict w, const W* __restrict dw, W delta, int64_t columns, W* __restrict ds) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) ds[j] = widen(w[j]) * (dw[j] - delta);
  }

  void penalize(const W* __restrict s, int64_t columns, W* __restrict extra) const {
    W penalty = W(args_.penalty), limit = W(args_.limit);
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) extra[j] = s[j] > limit ? penalty : s[j] < -limit ? -penalty : W(0);
  }

  template <class E>
  static void add(const E* __restrict from, int64_t columns, W* __restrict to) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) to[j] += widen(from[j]);
  }

  // Adds what one tile gives to every gradient.
  void spread(int64_t item, int64_t pair, int64_t block, int64_t source, int64_t columns, const Memory& m) {
    int64_t rows = scores_.rows_of(block), width = whole_lanes<W>(columns), channels = channels_;
    const W *w = m.w + tile_skew, *ds = m.ds + tile_skew;
    if (args_.dv.data) {
      W* dv = dvalues_ + item * channels * pitch_ + source;
      gemm<true>(channels, width, rows, m.g, 1, channels, w, tile_step, dv, pitch_);
    }
    if (args_.dk.data) {
      W* dk = dkeys_ + item * depth_ * pitch_ + source;
      gemm<true>(depth_, width, rows, m.q, 1, depth_, ds, tile_step, dk, pitch_);
    }
    if (args_.dq.data) {
      const W* k = key_rows_ + (pair * weights_.sources + source) * query_pitch_;
      gemm<true>(rows, query_pitch_, columns, ds, tile_step, 1, k, query_pitch_, m.dq, query_pitch_);
    }
    int64_t offset = scores_.offset_of(block, source), pitch = scores_.offset_pitch, reach = scores_.reach(width);
    if (args_.dp.data && wide()) {
      const W* e = offset_rows_ + (scores_.offset_set(pair) * pitch + offset) * position_pitch_;
      gemm<true>(rows, position_pitch_, reach, m.ds, tile_pitch, 1, e, position_pitch_, m.dp, position_pitch_);
    } else if (args_.dp.data) {
      gemm_dots(rows, positions_, reach, m.ds, tile_pitch, scores_.offsets(pair) + offset, pitch, m.dp, positions_);
    }
    if (args_.de.data) {
      W* de = doffsets_ + item * positions_ * pitch + offset;
      gemm<true>(positions_, reach, rows, m.p, 1, positions_, m.ds, tile_pitch, de, pitch);
    }
  }

  void store(const W* from, int64_t pitch, int64_t channels, int64_t pair, int64_t block,
             const AttentionRows& to) const {
    for (int64_t i = 0; i < scores_.rows_of(block); ++i) {
      T* row = row_to(to, block * tile_rows + i, pair);
      for (int64_t c = 0; c < channels; ++c) row[c] = narrow<T>(from[i * pitch + c]);
    }
  }

  T* row_to(const AttentionRows& x, int64_t frame, int64_t pair) const {
    return const_cast<T*>(row_of<T>(x, frame, scores_.sequence_of(pair), scores_.head_of(pair)));
  }

  // Adds up `parts` matrices of `rows` rows and `columns` columns, `step` apart, in the first.
  static void add_parts(W* sums, int64_t parts, int64_t step, int64_t rows, int64_t pitch, int64_t columns) {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t c = 0; c < rows; ++c) add(sums + part * step + c * pitch, columns, sums + c * pitch);
    }
  }

  // Adds up the parts of (channels, sources).
  void scatter(W* sums, int64_t channels, const AttentionRows& to) const {
    int64_t blocks = scores_.column_blocks;
    int threads = scores_.threads_for(items_ * channels * weights_.sources);
    parallel_for(scores_.pairs * blocks, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        int64_t pair = n / blocks, first = n % blocks * tile_columns;
        int64_t columns = scores_.columns_from(first, weights_.sources);
        W* from = sums + pair * parts_ * channels * pitch_ + first;
        add_parts(from, parts_, channels * pitch_, channels, pitch_, columns);
        transpose(from, pitch_, channels, columns, row_to(to, first, pair), to.frame);
      }
    });
  }

  // Adds up the parts of every sequence that shares the position projections.
  void scatter_offsets() {
    bool own = weights_.e.sequence != 0;
    int64_t parts = own ? parts_ : parts_ * weights_.sequences, pitch = scores_.offset_pitch;
    int64_t offsets = weights_.targets + weights_.sources - 1;
    for (int64_t set = 0; set < scores_.offset_sets; ++set) {
      W* from = doffsets_ + set * parts * positions_ * pitch - scores_.first_offset();
      add_parts(from, parts, positions_ * pitch, positions_, pitch, offsets);
      T* to = row_to(args_.de, 0, own ? set : set * weights_.sequences);
      transpose(from, pitch, positions_, offsets, to, args_.de.frame);
    }
  }

  const AttentionBackward& args_;
  const AttentionWeights& weights_;
  const Scores<T> scores_;
  const int64_t depth_, positions_, channels_;
  const bool wants_scores_;
  const int64_t query_pitch_, position_pitch_, pitch_, parts_, items_;
  Buffer<W> key_rows_, value_columns_, offset_rows_, dkeys_, dvalues_, doffsets_;
};

}  // namespace

void attention_backward(const AttentionBackward& args) {
  dispatch_cpu(args.weights.dtype, [&](auto element) { Backward<decltype(element)>(args).run(); });
}

}  // namespace zk::ZK_ISA
