// Every variant of a kernel family that can be selected on any machine.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "kernels/select.h"
#include "layout/packed_layout.h"

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
  return {(mask & 1) != 0, (mask & 2) != 0,  (mask & 4) != 0,
          (mask & 8) != 0, (mask & 16) != 0, (mask & 32) != 0};
}
inline constexpr unsigned kFeatureMasks = 64;
inline constexpr Isa kIsaLevels[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512,
                                     Isa::kAmx};

inline bool includes(const CpuFeatures& all, const CpuFeatures& some) {
  return (all.avx2 || !some.avx2) && (all.avx512 || !some.avx512) &&
         (all.avx512_bf16 || !some.avx512_bf16) && (all.avx512_vnni || !some.avx512_vnni) &&
         (all.amx || !some.amx) && (all.avx_vnni || !some.avx_vnni);
}

// The kernels of one family in a table.
inline std::vector<const ShrinkKernel*> shrinks(const KernelTable& table) {
  if (table.lora_shrink_tiles == nullptr) return {table.lora_shrink};
  return {table.lora_shrink, table.lora_shrink_tiles};
}
inline std::vector<const ElementwiseKernels*> elementwises(const KernelTable& table) {
  return {table.elementwise};
}

inline std::vector<const AttentionKernel*> attention_kernels(const KernelTable& table) {
  return {table.attention};
}

inline std::vector<const DenseKernel*> dense_kernels(const KernelTable& table) {
  return {table.dense_bf16};
}

inline std::vector<const DenseF32Kernel*> dense_f32_kernels(const KernelTable& table) {
  return {table.dense_f32};
}

// A variant runs here if a machine with a part of our features would choose it.
template <class KernelsIn>
auto variants_of(const KernelsIn& kernels_in) {
  using Kernel = std::remove_const_t<
      std::remove_pointer_t<typename decltype(kernels_in(KernelTable{}))::value_type>>;
  std::vector<Variant<Kernel>> variants;
  for (const Isa level : kIsaLevels) {
    for (unsigned mask = 0; mask < kFeatureMasks; ++mask) {
      const CpuFeatures features = features_of(mask);
      for (const Kernel* kernel : kernels_in(select_kernels(level, features))) {
        auto known = std::find_if(variants.begin(), variants.end(),
                                  [&](const auto& variant) { return variant.kernel == kernel; });
        if (known == variants.end()) known = variants.insert(known, {kernel, false});
        known->runs = known->runs || includes(cpu_features(), features);
      }
    }
  }
  return variants;
}

// All GEMMs of a format, those on emulated AMX tiles too.
inline std::vector<Variant<GemmKernel>> all_gemms(WeightFormat format) {
  auto variants = variants_of([format](const KernelTable& table) {
    const GemmChoice& gemm = table.gemm(format);
    std::vector kernels{gemm.few, gemm.many};
    if (gemm.many->fixed != nullptr) kernels.push_back(gemm.many->fixed);
    return kernels;
  });
  // Around the tiles is AVX-512 code.
  const bool runs = cpu_features().avx512_bf16 && cpu_features().avx512_vnni;
  variants.push_back({&emulated_amx_gemm(format), runs});
  variants.push_back({emulated_amx_gemm(format).fixed, runs});
  return variants;
}

inline std::vector<Variant<ShrinkKernel>> all_shrinks() {
  auto variants = variants_of(shrinks);
  variants.push_back({&emulated_amx_shrink(), cpu_features().avx512_bf16});
  return variants;
}

inline std::vector<Variant<GemmKernel>> all_dense_tiles() {
  auto variants = variants_of([](const KernelTable& table) {
    std::vector<const GemmKernel*> kernels;
    if (table.dense_tiles != nullptr) kernels.push_back(table.dense_tiles);
    return kernels;
  });
  variants.push_back({&emulated_amx_dense(), cpu_features().avx512_bf16});
  return variants;
}

inline bool is_amx(const ShrinkKernel& kernel) {
  return std::string(kernel.name).starts_with("amx");
}

// Numbers of rows up to `most`: all that registers and one tile hold, with what is left over, and
// those around further tiles.
inline std::vector<int> row_counts(int most) {
  std::vector<int> counts;
  for (int count = 1; count <= most; ++count) {
    if (count <= 20 || count % 16 <= 1 || count % 16 == 15 || count == most)
      counts.push_back(count);
  }
  return counts;
}

struct FormatVariant {
  WeightFormat format;
  Variant<GemmKernel> variant;
  friend std::ostream& operator<<(std::ostream& out, const FormatVariant& v) {
    return out << name_of(v.format) << " " << v.variant;
  }
};

// Every GEMM variant of every format.
inline std::vector<FormatVariant> all_variants() {
  std::vector<FormatVariant> all;
  for (const WeightFormat format : kKtFormats) {
    for (const auto& variant : all_gemms(format)) all.push_back({format, variant});
  }
  return all;
}

inline std::string name_of_variant(const FormatVariant& v) {
  return std::string(name_of(v.format)) + "_" + v.variant.kernel->name;
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
