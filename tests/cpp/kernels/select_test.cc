#include "kernels/select.h"

#include <gtest/gtest.h>

#include <string>

#include "kernels/variants.h"

namespace ktrt {
namespace {

constexpr CpuFeatures kAll{true, true, true, true, true};

std::string names(const KernelTable& table) {
  return std::string(table.gemm_bf16->name) + " " + table.gemm_int8->name + " " +
         table.lora_shrink->name + " " + table.elementwise->name;
}

TEST(SelectKernels, ByLevel) {
  EXPECT_EQ(names(select_kernels(Isa::kPortable, kAll)), "portable portable portable portable");
  EXPECT_EQ(names(select_kernels(Isa::kAvx2, kAll)), "avx2 avx2 avx2 avx2");
  EXPECT_EQ(names(select_kernels(Isa::kAvx512, kAll)),
            "avx512_bf16 avx512_vnni avx512_bf16 avx512");
}

TEST(SelectKernels, FallsBackWhereAFeatureIsMissing) {
  CpuFeatures features = kAll;
  features.avx512_bf16 = features.amx = false;
  EXPECT_EQ(names(select_kernels(Isa::kAvx512, features)), "avx2 avx512_vnni avx2 avx512");
  features.avx512_vnni = false;
  EXPECT_EQ(names(select_kernels(Isa::kAvx512, features)), "avx2 avx2 avx2 avx512");
  EXPECT_EQ(names(select_kernels(Isa::kAmx, CpuFeatures{})), "portable portable portable portable");
}

// A variant's name says what it needs.
bool allowed(const std::string& name, Isa level, const CpuFeatures& f) {
  if (name == "portable") return true;
  if (name == "avx2") return level >= Isa::kAvx2 && f.avx2;
  if (name == "avx512") return level >= Isa::kAvx512 && f.avx512;
  if (name == "avx512_bf16") return level >= Isa::kAvx512 && f.avx512_bf16;
  if (name == "avx512_vnni") return level >= Isa::kAvx512 && f.avx512_vnni;
  if (name == "amx") return level >= Isa::kAmx && f.amx;
  ADD_FAILURE() << "unknown variant " << name;
  return false;
}

TEST(SelectKernels, NeverAboveTheLevelOrTheFeatures) {
  for (const Isa level : testing::kIsaLevels) {
    for (unsigned mask = 0; mask < testing::kFeatureMasks; ++mask) {
      const CpuFeatures features = testing::features_of(mask);
      const KernelTable table = select_kernels(level, features);
      for (const char* name : {table.gemm_bf16->name, table.gemm_int8->name,
                               table.lora_shrink->name, table.elementwise->name}) {
        EXPECT_TRUE(allowed(name, level, features)) << name << " " << name_of(level) << " " << mask;
      }
    }
  }
}

TEST(SelectKernels, EveryFamilyHasAPortableVariant) {
  EXPECT_GE(testing::variants_of(&KernelTable::gemm_bf16).size(), 3u);
  EXPECT_GE(testing::variants_of(&KernelTable::gemm_int8).size(), 3u);
  EXPECT_GE(testing::variants_of(&KernelTable::lora_shrink).size(), 3u);
  EXPECT_GE(testing::variants_of(&KernelTable::elementwise).size(), 3u);
}

}  // namespace
}  // namespace ktrt
