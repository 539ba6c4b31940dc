#include "moe/expert_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace ktrt {
namespace {

constexpr MoeShape kShape{3, 2, 160, 700};
constexpr Projection kAllProjections[] = {Projection::kGate, Projection::kUp, Projection::kDown};

class ExpertWeightsTest : public ::testing::TestWithParam<std::tuple<WeightFormat, int>> {
 protected:
  const WeightFormat format_ = std::get<0>(GetParam());
  const int parts_ = std::get<1>(GetParam());
  ExpertWeights weights_{kShape, format_, parts_};
  void SetUp() override { weights_.allocate(); }
};

INSTANTIATE_TEST_SUITE_P(Parts, ExpertWeightsTest,
                         ::testing::Combine(::testing::ValuesIn(kWeightFormats),
                                            ::testing::Values(1, 2, 3, 5)),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) + "_" +
                                  std::to_string(std::get<1>(test.param));
                         });

TEST_P(ExpertWeightsTest, PartsDivideTheStrips) {
  EXPECT_EQ(weights_.parts(), parts_);
  for (const Projection projection : kAllProjections) {
    const int strips = weights_.layout(projection).strips();
    EXPECT_EQ(weights_.first_strip(projection, 0), 0);
    EXPECT_EQ(weights_.first_strip(projection, parts_), strips);
    int rows = 0;
    for (int part = 0; part < parts_; ++part) {
      const PackedLayout& shard = weights_.matrix(0, projection, part).layout;
      EXPECT_EQ(shard.strips(), weights_.first_strip(projection, part + 1) -
                                    weights_.first_strip(projection, part));
      EXPECT_GE(shard.strips(), strips / parts_);
      EXPECT_LE(shard.strips(), strips / parts_ + 1);
      EXPECT_EQ(shard.k(), weights_.layout(projection).k());
      rows += shard.n();
    }
    EXPECT_EQ(rows, weights_.layout(projection).n());
  }
}

// Codes, scales and sums of all matrices lie apart, and every strip inside its part's matrix.
TEST_P(ExpertWeightsTest, StripsAreFoundWhereTheirMatrixLies) {
  std::vector<std::pair<std::uintptr_t, std::size_t>> memory;
  const auto add = [&](const void* data, std::size_t bytes) {
    memory.emplace_back(reinterpret_cast<std::uintptr_t>(data), bytes);
  };
  for (int expert = 0; expert < kShape.num_experts; ++expert) {
    for (const Projection projection : kAllProjections) {
      for (int part = 0; part < parts_; ++part) {
        const PackedMatrix matrix = weights_.matrix(expert, projection, part);
        const PackedLayout& layout = matrix.layout;
        ASSERT_EQ(reinterpret_cast<std::uintptr_t>(matrix.codes) % kCacheLine, 0u);
        add(matrix.codes, layout.code_bytes());
        ASSERT_EQ(matrix.scales != nullptr, matrix.layout.scales() > 0);
        ASSERT_EQ(matrix.sums != nullptr, quantizes_rows(format_));
        if (matrix.scales != nullptr) add(matrix.scales, layout.scale_bytes());
        if (matrix.sums != nullptr) add(matrix.sums, layout.sum_bytes());
        for (int local = 0; local < layout.strips(); ++local) {
          const int strip = weights_.first_strip(projection, part) + local;
          const StripRef ref = weights_.strip(expert, projection, strip);
          ASSERT_EQ(ref.block, matrix.codes + layout.block_offset(local));
          ASSERT_EQ(ref.block_rows, layout.block_rows(local));
          ASSERT_EQ(ref.row_in_block, layout.row_in_block(local));
          ASSERT_EQ(ref.first_tile, matrix.codes + layout.tile_offset(local, 0));
          ASSERT_EQ(ref.scales,
                    matrix.scales ? matrix.scales + local * layout.strip_scales() : nullptr);
          ASSERT_EQ(ref.sums, matrix.sums ? matrix.sums + local * 32 : nullptr);
        }
      }
    }
  }
  std::sort(memory.begin(), memory.end());
  for (std::size_t i = 1; i < memory.size(); ++i) {
    ASSERT_LE(memory[i - 1].first + memory[i - 1].second, memory[i].first) << "overlap";
  }
}

TEST(ExpertWeights, RemembersWhatIsLoaded) {
  ExpertWeights weights(kShape, WeightFormat::kBf16, 1);
  EXPECT_FALSE(weights.all_loaded());
  EXPECT_EQ(weights.first_missing(), 0);
  weights.set_loaded(0, true);
  weights.set_loaded(2, true);
  EXPECT_EQ(weights.first_missing(), 1);
  EXPECT_TRUE(weights.loaded(2));
  EXPECT_FALSE(weights.loaded(1));
  weights.set_loaded(1, true);
  EXPECT_TRUE(weights.all_loaded());
  weights.set_loaded(0, false);
  EXPECT_EQ(weights.first_missing(), 0);
}

TEST(ExpertWeights, NoMorePartsThanStrips) {
  EXPECT_NO_THROW(ExpertWeights({1, 1, 64, 96}, WeightFormat::kInt8, 2));
  for (const int parts : {0, -1, 3}) {
    EXPECT_THROW(ExpertWeights({1, 1, 64, 96}, WeightFormat::kInt8, parts), std::invalid_argument);
  }
}

TEST(ExpertWeights, ProjectionNames) {
  EXPECT_STREQ(name_of(Projection::kGate), "gate");
  EXPECT_STREQ(name_of(Projection::kUp), "up");
  EXPECT_STREQ(name_of(Projection::kDown), "down");
}

}  // namespace
}  // namespace ktrt
