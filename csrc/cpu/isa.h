// Which instruction sets this machine, this build and the user allow.
#pragma once

#include <optional>
#include <stdexcept>
#include <string_view>

namespace ktrt {

// Levels in rising order; each includes the ones below, except that not every processor with
// AVX-512 has VNNI.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512, kAmx };

// Features that the processor has and the operating system lets us use.
struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA, F16C
  bool avx512 = false;       // AVX-512 F, BW, DQ, VL
  bool avx512_bf16 = false;  // VDPBF16PS
  bool avx512_vnni = false;  // VPDPBUSD, of 128 and 256 bits too
  bool amx = false;          // AMX tile, BF16 and INT8, tile data permission granted
  bool avx_vnni = false;     // AVX2 and VPDPBUSD in VEX encoding
};

const char* name_of(Isa isa);

// Read once. Asks the kernel for the permission to use AMX tile data where the processor has it.
const CpuFeatures& cpu_features();

// A value of KTRT_ISA or KTRT_BF16 that cannot be. Python: ktrt.errors.ConfigError.
class IsaError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Whether kernels of the level run. AVX-512 VNNI runs AVX-VNNI's.
bool has_level(const CpuFeatures& features, Isa level);

// The highest level.
Isa highest_isa(const CpuFeatures& features);
// The highest level of this machine.
Isa detected_isa();

// The level in use: detected_isa(), or what KTRT_ISA=portable|avx2|avx_vnni|avx512|amx lowers it
// to. Throws IsaError if KTRT_ISA is unknown or not there.
Isa active_isa();

// active_isa() for a given value of KTRT_ISA; empty means unset.
Isa resolve_isa(std::string_view override_value, const CpuFeatures& features);

// How AVX-512 multiplies BF16 where the processor has both: VDPBF16PS, or float32 multiply-adds.
enum class Bf16Arithmetic { kDot, kFloat32 };
const char* name_of(Bf16Arithmetic arithmetic);

// The value of KTRT_BF16=dot|float32; nullopt if it is unset or empty. Throws IsaError for other
// values.
std::optional<Bf16Arithmetic> bf16_override();

}  // namespace ktrt
