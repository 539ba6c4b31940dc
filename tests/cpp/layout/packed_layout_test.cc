#include "layout/packed_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "helpers/format_reference.h"

namespace ktrt {
namespace {

using Case = std::tuple<WeightFormat, std::pair<int, int>>;

std::string name_of_case(const ::testing::TestParamInfo<Case>& test) {
  const auto& [format, shape] = test.param;
  return std::string(name_of(format)) + "_" + std::to_string(shape.first) + "x" +
         std::to_string(shape.second);
}

class PackedLayoutTest : public ::testing::TestWithParam<Case> {
 protected:
  const WeightFormat format_ = std::get<0>(GetParam());
  const int n_ = std::get<1>(GetParam()).first;
  const int k_ = std::get<1>(GetParam()).second;
  const PackedLayout layout_{format_, n_, k_};
};

// Tails in N and in K of every format, sizes below one tile, and sizes that need padding.
INSTANTIATE_TEST_SUITE_P(
    Shapes, PackedLayoutTest,
    ::testing::Combine(::testing::ValuesIn(kKtFormats),
                       ::testing::Values(std::pair(32, 64), std::pair(288, 2048),
                                         std::pair(1408, 3712), std::pair(96, 7296),
                                         std::pair(1, 1), std::pair(33, 65), std::pair(160, 96),
                                         std::pair(176, 160), std::pair(257, 1793),
                                         std::pair(65, 3585))),
    name_of_case);

TEST_P(PackedLayoutTest, Sizes) {
  EXPECT_EQ(layout_.n(), n_);
  EXPECT_EQ(layout_.k(), k_);
  EXPECT_EQ(layout_.padded_n(), testing::padded_rows(n_));
  EXPECT_EQ(layout_.padded_k(), testing::padded_columns(format_, k_));
  EXPECT_EQ(layout_.strips(), layout_.padded_n() / 32);
  const int bits = testing::reference_of(format_).bits;
  EXPECT_EQ(layout_.row_bytes(), layout_.padded_k() * bits / 8);
  EXPECT_EQ(layout_.code_bytes(), static_cast<std::size_t>(layout_.padded_n()) *
                                      static_cast<std::size_t>(layout_.padded_k() * bits / 8));
}

TEST_P(PackedLayoutTest, TilesLieWhereTheFormulaSays) {
  const auto byte_of = [&](int n, int k) {
    return testing::packed_byte(format_, layout_.padded_n(), layout_.padded_k(), n, k);
  };
  const int tile_k = layout_.traits().tile_k;
  for (int strip = 0; strip < layout_.strips(); ++strip) {
    for (int k0 = 0; k0 < layout_.padded_k(); k0 += tile_k) {
      ASSERT_EQ(layout_.tile_offset(strip, k0), byte_of(strip * 32, k0)) << strip << " " << k0;
    }
  }
}

// How a kernel walks a strip: from its n-block, through the k-blocks, tile after tile.
TEST_P(PackedLayoutTest, BlocksLeadToTheTiles) {
  const FormatTraits& p = layout_.traits();
  for (int strip = 0; strip < layout_.strips(); ++strip) {
    ASSERT_EQ(layout_.block_rows(strip) % 32, 0);
    ASSERT_LE(layout_.block_rows(strip), p.block_rows);
    for (int kb = 0; kb < layout_.padded_k(); kb += p.block_k) {
      const int columns = std::min(p.block_k, layout_.padded_k() - kb);
      const std::size_t chunk = layout_.block_offset(strip) +
                                static_cast<std::size_t>((kb * layout_.block_rows(strip) +
                                                          layout_.row_in_block(strip) * columns) *
                                                         p.bits / 8);
      for (int tile = 0; tile < columns / p.tile_k; ++tile) {
        ASSERT_EQ(layout_.tile_offset(strip, kb + tile * p.tile_k),
                  chunk + static_cast<std::size_t>(tile * kTileBytes));
      }
    }
  }
}

TEST_P(PackedLayoutTest, TilesCoverTheBufferOnce) {
  std::vector<bool> seen(layout_.code_bytes() / kTileBytes, false);
  for (int strip = 0; strip < layout_.strips(); ++strip) {
    for (int k0 = 0; k0 < layout_.padded_k(); k0 += layout_.traits().tile_k) {
      const std::size_t offset = layout_.tile_offset(strip, k0);
      ASSERT_EQ(offset % kTileBytes, 0u);
      ASSERT_FALSE(seen.at(offset / kTileBytes));
      seen[offset / kTileBytes] = true;
    }
  }
  EXPECT_EQ(std::count(seen.begin(), seen.end(), false), 0);
}

TEST(FormatTraits, NamesAreParsed) {
  EXPECT_STREQ(name_of(WeightFormat::kBf16), "bf16");
  for (const WeightFormat format : kWeightFormats) {
    EXPECT_EQ(parse_format(name_of(format)), format);
    EXPECT_EQ(traits_of(format).format, format);
  }
  EXPECT_THROW(parse_format("fp4"), std::invalid_argument);
  EXPECT_THROW(parse_format(""), std::invalid_argument);
}

// Tiles, which kernels read at once, and the blocks that are made of them.
TEST(FormatTraits, TilesFillTheirBytes) {
  for (const FormatTraits& traits : kFormatTraits) {
    EXPECT_EQ(kStripRows * traits.tile_k * traits.bits, kTileBytes * 8) << traits.name;
    EXPECT_EQ(traits.block_k % traits.tile_k, 0) << traits.name;
    EXPECT_EQ(traits.block_rows % kStripRows, 0) << traits.name;
    EXPECT_EQ(traits.codec == nullptr, is_coded(traits.format)) << traits.name;
    if (traits.codec == nullptr) continue;
    EXPECT_EQ(traits.codec->add_sums != nullptr, traits.quantizes_rows()) << traits.name;
    EXPECT_EQ(traits.quantizes_rows(), PackedLayout(traits.format, 1, 1).sum_bytes() > 0)
        << traits.name;
  }
}

TEST(PackedLayout, LargeMatricesDoNotOverflow) {
  const PackedLayout layout(WeightFormat::kBf16, 65536, 65536);
  EXPECT_EQ(layout.code_bytes(), std::size_t{1} << 33);
  EXPECT_EQ(layout.tile_offset(layout.strips() - 1, 65536 - 32), (std::size_t{1} << 33) - 2048);
}

}  // namespace
}  // namespace ktrt
