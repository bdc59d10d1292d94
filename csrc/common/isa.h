// CPU kernels are compiled once for each instruction set and chosen at run time.
//
// setup.py compiles every csrc/<op>/cpu.cpp once per instruction set, with ZK_ISA naming it; each build lies in a
// namespace of that name. ZK_DECLARE_CPU declares a kernel in all of them and defines zk::name, which calls the best
// one that this processor runs.
#pragma once

namespace zk {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

Isa detected_isa();     // the best that this processor runs
Isa current_isa();      // the one in use: detected, unless set_isa lowered it
void set_isa(Isa isa);  // throws std::invalid_argument above detected_isa()

}  // namespace zk

#if ZK_MANY_ISAS  // csrc/build.py decides
#define ZK_DECLARE_CPU(name, Args)                    \
  namespace baseline { void name(const Args& args); } \
  namespace avx2 { void name(const Args& args); }     \
  namespace avx512 { void name(const Args& args); }   \
  inline void name##_cpu(const Args& args) {          \
    switch (current_isa()) {                          \
      case Isa::avx512: return avx512::name(args);    \
      case Isa::avx2: return avx2::name(args);        \
      default: return baseline::name(args);           \
    }                                                 \
  }
#else
#define ZK_DECLARE_CPU(name, Args)                    \
  namespace baseline { void name(const Args& args); } \
  inline void name##_cpu(const Args& args) { baseline::name(args); }
#endif
