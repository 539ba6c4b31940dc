// Every variant of a kernel family that can be selected on any machine.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "kernels/select.h"

namespace ktrt::testing {

template <class Kernel>
struct Variant {
  const Kernel* kernel;
  bool runs;  // on this machine

  friend std::ostream& operator<<(std::ostream& out, const Variant& variant) {
    return out << variant.kernel->name;
  }
};

// Bit i of `mask` is the i-th feature.
inline CpuFeatures features_of(unsigned mask) {
  return {(mask & 1) != 0, (mask & 2) != 0, (mask & 4) != 0, (mask & 8) != 0, (mask & 16) != 0};
}
inline constexpr unsigned kFeatureMasks = 32;
inline constexpr Isa kIsaLevels[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

inline bool includes(const CpuFeatures& all, const CpuFeatures& some) {
  return (all.avx2 || !some.avx2) && (all.avx512 || !some.avx512) &&
         (all.avx512_bf16 || !some.avx512_bf16) && (all.avx512_vnni || !some.avx512_vnni) &&
         (all.amx || !some.amx);
}

// A variant runs here if a machine with a part of our features would choose it.
template <class Kernel>
std::vector<Variant<Kernel>> variants_of(const Kernel* KernelTable::*family) {
  std::vector<Variant<Kernel>> variants;
  for (const Isa level : kIsaLevels) {
    for (unsigned mask = 0; mask < kFeatureMasks; ++mask) {
      const CpuFeatures features = features_of(mask);
      const Kernel* kernel = select_kernels(level, features).*family;
      auto known = std::find_if(variants.begin(), variants.end(),
                                [&](const auto& variant) { return variant.kernel == kernel; });
      if (known == variants.end()) known = variants.insert(known, {kernel, false});
      known->runs = known->runs || includes(cpu_features(), features);
    }
  }
  return variants;
}

// A test of one variant, skipped where the machine cannot run it.
template <class Kernel>
class VariantTest : public ::testing::TestWithParam<Variant<Kernel>> {
 protected:
  void SetUp() override {
    if (!this->GetParam().runs) GTEST_SKIP() << this->GetParam() << " is not available here";
  }
  const Kernel& kernel() const { return *this->GetParam().kernel; }
};

template <class Kernel>
std::string variant_name(const ::testing::TestParamInfo<Variant<Kernel>>& variant) {
  return variant.param.kernel->name;
}

}  // namespace ktrt::testing
