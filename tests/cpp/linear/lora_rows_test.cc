// Both kinds of linears with a LoRA for each row: a row has the same bits next to others, alone,
// and in a layer whose active LoRA is the row's.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/bf16.h"
#include "helpers/linear_case.h"
#include "kernels/variants.h"
#include "linear/dense_linear.h"
#include "linear/packed_linear.h"

namespace ktrt {
namespace {

using testing::at;
using testing::engine_of;
using testing::LinearCase;
using testing::message_of;
using testing::view_of;

struct LoraValues {
  LoraValues(const LinearCase& c, int number, int rank_) : rank(rank_) {
    testing::Random random(static_cast<std::uint64_t>(1000 * number + rank));
    a = random.normals(at(rank, c.in, 0), 1.0f / std::sqrt(static_cast<float>(c.in)));
    b = random.normals(at(c.out, rank, 0));
  }
  void load(auto& linear, const LinearCase& c, int number) const {
    linear.load_lora(number, view_of(a, {rank, c.in}, "a"), view_of(b, {c.out, rank}, "b"));
  }
  int rank;
  std::vector<float> a, b;
};

// LoRAs 3, 7 and 8 of different ranks, and 3 · 0.5 + 8 active.
template <class Linear>
std::unique_ptr<Linear> with_loras(const LinearCase& c, std::shared_ptr<Engine> engine, int rank) {
  auto linear = c.linear<Linear>(std::move(engine));
  LoraValues(c, 3, rank).load(*linear, c, 3);
  LoraValues(c, 7, rank / 2 + 1).load(*linear, c, 7);
  LoraValues(c, 8, 40).load(*linear, c, 8);
  linear->load_empty_lora(9);
  linear->activate_loras(std::vector<int>{3, 8}, std::vector<float>{0.5f, 1.0f});
  return linear;
}

std::vector<std::uint16_t> row_of(const LinearCase& c, const std::vector<std::uint16_t>& y, int r) {
  const auto from = y.begin() + static_cast<std::ptrdiff_t>(at(r, c.out, 0));
  return std::vector<std::uint16_t>(from, from + c.out);
}

template <class Linear>
void expect_rows_alone(const LinearCase& c, int threads, const KernelTable& table, int rank) {
  const auto engine = engine_of(threads, table);
  const auto linear = with_loras<Linear>(c, engine, rank);
  const auto sum = c.run(*linear);
  const auto base = c.run(*c.linear<Linear>(engine));
  std::map<std::int32_t, std::vector<std::uint16_t>> expected = {
      {kBaseRow, base}, {kIdleRow, base}, {9, base}, {kActiveRow, sum}};
  for (const int number : {3, 7, 8}) {
    testing::apply_lora(*linear, number);
    expected[number] = c.run(*linear);
    ASSERT_NE(expected[number], base);
  }
  linear->activate_loras(std::vector<int>{3, 8}, std::vector<float>{0.5f, 1.0f});
  ASSERT_NE(sum, expected[8]);
  const std::int32_t empty = 9;
  ASSERT_EQ(c.run(*linear, 0, 1, {&empty, 1}), row_of(c, base, 0)) << "no ranks";
  testing::Random random(static_cast<std::uint64_t>(c.rows + rank));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(c.rows));
  for (std::int32_t& id : ids) {
    const int drawn = random.integer(0, 6);
    id = std::vector<std::int32_t>{3, 7, 8, 9, kBaseRow, kActiveRow, kIdleRow}[at(drawn, 1, 0)];
  }
  const AdapterIds adapters{ids.data(), c.rows};
  const auto mixed = c.run(*linear, 0, -1, adapters);
  for (int r = 0; r < c.rows; ++r) {
    const std::int32_t id = ids[at(r, 1, 0)];
    ASSERT_EQ(row_of(c, mixed, r), row_of(c, expected[id], r)) << "row " << r << ", LoRA " << id;
    ASSERT_EQ(c.run(*linear, r, 1, {&ids[at(r, 1, 0)], 1}), row_of(c, expected[id], r))
        << "row " << r << " alone, LoRA " << id;
  }
}

template <class Linear>
void expect_all_rows_alone(const KernelTable& table) {
  for (const int rank : {1, 8, 17}) {
    for (const int rows : {1, 2, 6, 17, 41}) {
      for (const auto& [out, in] : {std::pair(5, 7), std::pair(77, 100), std::pair(576, 320)}) {
        expect_rows_alone<Linear>(LinearCase(rows, out, in, 0, rank != 8), 2, table, rank);
      }
    }
  }
  expect_rows_alone<Linear>(LinearCase(350, 40, 64, 0), 3, table, 8);
  expect_rows_alone<Linear>(LinearCase(9, 70, 4500, 0), 3, table, 8);
}

class DenseRowsTest : public testing::VariantTest<DenseKernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, DenseRowsTest,
                         ::testing::ValuesIn(testing::variants_of(testing::dense_kernels)),
                         testing::variant_name<DenseKernel>);

TEST_P(DenseRowsTest, HaveTheBitsOfEachAlone) {
  KernelTable table = testing::best_kernels();
  table.dense_bf16 = &kernel();
  table.dense_tiles = nullptr;
  expect_all_rows_alone<DenseLinear>(table);
}

// With fixed kernels.
class DenseTileRowsTest : public testing::VariantTest<GemmKernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, DenseTileRowsTest,
                         ::testing::ValuesIn(testing::all_dense_tiles()),
                         testing::variant_name<GemmKernel>);

TEST_P(DenseTileRowsTest, HaveTheBitsOfEachAlone) {
  KernelTable table = testing::best_kernels();
  table.dense_tiles = &kernel();
  table.dense_tiles_from = 1;
  table.fixed = true;
  expect_all_rows_alone<DenseLinear>(table);
}

class PackedRowsTest : public testing::VariantTest<GemmKernel> {};
INSTANTIATE_TEST_SUITE_P(Variants, PackedRowsTest,
                         ::testing::ValuesIn(testing::all_gemms(WeightFormat::kInt8)),
                         testing::variant_name<GemmKernel>);

TEST_P(PackedRowsTest, HaveTheBitsOfEachAlone) {
  KernelTable table = testing::best_kernels();
  table.gemm(WeightFormat::kInt8) = {&kernel(), &kernel(), 1};
  if (table.lora_shrink_tiles == nullptr) table.lora_shrink_tiles = &emulated_amx_shrink();
  expect_all_rows_alone<PackedLinear>(table);
}

template <class Linear>
class LoraRows : public ::testing::Test {};
using Linears = ::testing::Types<DenseLinear, PackedLinear>;
TYPED_TEST_SUITE(LoraRows, Linears);

// The difference to the base against float64: T and the output are rounded to BF16.
template <class Linear>
void expect_weighted_sum(const KernelTable& table) {
  constexpr int kLoras = 6;
  const LinearCase c(5, 40, 96, 0);
  const auto engine = engine_of(2, table);
  const auto linear = c.linear<Linear>(engine);
  const auto base = c.run(*linear);
  std::vector<int> numbers;
  std::vector<float> weights;
  std::vector<double> expected(base.size());
  std::vector<double> sizes(base.size());
  for (int number = 0; number < kLoras; ++number) {
    const LoraValues lora(c, number, 250);
    lora.load(*linear, c, number);
    numbers.push_back(number);
    weights.push_back(0.3f * static_cast<float>(number - 2));
    LinearCase one = c;
    one.rank = lora.rank;
    one.a = lora.a;
    one.b = lora.b;
    for (int r = 0; r < c.rows; ++r) {
      const auto added = one.lora(r);
      for (int n = 0; n < c.out; ++n) {
        const double weight = double{weights.back()};
        expected[at(r, c.out, n)] += weight * added[at(n, 1, 0)].first;
        sizes[at(r, c.out, n)] += std::abs(weight) * added[at(n, 1, 0)].second;
      }
    }
  }
  linear->activate_loras(numbers, weights);
  const auto y = c.run(*linear);
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double before = bf16_to_f32(base[i]);
    ASSERT_NEAR(bf16_to_f32(y[i]), before + expected[i],
                0.004 * (std::abs(before) + std::abs(before + expected[i]) + sizes[i]))
        << i;
  }
  for (float& weight : weights) weight = 0.0f;
  linear->activate_loras(numbers, weights);
  EXPECT_EQ(c.run(*linear), base) << "weights of 0 are the base, bit for bit";
}

TYPED_TEST(LoraRows, AWeightedSumOfAnyRanks) {
  expect_weighted_sum<TypeParam>(testing::best_kernels());
}

TEST(LoraOnTiles, AWeightedSumOfAnyRanks) {
  if (!cpu_features().avx512_bf16) GTEST_SKIP() << "tiles are emulated by AVX-512 BF16";
  KernelTable table = testing::best_kernels();
  table.dense_tiles = &emulated_amx_dense();
  table.dense_tiles_from = 1;
  table.fixed = false;
  expect_weighted_sum<DenseLinear>(table);
}

TYPED_TEST(LoraRows, ComeAndGo) {
  const LinearCase c(3, 40, 64, 0);
  const auto engine = engine_of(2, testing::best_kernels());
  const auto linear = with_loras<TypeParam>(c, engine, 4);
  const std::vector<std::int32_t> ids = {7, kBaseRow, 7};
  const AdapterIds adapters{ids.data(), 3};
  const auto before = c.run(*linear, 0, -1, adapters);
  LoraValues(c, 9, 5).load(*linear, c, 7);
  const auto after = c.run(*linear, 0, -1, adapters);
  EXPECT_NE(row_of(c, after, 0), row_of(c, before, 0)) << "the number has another LoRA";
  EXPECT_EQ(row_of(c, after, 1), row_of(c, before, 1));
  linear->unload_lora(7);
  EXPECT_EQ(message_of([&] { c.run(*linear, 0, -1, adapters); }),
            "adapter_ids[0] is 7, expected the number of a LoRA that is held, -1 for none or -2 "
            "for the active ones");
  EXPECT_EQ(message_of([&] { linear->unload_lora(8); }),
            "LoRA 8 is active; activate another, or none, before it is removed");
  const std::int32_t base = kBaseRow;
  EXPECT_EQ(message_of([&] { c.run(*linear, 0, 2, {&base, 1}); }),
            "there are 1 adapter ids for 2 rows");
  EXPECT_TRUE(message_of([&] {
                c.run(*linear, 0, 1, {&base, -1});
              }).starts_with("adapter_ids has -1 elements"));
}

// A LoRA may be loaded, replaced, activated and removed while forwards run: each sees one set.
TYPED_TEST(LoraRows, TheSetChangesDuringForwards) {
  const LinearCase c(3, 40, 64, 0);
  const auto linear = with_loras<TypeParam>(c, engine_of(2, testing::best_kernels()), 4);
  const std::vector<std::int32_t> ids = {7, kBaseRow, kActiveRow};
  const AdapterIds adapters{ids.data(), 3};
  const auto before = c.run(*linear, 0, -1, adapters);
  std::atomic<bool> stop{false};
  std::thread changing([&] {
    const LoraValues other(c, 1, 30);
    for (int i = 0; !stop.load(); ++i) {
      other.load(*linear, c, 1);
      linear->activate_loras(std::vector<int>{i % 2 == 0 ? 1 : 3}, std::vector<float>{1.0f});
      if (i % 2 == 1) linear->unload_lora(1);
      EXPECT_GT(linear->lora_bytes(), 0U);
    }
  });
  for (int i = 0; i < 200; ++i) {
    const auto found = c.run(*linear, 0, -1, adapters);
    for (const int r : {0, 1}) EXPECT_EQ(row_of(c, found, r), row_of(c, before, r));
  }
  stop.store(true);
  changing.join();
}

}  // namespace
}  // namespace ktrt
