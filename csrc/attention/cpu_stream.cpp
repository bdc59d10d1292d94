// Averages over a chunk of a stream and its left context, with the products around them.
#include <algorithm>
#include <memory>

#include "attention/attention.h"
#include "common/gemm.h"
#include "common/math.h"
#include "common/parallel.h"
#include "linear/linear.h"

namespace zk::ZK_ISA {

namespace {

constexpr int64_t most_columns = 64;  // of one head's values at a time

template <class W>
class Stream {
 public:
  explicit Stream(const AttentionStream& args) : n(args), rows_(n.targets * n.sequences) {}

  void run() {
    int64_t thirds = n.gated ? 3 : 1;
    std::unique_ptr<W[]> projected(new W[rows_ * n.values * thirds]), averages(new W[rows_ * n.values]);
    W* fresh = static_cast<W*>(n.joined) + (n.sources - n.targets) * n.sequences * n.values;
    W* into = n.gated ? projected.get() : fresh;
    linear({n.src, n.in_weight, n.in_bias, nullptr, into, rows_, n.channels, thirds * n.values, n.dtype,
            Activation::none, n.threads});
    if (n.gated) gate(projected.get(), fresh);
    std::copy_n(static_cast<const W*>(n.context), fresh - static_cast<W*>(n.joined), static_cast<W*>(n.joined));
    average(n.gated ? projected.get() + 2 * n.values : nullptr, averages.get());
    linear({averages.get(), n.out_weight, n.out_bias, n.src, n.y, rows_, n.values, n.channels, n.dtype,
            Activation::none, n.threads});
  }

 private:
  // x tanh(s), of rows of s, x, g.
  void gate(const W* projected, W* to) const {
    for (int64_t row = 0; row < rows_; ++row, to += n.values) {
      const W *s = projected + row * 3 * n.values, *x = s + n.values;
#pragma omp simd
      for (int64_t c = 0; c < n.values; ++c) to[c] = x[c] * tanh_of(s[c]);
    }
  }

  // W joined, times g where given; rows of g as `gate` has them.
  void average(const W* g, W* to) const {
    int64_t of_head = n.values / n.heads, blocks = (of_head + most_columns - 1) / most_columns;
    int64_t step = n.sequences * n.values;  // from frame to frame
    parallel_for(n.heads * n.sequences * blocks, 1, n.threads, [&](int64_t begin, int64_t end) {
      int64_t pitch = whole_lanes<W>(std::min(of_head, most_columns));
      std::unique_ptr<W[]> memory(new W[(n.sources + n.targets) * pitch]());
      W *v = memory.get(), *out = v + n.sources * pitch;
      for (int64_t item = begin; item < end; ++item) {
        int64_t pair = item / blocks, head = pair / n.sequences, b = pair % n.sequences;
        int64_t first = item % blocks * most_columns, count = std::min(of_head - first, most_columns);
        int64_t column = b * n.values + head * of_head + first;
        const W* from = static_cast<const W*>(n.joined) + column;
        for (int64_t s = 0; s < n.sources; ++s) std::copy_n(from + s * step, count, v + s * pitch);
        const W* w = static_cast<const W*>(n.w) + pair * n.targets * n.sources;
        gemm<false>(n.targets, whole_lanes<W>(count), n.sources, w, n.sources, 1, v, pitch, out, pitch);
        for (int64_t t = 0; t < n.targets; ++t) {
          W *row = out + t * pitch, *result = to + t * step + column;
          const W* factor = g ? g + 3 * t * step + 2 * b * n.values + column : nullptr;
          for (int64_t c = 0; c < count; ++c) result[c] = factor ? row[c] * factor[c] : row[c];
        }
      }
    });
  }

  const AttentionStream& n;
  int64_t rows_;
};

}  // namespace

void attention_stream(const AttentionStream& args) {
  args.dtype == DType::f64 ? Stream<double>(args).run() : Stream<float>(args).run();
}

}  // namespace zk::ZK_ISA
