#include "cpu/isa.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ktrt {
namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx};

// The features of a processor whose highest level is this one.
CpuFeatures features_up_to(Isa level) {
  CpuFeatures f;
  f.avx2 = level >= Isa::kAvx2;
  f.avx_vnni = level >= Isa::kAvxVnni;
  f.avx512 = f.avx512_bf16 = f.avx512_vnni = level >= Isa::kAvx512;
  f.amx = level >= Isa::kAmx;
  return f;
}

TEST(ResolveIsa, UnsetTakesWhatTheMachineHas) {
  for (const Isa detected : kAll) {
    EXPECT_EQ(resolve_isa("", features_up_to(detected)), detected);
  }
}

TEST(ResolveIsa, DownwardsOnly) {
  for (const Isa detected : kAll) {
    for (const Isa wanted : kAll) {
      if (wanted <= detected) {
        EXPECT_EQ(resolve_isa(name_of(wanted), features_up_to(detected)), wanted);
        continue;
      }
      try {
        resolve_isa(name_of(wanted), features_up_to(detected));
        ADD_FAILURE() << name_of(wanted) << " accepted on " << name_of(detected);
      } catch (const std::invalid_argument& error) {
        const std::string message = error.what();
        EXPECT_NE(message.find(std::string("KTRT_ISA=") + name_of(wanted)), std::string::npos);
        EXPECT_NE(message.find(std::string("(") + name_of(detected) + ")"), std::string::npos);
      }
    }
  }
}

TEST(ResolveIsa, UnknownIsRefused) {
  for (const char* value : {"sse", "AVX2", "avx512 ", "avx512_bf16", "native", "0"}) {
    try {
      resolve_isa(value, features_up_to(Isa::kAmx));
      ADD_FAILURE() << value << " accepted";
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(value), std::string::npos);
      EXPECT_NE(message.find("portable, avx2, avx_vnni, avx512 or amx"), std::string::npos);
    }
  }
}

TEST(ResolveIsa, VnniIsNotOnEveryProcessorWithAvx512) {
  CpuFeatures f = features_up_to(Isa::kAvx512);
  f.avx_vnni = false;
  EXPECT_EQ(resolve_isa("avx_vnni", f), Isa::kAvxVnni) << "by AVX-512 VNNI";
  f.avx512_vnni = f.avx512_bf16 = false;
  EXPECT_EQ(resolve_isa("", f), Isa::kAvx512);
  try {
    resolve_isa("avx_vnni", f);
    ADD_FAILURE() << "accepted";
  } catch (const IsaError& error) {
    EXPECT_STREQ(error.what(),
                 "KTRT_ISA=avx_vnni is not on this machine (avx512); unset it or set it to "
                 "portable, avx2 or avx512");
  }
}

TEST(Bf16Override, IsOneOfTwo) {
  ASSERT_EQ(unsetenv("KTRT_BF16"), 0);
  EXPECT_EQ(bf16_override(), std::nullopt);
  ASSERT_EQ(setenv("KTRT_BF16", "dot", 1), 0);
  EXPECT_EQ(bf16_override(), Bf16Arithmetic::kDot);
  ASSERT_EQ(setenv("KTRT_BF16", "float32", 1), 0);
  EXPECT_EQ(bf16_override(), Bf16Arithmetic::kFloat32);
  ASSERT_EQ(setenv("KTRT_BF16", "bf16", 1), 0);
  EXPECT_THROW(bf16_override(), IsaError);
  ASSERT_EQ(unsetenv("KTRT_BF16"), 0);
}

TEST(ActiveIsa, ReadsTheEnvironmentEveryTime) {
  ASSERT_EQ(setenv("KTRT_ISA", "portable", 1), 0);
  EXPECT_EQ(active_isa(), Isa::kPortable);
  ASSERT_EQ(setenv("KTRT_ISA", "pentium", 1), 0);
  EXPECT_THROW(active_isa(), std::invalid_argument);
  ASSERT_EQ(setenv("KTRT_ISA", "", 1), 0);
  EXPECT_EQ(active_isa(), detected_isa());
  ASSERT_EQ(unsetenv("KTRT_ISA"), 0);
  EXPECT_EQ(active_isa(), detected_isa());
}

TEST(CpuFeatures, LevelsIncludeTheOnesBelow) {
  const CpuFeatures& f = cpu_features();
  EXPECT_EQ(&f, &cpu_features());
  EXPECT_TRUE(f.avx2 || !f.avx512);
  EXPECT_TRUE(f.avx512 || !(f.avx512_bf16 || f.avx512_vnni));
  EXPECT_TRUE((f.avx512_bf16 && f.avx512_vnni) || !f.amx);
  EXPECT_TRUE(f.avx2 || !f.avx_vnni);
  EXPECT_EQ(detected_isa() >= Isa::kAvx2, f.avx2);
  EXPECT_EQ(detected_isa() >= Isa::kAvx512, f.avx512);
  EXPECT_EQ(detected_isa() == Isa::kAmx, f.amx);
}

}  // namespace
}  // namespace ktrt
