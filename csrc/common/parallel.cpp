// Knows whether this process may start OpenMP threads. Compiled once, for all instruction sets.
#include "common/parallel.h"

#include <pthread.h>

namespace zk {

// libgomp's threads do not survive a fork, but its record of them does: a parallel region in the child waits for them
// for ever. pthread_atfork is told once, when the module is loaded; grandchildren inherit the mark.
static bool forked = false;
[[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int team_size(int64_t parts, int threads) {
  if (forked) return 1;
  return int(parts < threads ? parts : threads);
}

}  // namespace zk
