// Splits a range over OpenMP threads.
#pragma once

#include <cstdint>

namespace zk {

// Threads for work in `parts` when the caller allows `threads`: no more than parts, and one in a forked child.
int team_size(int64_t parts, int threads);

// Calls f(begin, end) on disjoint parts of [0, n) that cover it. Parts are multiples of `grain` but for the last; a
// range within one grain stays on the calling thread, for starting threads costs more than it gains there.
template <class F>
void parallel_for(int64_t n, int64_t grain, int threads, F&& f) {
  int64_t grains = (n + grain - 1) / grain;
  int64_t parts = team_size(grains, threads);
  if (parts <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    int64_t begin = grains * part / parts * grain;
    int64_t end = grains * (part + 1) / parts * grain;
    f(begin, end < n ? end : n);
  }
}

}  // namespace zk
