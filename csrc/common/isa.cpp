// Detects the best instruction set of the processor, and keeps the one in use.
#include "common/isa.h"

#include <atomic>
#include <stdexcept>

namespace zk {

Isa detected_isa() {
#if ZK_MANY_ISAS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

static std::atomic<Isa> in_use{detected_isa()};

Isa current_isa() { return in_use.load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (isa > detected_isa()) throw std::invalid_argument("this processor does not run that instruction set");
  in_use = isa;
}

}  // namespace zk
