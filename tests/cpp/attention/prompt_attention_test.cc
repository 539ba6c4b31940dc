#include "attention/prompt_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/token_attention.h"
#include "base/bf16.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "kernels/select.h"

namespace ktrt {
namespace {

using testing::Random;
using Bits = std::vector<std::uint16_t>;

// Numbers [heads][tokens][size] with room between tokens.
struct Rows {
  Rows(std::int64_t heads, std::int64_t tokens_, std::int64_t size, Random& random)
      : tokens(tokens_), stride(size + 5), bits(static_cast<std::size_t>(heads * tokens * stride)) {
    for (std::uint16_t& bit : bits) bit = f32_to_bf16(random.normal());
  }
  // Tokens from `first` on.
  HeadArray from(std::int64_t first) {
    const std::int64_t skipped = first * stride;
    return {bits.data() + skipped, static_cast<std::int64_t>(bits.size()) - skipped,
            tokens * stride, stride, false};
  }
  double at(std::int64_t head, std::int64_t token, std::int64_t i) const {
    return bf16_to_f32(bits[static_cast<std::size_t>((head * tokens + token) * stride + i)]);
  }

  std::int64_t tokens, stride;
  Bits bits;
};

struct Case {
  std::int64_t heads, groups, key_size, value_size, tokens, window;
  bool sinks;
  float softcap;
};

class Prompts {
 public:
  explicit Prompts(const Case& form)
      : c(form),
        random(static_cast<std::uint64_t>(form.tokens)),
        query(c.heads, c.tokens, c.key_size, random),
        keys(c.groups, c.tokens, c.key_size, random),
        values(c.groups, c.tokens, c.value_size, random),
        sinks(c.sinks ? random.normals(static_cast<std::size_t>(c.heads)) : std::vector<float>()) {}

  // The prompt in parts that end at `cuts`, keys from the first that a part sees.
  Bits run(int threads, std::vector<std::int64_t> cuts) {
    const auto count = static_cast<std::size_t>(threads);
    const auto engine = std::make_shared<Engine>(
        std::vector<int>(count, -1), std::vector<int>(count, 0), 8, active_isa(), active_kernels());
    std::optional<TensorView> view;
    if (!sinks.empty()) view = testing::view_of(sinks, {c.heads}, "sinks");
    TokenAttention attention(
        engine, {c.heads, c.groups, c.key_size, 0, c.value_size, kScaling, c.softcap}, view);
    Random other(1);
    Rows out(c.heads, c.tokens, c.value_size, other);
    cuts.push_back(c.tokens);
    std::int64_t start = 0;
    for (const std::int64_t end : cuts) {
      PromptSpan span{start, end - start, 0, c.window};
      span.first = span.seen_from(start);
      attention.forward_prompt(
          {query.from(start), keys.from(span.first), values.from(span.first), out.from(start)},
          span);
      start = end;
    }
    found = out.bits;
    return out.bits;
  }

  void expect_near() const {
    double error = 0.0;
    double whole = 0.0;
    for (std::int64_t h = 0; h < c.heads; ++h) {
      for (std::int64_t t = 0; t < c.tokens; ++t) {
        const std::vector<double> expected = reference(h, t);
        for (std::int64_t i = 0; i < c.value_size; ++i) {
          const auto at = (h * c.tokens + t) * (c.value_size + 5) + i;
          const double value = expected[static_cast<std::size_t>(i)];
          const double difference = bf16_to_f32(found[static_cast<std::size_t>(at)]) - value;
          error += difference * difference;
          whole += value * value;
        }
      }
    }
    // Weights and outputs are rounded to BF16: 2^-9 at most, each.
    EXPECT_LT(std::sqrt(error / whole), 3e-3);
  }

 private:
  static constexpr float kScaling = 0.25f;

  std::vector<double> reference(std::int64_t h, std::int64_t t) const {
    const std::int64_t g = h * c.groups / c.heads;
    const std::int64_t first = c.window > 0 ? std::max<std::int64_t>(0, t - c.window + 1) : 0;
    std::vector<double> out(static_cast<std::size_t>(c.value_size));
    double sum = sinks.empty() ? 0.0 : std::exp(sinks[static_cast<std::size_t>(h)]);
    for (std::int64_t key = first; key <= t; ++key) {
      double score = 0.0;
      for (std::int64_t i = 0; i < c.key_size; ++i) score += query.at(h, t, i) * keys.at(g, key, i);
      score *= kScaling;
      if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
      const double weight = std::exp(score);
      sum += weight;
      for (std::int64_t i = 0; i < c.value_size; ++i) {
        out[static_cast<std::size_t>(i)] += weight * values.at(g, key, i);
      }
    }
    for (double& value : out) value /= sum;
    return out;
  }

  Case c;
  Random random;
  Rows query, keys, values;
  std::vector<float> sinks;
  Bits found;
};

class PromptAttentionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (select_prompt_attention(active_isa(), cpu_features(), Bf16Arithmetic::kDot) == nullptr) {
      GTEST_SKIP() << "not available here";
    }
    ASSERT_EQ(setenv("KTRT_BF16", "dot", 1), 0);
  }
  void TearDown() override { ASSERT_EQ(unsetenv("KTRT_BF16"), 0); }
};

TEST_F(PromptAttentionTest, EqualsTheReferenceWhereverItIsCut) {
  for (const Case& form :
       {Case{2, 2, 64, 64, 1, 0, false, 0.0f}, Case{8, 2, 40, 24, 200, 0, true, 0.0f},
        Case{6, 1, 64, 80, 131, 0, false, 2.0f}, Case{16, 2, 32, 128, 150, 33, true, 0.0f},
        Case{3, 3, 96, 64, 290, 64, false, 0.0f}}) {
    SCOPED_TRACE(form.tokens);
    Prompts prompts(form);
    const Bits whole = prompts.run(1, {});
    prompts.expect_near();
    EXPECT_EQ(prompts.run(3, {}), whole) << "threads";
    if (form.tokens < 100) continue;
    EXPECT_EQ(prompts.run(2, {1, 63, 70}), whole) << "parts";
  }
}

TEST_F(PromptAttentionTest, RefusesSpansThatCannotBe) {
  const auto engine = std::make_shared<Engine>(std::vector<int>{-1}, std::vector<int>{0}, 8,
                                               active_isa(), active_kernels());
  TokenAttention attention(engine, {2, 1, 8, 0, 8, 1.0f, 0.0f}, {});
  Random random(1);
  Rows query(2, 4, 8, random), keys(1, 10, 8, random), out(2, 4, 8, random);
  const auto refusal = [&](const PromptSpan& span) -> std::string {
    try {
      attention.forward_prompt({query.from(0), keys.from(0), keys.from(0), out.from(0)}, span);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal({6, 4, 0, 0}), "");
  EXPECT_EQ(refusal({7, 4, 0, 0}).substr(0, 26), "keys has 130 elements, hea");
  EXPECT_EQ(refusal({6, 4, 3, 5}), "first is 3, expected 0 to 2");
  EXPECT_EQ(refusal({6, 4, 0, -1}), "window is -1, expected 0 for none, or more");
  EXPECT_EQ(refusal({0, 0, 0, 0}),
            "start and tokens are 0 and 0, expected at least 0 and 1, at most 1099511627776");
}

}  // namespace
}  // namespace ktrt
