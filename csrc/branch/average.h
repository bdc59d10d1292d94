// The average over a chunk of a stream and its left context. Compiled once for each instruction set.
#pragma once

#include <algorithm>
#include <memory>

#include "branch/branch.h"
#include "common/gemm.h"
#include "common/math.h"
#include "common/parallel.h"

namespace zk::ZK_ISA {

constexpr int64_t most_columns = 64;  // of one head's values at a time

template <class W>
class Average {
 public:
  explicit Average(const AverageBranch& args) : n(args), rows(n.targets * n.sequences) {}

  // Where the values of the frames go, behind the context.
  W* fresh() const { return static_cast<W*>(n.joined) + (n.sources - n.targets) * n.sequences * n.values; }

  // x tanh(s), of rows of s, x, g.
  void gate(const W* projected) const {
    W* to = fresh();
    for (int64_t row = 0; row < rows; ++row, to += n.values) {
      const W *s = projected + row * 3 * n.values, *x = s + n.values;
#pragma omp simd
      for (int64_t c = 0; c < n.values; ++c) to[c] = x[c] * tanh_of(s[c]);
    }
  }

  // Puts the context before the values.
  void join() const {
    W* joined = static_cast<W*>(n.joined);
    std::copy_n(static_cast<const W*>(n.context), fresh() - joined, joined);
  }

  // weights joined, times g where given; rows of g as `gate` has them.
  void run(const W* g, W* to) const {
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
        const W* w = static_cast<const W*>(n.weights) + pair * n.targets * n.sources;
        gemm<false>(n.targets, whole_lanes<W>(count), n.sources, w, n.sources, 1, v, pitch, out, pitch);
        for (int64_t t = 0; t < n.targets; ++t) {
          W *row = out + t * pitch, *result = to + t * step + column;
          const W* factor = g ? g + 3 * t * step + 2 * b * n.values + column : nullptr;
          for (int64_t c = 0; c < count; ++c) result[c] = factor ? row[c] * factor[c] : row[c];
        }
      }
    });
  }

  const AverageBranch& n;
  const int64_t rows;
};

}  // namespace zk::ZK_ISA
