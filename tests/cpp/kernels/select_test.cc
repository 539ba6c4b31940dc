#include "kernels/select.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/bf16_arithmetic.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

constexpr CpuFeatures kAll{true, true, true, true, true, true};

// BF16, INT8 and INT4 GEMM, shrink, elementwise, dense BF16 and float32, attention; what differs
// for few rows as "many/few".
std::string names(const KernelTable& table) {
  const auto gemm = [](const GemmChoice& choice) {
    const std::string many = choice.many->name;
    return choice.few == choice.many ? many : many + "/" + choice.few->name;
  };
  std::string gemms;
  for (const WeightFormat format : kKtFormats) gemms += gemm(table.gemm(format)) + " ";
  std::string shrink = table.lora_shrink->name;
  if (table.lora_shrink_tiles != nullptr) {
    shrink = std::string(table.lora_shrink_tiles->name) + "/" + shrink;
  }
  return gemms + shrink + " " + table.elementwise->name + " " + table.dense_bf16->name + " " +
         table.dense_f32->name + " " + table.attention->name;
}

TEST(SelectKernels, ByLevel) {
  EXPECT_EQ(names(select_kernels(Isa::kPortable, kAll)),
            "portable portable portable portable portable portable portable portable");
  EXPECT_EQ(names(select_kernels(Isa::kAvx2, kAll)), "avx2 avx2 avx2 avx2 avx2 avx2 avx2 avx2");
  EXPECT_EQ(names(select_kernels(Isa::kAvxVnni, kAll)),
            "avx2 avx_vnni avx_vnni avx2 avx2 avx2 avx2 avx2");
  EXPECT_EQ(names(select_kernels(Isa::kAvx512, kAll)),
            "avx512_bf16 avx512_vnni_bf16 avx512_vnni_bf16 avx512_bf16 avx512 avx512_bf16 avx512 "
            "avx512_bf16");
  EXPECT_EQ(names(select_kernels(Isa::kAmx, kAll)),
            "amx/avx512_bf16 amx/avx512_vnni_bf16 amx/avx512_vnni_bf16 amx/avx512_bf16 avx512 "
            "avx512_bf16 avx512 avx512_bf16");
}

TEST(SelectKernels, FallsBackWhereAFeatureIsMissing) {
  CpuFeatures features = kAll;
  features.amx = false;
  EXPECT_EQ(names(select_kernels(Isa::kAmx, features)),
            "avx512_bf16 avx512_vnni_bf16 avx512_vnni_bf16 avx512_bf16 avx512 avx512_bf16 avx512 "
            "avx512_bf16");
  features.avx512_bf16 = false;
  EXPECT_EQ(names(select_kernels(Isa::kAvx512, features)),
            "avx512 avx512_vnni avx512_vnni avx2 avx512 avx512 avx512 avx512");
  features.avx512_vnni = false;
  EXPECT_EQ(names(select_kernels(Isa::kAvx512, features)),
            "avx512 avx_vnni avx_vnni avx2 avx512 avx512 avx512 avx512");
  EXPECT_EQ(names(select_kernels(Isa::kAmx, CpuFeatures{})),
            "portable portable portable portable portable portable portable portable");
}

TEST(SelectKernels, Avx512VnniStandsInForAvxVnni) {
  CpuFeatures features = kAll;
  features.avx_vnni = false;
  EXPECT_EQ(names(select_kernels(Isa::kAvxVnni, features)),
            "avx2 avx_vnni_evex avx_vnni_evex avx2 avx2 avx2 avx2 avx2");
  features.avx512_vnni = false;
  EXPECT_EQ(names(select_kernels(Isa::kAvxVnni, features)),
            "avx2 avx2 avx2 avx2 avx2 avx2 avx2 avx2");
}

TEST(SelectKernels, Float32MultiplyAddsWhereTheyAreFaster) {
  const auto float32 = [](Isa level) {
    return select_kernels(level, kAll, Bf16Arithmetic::kFloat32);
  };
  EXPECT_EQ(names(float32(Isa::kAvx512)),
            "avx512 avx512_vnni_bf16 avx512_vnni_bf16 avx512_bf16 avx512 avx512 avx512 avx512");
  EXPECT_EQ(names(float32(Isa::kAmx)),
            "amx/avx512_bf16 amx/avx512_vnni_bf16 amx/avx512_vnni_bf16 amx/avx512_bf16 avx512 "
            "avx512 avx512 avx512");
  for (const WeightFormat format : kWeightFormats) {
    if (!is_coded(format)) continue;
    EXPECT_STREQ(float32(Isa::kAvx512).gemm(format).few->name, "avx512") << name_of(format);
  }
  EXPECT_EQ(names(float32(Isa::kAvx2)), names(select_kernels(Isa::kAvx2, kAll)));
}

TEST(Bf16Arithmetic, IsMeasuredOnceAndCanBeForced) {
  ASSERT_EQ(unsetenv("KTRT_BF16"), 0);
  const Bf16Arithmetic measured = active_bf16_arithmetic();
  EXPECT_EQ(measured, faster_bf16_arithmetic());
  EXPECT_TRUE(cpu_features().avx512_bf16 || measured == Bf16Arithmetic::kFloat32);
  for (const Bf16Arithmetic forced : {Bf16Arithmetic::kDot, Bf16Arithmetic::kFloat32}) {
    ASSERT_EQ(setenv("KTRT_BF16", name_of(forced), 1), 0);
    EXPECT_EQ(active_bf16_arithmetic(), forced);
  }
  ASSERT_EQ(unsetenv("KTRT_BF16"), 0);
}

TEST(SelectKernels, CodedFormatsByLevelAndFeature) {
  CpuFeatures no_bf16 = kAll;
  no_bf16.avx512_bf16 = false;
  for (const WeightFormat format : kWeightFormats) {
    if (!is_coded(format)) continue;
    const auto few = [&](Isa level, const CpuFeatures& features) {
      return std::string(select_kernels(level, features).gemm(format).few->name);
    };
    EXPECT_EQ(few(Isa::kPortable, kAll), "portable") << name_of(format);
    EXPECT_EQ(few(Isa::kAvx2, kAll), "avx2") << name_of(format);
    EXPECT_EQ(few(Isa::kAvx512, no_bf16), "avx512") << name_of(format);
    EXPECT_EQ(few(Isa::kAmx, kAll), "avx512_bf16") << name_of(format);
    EXPECT_EQ(select_kernels(Isa::kAvx512, kAll).gemm(format).many->name,
              std::string("avx512_bf16"));
  }
}

TEST(SelectKernels, TilesFromSomeNumberOfRowsOn) {
  const KernelTable table = select_kernels(Isa::kAmx, kAll);
  for (const WeightFormat format : kWeightFormats) {
    SCOPED_TRACE(name_of(format));
    const GemmChoice& choice = table.gemm(format);
    ASSERT_GT(choice.many_from, 1);
    EXPECT_TRUE(choice.many->tile_order);
    EXPECT_EQ(&choice.for_rows(1), choice.few);
    EXPECT_EQ(&choice.for_rows(choice.many_from - 1), choice.few);
    EXPECT_EQ(&choice.for_rows(choice.many_from), choice.many);
  }
}

// A GEMM in tile order needs a shrink that reads it.
TEST(SelectKernels, ShrinksReadWhatTheGemmsRead) {
  const KernelTable amx = select_kernels(Isa::kAmx, kAll);
  EXPECT_EQ(&amx.shrink_for(*amx.gemm(WeightFormat::kBf16).many), amx.lora_shrink_tiles);
  EXPECT_EQ(&amx.shrink_for(*amx.gemm(WeightFormat::kInt8).many), amx.lora_shrink_tiles);
  EXPECT_EQ(&amx.shrink_for(*amx.gemm(WeightFormat::kBf16).few), amx.lora_shrink);
  for (const Isa level : {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512}) {
    const KernelTable table = select_kernels(level, kAll);
    EXPECT_FALSE(table.gemm(WeightFormat::kBf16).many->tile_order ||
                 table.gemm(WeightFormat::kInt8).many->tile_order);
  }
}

TEST(SelectKernels, FixedOnesDoNotDependOnTheNumberOfRows) {
  const KernelTable plain = select_kernels(Isa::kAmx, kAll);
  EXPECT_FALSE(plain.fixed);
  const KernelTable table = fixed(plain);
  EXPECT_TRUE(table.fixed);
  EXPECT_EQ(names(table),
            "amx_fixed amx_fixed/avx512_vnni_bf16 amx_fixed/avx512_vnni_bf16 amx/amx avx512 "
            "avx512_bf16 avx512 avx512_bf16");
  EXPECT_NE(table.gemm(WeightFormat::kBf16).many->side_by_side, nullptr);
  for (const Isa level : {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512}) {
    const KernelTable below = select_kernels(level, kAll);
    EXPECT_TRUE(below.fixed);
    EXPECT_EQ(names(fixed(below)), names(below));
  }
}

TEST(GemmKernel, TilesAreFewAndEvenlyFilled) {
  GemmKernel tiles{};
  tiles.tile_order = true;
  for (int rows = 1; rows <= 512; ++rows) {
    const int count = (rows + 15) / 16;
    const int in_tile = tiles.tile_rows(rows);
    ASSERT_LE(in_tile, 16);
    ASSERT_EQ((rows + in_tile - 1) / in_tile, count) << rows;
    ASSERT_LT(in_tile * count, rows + count) << rows;
    ASSERT_EQ(GemmKernel{}.tile_rows(rows), 1);
  }
}

// A variant's name says what it needs.
bool allowed(const std::string& name, Isa level, const CpuFeatures& f) {
  if (name == "portable") return true;
  if (name == "avx2") return level >= Isa::kAvx2 && f.avx2;
  if (name == "avx_vnni") return level >= Isa::kAvxVnni && f.avx_vnni;
  if (name == "avx_vnni_evex") return level >= Isa::kAvxVnni && f.avx512_vnni;
  if (name == "avx512") return level >= Isa::kAvx512 && f.avx512;
  if (name == "avx512_bf16") return level >= Isa::kAvx512 && f.avx512_bf16;
  if (name == "avx512_vnni") return level >= Isa::kAvx512 && f.avx512_vnni;
  if (name == "avx512_vnni_bf16") return allowed("avx512_vnni", level, f) && f.avx512_bf16;
  if (name == "amx") return level >= Isa::kAmx && f.amx;
  ADD_FAILURE() << "unknown variant " << name;
  return false;
}

TEST(SelectKernels, NeverAboveTheLevelOrTheFeatures) {
  for (const Isa level : testing::kIsaLevels) {
    for (unsigned mask = 0; mask < testing::kFeatureMasks; ++mask) {
      const CpuFeatures features = testing::features_of(mask);
      const KernelTable table = select_kernels(level, features);
      std::vector<const char*> chosen = {table.elementwise->name, table.dense_bf16->name,
                                         table.dense_f32->name, table.attention->name};
      for (const ShrinkKernel* shrink : testing::shrinks(table)) chosen.push_back(shrink->name);
      for (const GemmChoice& gemm : table.gemms) {
        chosen.insert(chosen.end(), {gemm.few->name, gemm.many->name});
      }
      for (const char* name : chosen) {
        EXPECT_TRUE(allowed(name, level, features)) << name << " " << name_of(level) << " " << mask;
      }
    }
  }
}

// The list that the other tests go through.
TEST(Variants, AreAllFound) {
  for (const WeightFormat format : kKtFormats) {
    EXPECT_EQ(testing::all_gemms(format).size(), quantizes_rows(format) ? 10u : 8u)
        << name_of(format);
  }
  EXPECT_EQ(testing::all_shrinks().size(), 5u);
  EXPECT_EQ(testing::variants_of(testing::elementwises).size(), 3u);
  EXPECT_EQ(testing::variants_of(testing::dense_kernels).size(), 4u);
  EXPECT_EQ(testing::variants_of(testing::dense_f32_kernels).size(), 3u);
  EXPECT_EQ(testing::variants_of(testing::attention_kernels).size(), 4u);
}

}  // namespace
}  // namespace ktrt
