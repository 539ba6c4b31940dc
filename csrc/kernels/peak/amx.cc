#include "kernels/amx/tile_ops.h"
#include "kernels/peak_loop.h"

namespace ktrt {
namespace {

#define TDP4(name)                                                     \
  name " %tmm6, %tmm4, %tmm0\n\t" name " %tmm7, %tmm4, %tmm1\n\t" name \
       " %tmm6, %tmm5, %tmm2\n\t" name " %tmm7, %tmm5, %tmm3\n\t"

// Four accumulators: a multiplication starts every 16 cycles and takes 52.
constexpr long kTiles = 4;
constexpr int kTileElements = kTileRows * 16;

// Fills the operands with `ones`, 1 KB of the operand's 1, and clears the accumulators.
void start(const void* ones) {
  HardwareTiles::configure(kTileRows);
  HardwareTiles::load<4>(ones, 64);
  HardwareTiles::load<5>(ones, 64);
  HardwareTiles::load<6>(ones, 64);
  HardwareTiles::load<7>(ones, 64);
}

template <class Number>
double finish() {
  alignas(64) Number c[kTileElements];
  double total = 0;
  const auto add = [&] {
    for (const Number each : c) total += static_cast<double>(each);
  };
  asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(c), "r"(64L) : "memory");
  add();
  asm volatile("tilestored %%tmm1, (%0,%1,1)" : : "r"(c), "r"(64L) : "memory");
  add();
  asm volatile("tilestored %%tmm2, (%0,%1,1)" : : "r"(c), "r"(64L) : "memory");
  add();
  asm volatile("tilestored %%tmm3, (%0,%1,1)" : : "r"(c), "r"(64L) : "memory");
  add();
  HardwareTiles::release();
  return total;
}

double run_bf16(long iterations) noexcept {
  alignas(64) uint16_t ones[2 * kTileElements];
  for (uint16_t& one : ones) one = 0x3f80;
  start(ones);
  for (long i = 0; i < iterations; ++i) asm volatile(TDP4("tdpbf16ps"));
  return finish<float>();
}

double run_int8(long iterations) noexcept {
  alignas(64) int8_t ones[4 * kTileElements];
  for (int8_t& one : ones) one = 1;
  start(ones);
  for (long i = 0; i < iterations; ++i) asm volatile(TDP4("tdpbssd"));
  return finish<int32_t>();
}

}  // namespace

extern const PeakLoop peak_amx[2];
const PeakLoop peak_amx[2] = {
    {"amx_bf16", "tdpbf16ps", "bf16", kTiles* kTileElements * 32, run_bf16},
    {"amx_int8", "tdpbssd", "int8", kTiles* kTileElements * 64, run_int8},
};

}  // namespace ktrt
