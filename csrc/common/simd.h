// The registers of one instruction set. Compiled once for each of them.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace zk::ZK_ISA {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class W>
struct RegisterOf {
  typedef W type __attribute__((vector_size(register_bytes)));
  typedef W anywhere __attribute__((vector_size(register_bytes), aligned(alignof(W)), may_alias));  // in memory
};

// The compiler's vector type: + and * work on every lane, a W beside them counts for every lane, and [] is one lane.
// The compiler makes a product and a sum one instruction where the processor has it.
template <class W>
using Register = typename RegisterOf<W>::type;

template <class W>
constexpr int lanes = register_bytes / int(sizeof(W));

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class W>
constexpr int64_t whole_lanes(int64_t n) {
  return (n + lanes<W> - 1) / lanes<W> * lanes<W>;
}

// From any address.
template <class W>
ZK_HD Register<W> load(const W* from) {
  return *reinterpret_cast<const typename RegisterOf<W>::anywhere*>(from);
}

template <class W>
ZK_HD void store(W* to, Register<W> x) {
  *reinterpret_cast<typename RegisterOf<W>::anywhere*>(to) = x;
}

// The lanes one after another, of one register or of several next to each other.
template <class W>
ZK_HD W* elements(Register<W>* x) {
  return reinterpret_cast<W*>(x);
}

template <class W>
ZK_HD W sum_lanes(Register<W> x) {
  W total = 0;
  for (int lane = 0; lane < lanes<W>; ++lane) total += x[lane];
  return total;
}

}  // namespace zk::ZK_ISA
