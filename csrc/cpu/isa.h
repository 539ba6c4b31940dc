// Which instruction sets this machine, this build and the user allow.
#pragma once

#include <stdexcept>
#include <string_view>

namespace ktrt {

// Levels in rising order; each includes the ones below.
enum class Isa { kPortable, kAvx2, kAvx512, kAmx };

// Features that the processor has and the operating system lets us use.
struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA, F16C
  bool avx512 = false;       // AVX-512 F, BW, DQ, VL
  bool avx512_bf16 = false;  // VDPBF16PS
  bool avx512_vnni = false;  // VPDPBUSD
  bool amx = false;          // AMX tile, BF16 and INT8, tile data permission granted
};

const char* name_of(Isa isa);

// Read once. Asks the kernel for the permission to use AMX tile data where the processor has it.
const CpuFeatures& cpu_features();

// A value of KTRT_ISA that cannot be. Python: ktrt.errors.ConfigError.
class IsaError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The highest level of this machine.
Isa detected_isa();

// The level in use: detected_isa(), or what KTRT_ISA=portable|avx2|avx512|amx lowers it to.
// Throws IsaError if KTRT_ISA is unknown or above detected_isa().
Isa active_isa();

// active_isa() for a given value of KTRT_ISA; empty means unset.
Isa resolve_isa(std::string_view override_value, Isa detected);

}  // namespace ktrt
