#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "engine/engine.h"
#include "helpers/random.h"
#include "kernels/select.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/selective_scan.h"
#include "linear_attention/short_conv.h"

namespace ktrt {
namespace {

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TokenArray array_of(std::vector<float>& numbers, std::int64_t tokens, std::int64_t heads,
                    std::int64_t size) {
  return {numbers.data(),
          static_cast<std::int64_t>(numbers.size()),
          tokens * heads * size,
          heads * size,
          size,
          true};
}

std::shared_ptr<Engine> engine_of(int threads, Isa isa) {
  const std::vector<int> cpus(static_cast<std::size_t>(threads), -1);
  return std::make_shared<Engine>(cpus, std::vector<int>(cpus.size(), 0), 8, isa,
                                  select_kernels(isa, cpu_features()));
}

constexpr std::int64_t kTokens = 19, kHeads = 2, kKeys = 7, kValues = 37;

// One sequence of the delta rule by the operator of one engine: out, then the state.
std::vector<float> delta_rule(const std::shared_ptr<Engine>& engine) {
  testing::Random random(3);
  std::vector<float> query = random.normals(kTokens * kKeys), key = random.normals(kTokens * kKeys);
  std::vector<float> value = random.normals(kTokens * kHeads * kValues);
  std::vector<float> decay = random.normals(kTokens * kHeads), beta = decay;
  for (float& each : decay) each = -std::abs(each);
  for (float& each : beta) each = 1.0f / (1.0f + each * each);
  std::vector<float> state = random.normals(kHeads * kKeys * kValues);
  std::vector<float> out(value.size());
  LinearAttention attention(engine, {kHeads, 1, kKeys, kValues, 0.5f, true, true, false, false});
  const auto count = static_cast<std::int64_t>(state.size());
  attention.forward({array_of(query, kTokens, 1, kKeys),
                     array_of(key, kTokens, 1, kKeys),
                     array_of(value, kTokens, kHeads, kValues),
                     array_of(decay, kTokens, kHeads, 1),
                     array_of(beta, kTokens, kHeads, 1),
                     array_of(out, kTokens, kHeads, kValues),
                     {state.data(), count, count}},
                    1, kTokens);
  out.insert(out.end(), state.begin(), state.end());
  return out;
}

TEST(LinearAttention, SameOnEveryIsaAndAnyNumberOfThreads) {
  const std::vector<float> expected = delta_rule(engine_of(1, Isa::kPortable));
  EXPECT_TRUE(
      std::all_of(expected.begin(), expected.end(), [](float x) { return std::isfinite(x); }));
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    const std::vector<float> found = delta_rule(engine_of(3, isa));
    ASSERT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0);
  }
}

TEST(LinearAttention, OneTokenWithoutHistory) {
  const auto engine = engine_of(1, active_isa());
  // No norm, no subtraction: out = scaling · (q · k) · beta · v.
  LinearAttention attention(engine, {1, 1, 2, 1, 2.0f, false, false, false, false});
  std::vector<float> query = {1.0f, 2.0f}, key = {3.0f, 4.0f}, value = {5.0f}, decay = {0.0f};
  std::vector<float> beta = {0.5f}, state = {0.0f, 0.0f}, out = {0.0f};
  const auto arrays = [&] {
    return LinearAttention::Arrays{array_of(query, 1, 1, 2), array_of(key, 1, 1, 2),
                                   array_of(value, 1, 1, 1), array_of(decay, 1, 1, 1),
                                   array_of(beta, 1, 1, 1),  array_of(out, 1, 1, 1),
                                   {state.data(), 2, 2}};
  };
  attention.forward(arrays(), 1, 1);
  EXPECT_EQ(out[0], 55.0f);
  EXPECT_EQ(state, (std::vector<float>{7.5f, 10.0f}));
  auto small = arrays();
  small.state.count = 1;
  EXPECT_EQ(message_of([&] { attention.forward(small, 1, 1); }),
            "state has 1 elements, sequences 2 apart, expected room for [1, 2]");
  EXPECT_EQ(message_of([&] { attention.forward(arrays(), 1, 2); }),
            "query has 2 elements, sequences 2, tokens 2 and heads 2 apart, expected room for "
            "[1, 2, 1, 2]");
  EXPECT_EQ(
      message_of([&] { LinearAttention(engine, {3, 2, 2, 2, 1.0f, true, true, false, false}); }),
      "heads is 3, expected a multiple of key_heads (2), at most 2^20");
}

TEST(ShortConv, AState) {
  const auto engine = engine_of(1, active_isa());
  ShortConv conv(engine, {2, 3, false});
  std::vector<float> x = {1.0f, 10.0f}, weight = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f};
  std::vector<float> bias = {0.5f, 0.0f}, state = {7.0f, 8.0f, 9.0f, 0.0f, 1.0f, 2.0f};
  std::vector<float> out(2);
  ShortConv::Arrays arrays{array_of(x, 1, 1, 2),      array_of(out, 1, 1, 2),
                           array_of(weight, 1, 1, 6), array_of(bias, 1, 1, 2),
                           array_of(state, 1, 1, 6),  3};
  conv.forward(arrays, 1, 1);
  // 0.5 + 8 + 2 · 9 + 3 · 1, and 4 · 1 + 5 · 2 + 6 · 10.
  EXPECT_EQ(out, (std::vector<float>{29.5f, 74.0f}));
  EXPECT_EQ(state, (std::vector<float>{8.0f, 9.0f, 1.0f, 1.0f, 2.0f, 10.0f}));
  arrays.state_tokens = 1;
  EXPECT_EQ(message_of([&] { conv.forward(arrays, 1, 1); }),
            "state has 1 tokens, expected 2 to 16");
}

TEST(SelectiveScan, OneChannel) {
  const auto engine = engine_of(1, active_isa());
  SelectiveScan scan(engine, 1, 2);
  std::vector<float> x = {2.0f}, dt = {0.5f}, a = {0.0f, 0.0f}, b = {1.0f, 3.0f}, c = {1.0f, 10.0f};
  std::vector<float> state = {4.0f, 5.0f}, out = {0.0f};
  scan.forward({array_of(x, 1, 1, 1),
                array_of(dt, 1, 1, 1),
                array_of(out, 1, 1, 1),
                array_of(b, 1, 1, 2),
                array_of(c, 1, 1, 2),
                array_of(a, 1, 1, 2),
                {state.data(), 2, 2}},
               1, 1);
  EXPECT_EQ(state, (std::vector<float>{5.0f, 8.0f}));
  EXPECT_EQ(out[0], 85.0f);
}

}  // namespace
}  // namespace ktrt
