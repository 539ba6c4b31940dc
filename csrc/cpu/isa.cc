#include "cpu/isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <string>

namespace ktrt {

namespace {

// AMX tile data (XSAVE component 18) must be requested, once per process
// (Linux Documentation/arch/x86/xstate.rst).
bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
}

// __builtin_cpu_supports of GCC 12 knows no AMX names: CPUID leaf 7, EDX bits 22, 24 and 25.
bool cpu_has_amx() {
  unsigned eax = 7;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (__builtin_cpu_supports("avx512f") == 0) return false;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  constexpr unsigned kBf16TileInt8 = (1u << 22) | (1u << 24) | (1u << 25);
  return (edx & kBf16TileInt8) == kBf16TileInt8;
}

CpuFeatures detect() {
  __builtin_cpu_init();
  CpuFeatures f;
  f.avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
           __builtin_cpu_supports("f16c") != 0;
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") != 0 &&
             __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
             __builtin_cpu_supports("avx512vl") != 0;
  f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16") != 0;
  f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni") != 0;
  f.amx = f.avx512_bf16 && f.avx512_vnni && __builtin_cpu_supports("avx512vbmi") != 0 &&
          cpu_has_amx() && request_amx_permission();
  return f;
}

constexpr std::array<Isa, 4> kLevels = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

// "portable, avx2 or avx512"
std::string names_up_to(Isa highest) {
  std::string names;
  for (const Isa level : kLevels) {
    if (level > highest) break;
    if (!names.empty()) names += level == highest ? " or " : ", ";
    names += name_of(level);
  }
  return names;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
  }
  return "?";
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

Isa detected_isa() {
  const CpuFeatures& f = cpu_features();
  if (f.amx) return Isa::kAmx;
  if (f.avx512) return Isa::kAvx512;
  return f.avx2 ? Isa::kAvx2 : Isa::kPortable;
}

Isa resolve_isa(std::string_view override_value, Isa detected) {
  if (override_value.empty()) return detected;
  for (const Isa level : kLevels) {
    if (override_value != name_of(level)) continue;
    if (level <= detected) return level;
    throw IsaError("KTRT_ISA=" + std::string(override_value) + " is above what this machine has (" +
                   name_of(detected) + "); unset it or set it to " + names_up_to(detected));
  }
  throw IsaError("KTRT_ISA=" + std::string(override_value) +
                 " is not known; unset it or set it to " + names_up_to(detected));
}

Isa active_isa() {
  const char* value = std::getenv("KTRT_ISA");
  return resolve_isa(value == nullptr ? "" : value, detected_isa());
}

}  // namespace ktrt
