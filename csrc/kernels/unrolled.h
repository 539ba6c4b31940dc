// Loops that are unrolled before the compiler looks at the arrays they index: register blocks then
// are registers from the start. Loops with an unrolling pragma, nested, leave such arrays in memory
// around the main loop, which takes as long as a key of 128 numbers does. Included by the kernels'
// ISA files only.
#pragma once

#define KTRT_INLINE inline __attribute__((always_inline))

namespace ktrt {
namespace {

template <int kValue>
struct Index {
  static constexpr int value = kValue;
  constexpr operator int() const { return kValue; }
};

// f(Index<0>), f(Index<1>), … f(Index<kCount - 1>).
template <int kCount, int kFrom = 0, class Function>
KTRT_INLINE void unrolled(Function f) {
  if constexpr (kFrom < kCount) {
    f(Index<kFrom>{});
    unrolled<kCount, kFrom + 1>(f);
  }
}

}  // namespace
}  // namespace ktrt
