#include "norm/rms_norm.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "cpu/isa.h"
#include "engine/engine.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "kernels/select.h"

namespace ktrt {
namespace {

using testing::view_of;

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(RmsNorm, RowsApartGiveContiguousRows) {
  const KernelTable table = select_kernels(active_isa(), cpu_features());
  const std::vector<float> weight = {1.0f, 2.0f, 4.0f};
  const RmsNorm norm(*table.elementwise, view_of(weight, {3}, "weight"), 0.0f, 0.0f, false);
  // Two rows, 5 elements apart, and not an element more.
  std::vector<std::uint16_t> x(8, f32_to_bf16(100.0f));
  for (const std::size_t i : {0u, 1u, 2u}) x[i] = f32_to_bf16(3.0f);
  for (const std::size_t i : {5u, 6u, 7u}) x[i] = f32_to_bf16(-0.5f);
  std::vector<std::uint16_t> out(6);
  norm.forward(x.data(), 8, 2, 5, out.data(), 6);
  const std::vector<float> expected = {1.0f, 2.0f, 4.0f, -1.0f, -2.0f, -4.0f};
  for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(bf16_to_f32(out[i]), expected[i]);
  EXPECT_EQ(message_of([&] { norm.forward(x.data(), 7, 2, 5, out.data(), 6); }),
            "x has 7 elements, expected 2 rows of 3, 5 elements apart");
  EXPECT_EQ(message_of([&] { norm.forward(x.data(), 8, 2, 5, out.data(), 5); }),
            "out has 5 elements, expected 2 rows of 3");
  EXPECT_EQ(message_of([&] { norm.forward(nullptr, 0, 0, 0, nullptr, 0); }), "nothing was thrown");
}

TEST(RmsNorm, ManyRowsOnTheEnginesThreads) {
  const KernelTable table = select_kernels(active_isa(), cpu_features());
  constexpr int kRows = 701;
  constexpr int kSize = 100;
  testing::Random random(1);
  const std::vector<float> weight = random.normals(kSize);
  std::vector<std::uint16_t> x(kRows * kSize);
  for (std::uint16_t& value : x) value = f32_to_bf16(random.normal());
  const auto engine = std::make_shared<Engine>(std::vector<int>{-1, -1, -1}, 8);
  const TensorView view = view_of(weight, {kSize}, "weight");
  const RmsNorm shared(*table.elementwise, view, 1e-6f, 0.0f, true, engine);
  const RmsNorm alone(*table.elementwise, view, 1e-6f, 0.0f, true);
  EXPECT_TRUE(shared.shares(kRows));
  EXPECT_FALSE(shared.shares(8));
  EXPECT_FALSE(alone.shares(kRows));
  std::vector<std::uint16_t> found(x.size()), expected(x.size());
  const auto count = static_cast<std::int64_t>(x.size());
  shared.forward(x.data(), count, kRows, kSize, found.data(), count);
  alone.forward(x.data(), count, kRows, kSize, expected.data(), count);
  EXPECT_EQ(found, expected);
  engine->close();
  EXPECT_THROW(shared.forward(x.data(), count, kRows, kSize, found.data(), count),
               std::runtime_error);
}

}  // namespace
}  // namespace ktrt
