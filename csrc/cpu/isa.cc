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

// Leaf 7, subleaf 1, EAX bit 4.
bool cpu_has_avx_vnni() {
  unsigned eax = 7;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  if (eax < 1) return false;  // the highest subleaf
  eax = 7;
  ecx = 1;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax & (1u << 4)) != 0;
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
  f.avx_vnni = f.avx2 && cpu_has_avx_vnni();
  return f;
}

constexpr std::array<Isa, 5> kLevels = {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512,
                                        Isa::kAmx};

// "portable, avx2 or avx512"
std::string names_of_levels(const CpuFeatures& features) {
  const Isa highest = highest_isa(features);
  std::string names;
  for (const Isa level : kLevels) {
    if (!has_level(features, level)) continue;
    if (!names.empty()) names += level == highest ? " or " : ", ";
    names += name_of(level);
  }
  return names;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avx_vnni";
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

bool has_level(const CpuFeatures& f, Isa level) {
  switch (level) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return f.avx2;
    case Isa::kAvxVnni:
      return f.avx_vnni || f.avx512_vnni;
    case Isa::kAvx512:
      return f.avx512;
    case Isa::kAmx:
      return f.amx;
  }
  return false;
}

Isa highest_isa(const CpuFeatures& features) {
  Isa highest = Isa::kPortable;
  for (const Isa level : kLevels) {
    if (has_level(features, level)) highest = level;
  }
  return highest;
}

Isa detected_isa() { return highest_isa(cpu_features()); }

Isa resolve_isa(std::string_view override_value, const CpuFeatures& features) {
  const Isa detected = highest_isa(features);
  if (override_value.empty()) return detected;
  const std::string setting = "KTRT_ISA=" + std::string(override_value);
  const std::string advice = "; unset it or set it to " + names_of_levels(features);
  for (const Isa level : kLevels) {
    if (override_value != name_of(level)) continue;
    if (has_level(features, level)) return level;
    const std::string detected_name = std::string(" (") + name_of(detected) + ")";
    if (level < detected)
      throw IsaError(setting + " is not on this machine" + detected_name + advice);
    throw IsaError(setting + " is above what this machine has" + detected_name + advice);
  }
  throw IsaError(setting + " is not known" + advice);
}

Isa active_isa() { return resolve_isa(environment("KTRT_ISA"), cpu_features()); }

const char* name_of(Bf16Arithmetic arithmetic) {
  return arithmetic == Bf16Arithmetic::kDot ? "dot" : "float32";
}

std::optional<Bf16Arithmetic> bf16_override() {
  const std::string value = environment("KTRT_BF16");
  if (value.empty()) return std::nullopt;
  for (const Bf16Arithmetic known : {Bf16Arithmetic::kDot, Bf16Arithmetic::kFloat32}) {
    if (value == name_of(known)) return known;
  }
  throw IsaError("KTRT_BF16=" + value + " is not known; unset it or set it to dot or float32");
}

}  // namespace ktrt
