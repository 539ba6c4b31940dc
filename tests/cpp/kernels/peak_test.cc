#include "kernels/peak.h"

#include <gtest/gtest.h>

#include <string>

namespace ktrt {
namespace {

constexpr CpuFeatures kAll{true, true, true, true, true, true};

std::string names(Isa level, const CpuFeatures& features) {
  std::string text;
  for (const PeakLoop* loop : peak_loops(level, features)) {
    text += std::string(text.empty() ? "" : " ") + loop->name;
  }
  return text;
}

TEST(PeakLoops, ByLevelAndFeature) {
  EXPECT_EQ(names(Isa::kPortable, kAll), "");
  EXPECT_EQ(names(Isa::kAvx2, kAll), "avx2");
  EXPECT_EQ(names(Isa::kAvxVnni, kAll), "avx2 avx_vnni");
  EXPECT_EQ(names(Isa::kAvx512, kAll), "avx2 avx_vnni avx512 avx512_bf16 avx512_vnni");
  EXPECT_EQ(names(Isa::kAmx, kAll),
            "avx2 avx_vnni avx512 avx512_bf16 avx512_vnni amx_bf16 amx_int8");
  CpuFeatures features = kAll;
  features.avx512_bf16 = features.amx = features.avx_vnni = false;
  EXPECT_EQ(names(Isa::kAmx, features), "avx2 avx_vnni_evex avx512 avx512_vnni");
}

// The operands are all 1, so the sums are the number of multiply-adds: none was optimised away.
TEST(PeakLoops, ComputeWhatTheyCount) {
  const auto found = peak_loops(detected_isa(), cpu_features());
  if (found.empty()) GTEST_SKIP() << "this machine has no AVX2";
  for (const PeakLoop* loop : found) {
    EXPECT_EQ(loop->run(0), 0.0) << loop->name;
    EXPECT_EQ(loop->run(1000), 1000.0 * static_cast<double>(loop->multiply_adds)) << loop->name;
    EXPECT_GT(measure_peak(*loop, 0.001), 1e8) << loop->name;
  }
}

}  // namespace
}  // namespace ktrt
