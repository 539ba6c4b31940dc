#include "attention/token_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "cpu/isa.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "kernels/select.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::Random;
using Form = TokenAttention::Form;

std::shared_ptr<Engine> engine_of(int threads, const KernelTable& kernels) {
  const auto count = static_cast<std::size_t>(threads);
  return std::make_shared<Engine>(std::vector<int>(count, -1), std::vector<int>(count, 0), 8,
                                  active_isa(), kernels);
}

KernelTable best() { return select_kernels(active_isa(), cpu_features()); }

// An array [heads, tokens, size] inside of one of capacity tokens, as long as it has to be.
struct Rows {
  Rows(std::int64_t heads, std::int64_t tokens, std::int64_t size, Random& random, float deviation)
      : head_stride((tokens + 5) * (size + 3)), token_stride(size + 3) {
    const auto count =
        static_cast<std::size_t>((heads - 1) * head_stride + (tokens - 1) * token_stride + size);
    floats = random.normals(count, deviation);
    for (float& value : floats) {
      bits.push_back(f32_to_bf16(value));
      value = bf16_to_f32(bits.back());
    }
  }
  HeadArray as_bf16() {
    return {bits.data(), static_cast<std::int64_t>(bits.size()), head_stride, token_stride, false};
  }
  HeadArray as_floats() {
    return {floats.data(), static_cast<std::int64_t>(floats.size()), head_stride, token_stride,
            true};
  }
  double at(std::int64_t head, std::int64_t token, std::int64_t i) const {
    return floats[static_cast<std::size_t>(head * head_stride + token * token_stride + i)];
  }

  std::int64_t head_stride, token_stride;
  std::vector<float> floats;
  std::vector<std::uint16_t> bits;
};

struct AttentionCase {
  AttentionCase(const Form& form_, std::int64_t tokens_, bool values_are_keys = false)
      : form(form_),
        tokens(tokens_),
        shared(values_are_keys),
        random(static_cast<std::uint64_t>(form_.key_size + tokens_)),
        query(form.heads, 1, form.key_size, random, 2.0f),
        second_query(form.heads, 1, std::max<std::int64_t>(form.second_key_size, 1), random, 2.0f),
        keys(form.groups, tokens, form.key_size, random, 1.0f),
        second_keys(form.groups, tokens, std::max<std::int64_t>(form.second_key_size, 1), random,
                    1.0f),
        values(form.groups, tokens, form.value_size, random, 1.0f) {}

  TokenAttention::Arrays arrays(HeadArray out) {
    TokenAttention::Arrays arrays;
    arrays.query = float_query ? query.as_floats() : query.as_bf16();
    arrays.keys = keys.as_bf16();
    arrays.values = shared ? keys.as_bf16() : values.as_bf16();
    if (form.second_key_size > 0) {
      arrays.second_query = second_query.as_bf16();
      arrays.second_keys = second_keys.as_bf16();
    }
    arrays.out = out;
    if (!mask.empty()) {
      arrays.mask = mask.data();
      arrays.mask_count = static_cast<std::int64_t>(mask.size());
    }
    return arrays;
  }

  std::unique_ptr<TokenAttention> attention(std::shared_ptr<Engine> engine) const {
    std::optional<TensorView> view;
    if (!sinks.empty()) view = testing::view_of(sinks, {form.heads}, "sinks");
    return std::make_unique<TokenAttention>(std::move(engine), form, view);
  }

  std::vector<float> run(const std::shared_ptr<Engine>& engine) { return run(*attention(engine)); }

  std::vector<float> run(TokenAttention& attention) {
    std::vector<float> out(static_cast<std::size_t>(form.heads * form.value_size));
    attention.forward(
        arrays({out.data(), static_cast<std::int64_t>(out.size()), form.value_size, 0, true}),
        start, tokens);
    return out;
  }

  // The outputs, and how large their terms are, in double precision.
  void expect_near(const std::vector<float>& found) const {
    for (std::int64_t h = 0; h < form.heads; ++h) {
      const std::int64_t g = h * form.groups / form.heads;
      std::vector<double> weight;
      double most = sinks.empty() ? -INFINITY : sinks[static_cast<std::size_t>(h)];
      for (std::int64_t t = start; t < tokens; ++t) {
        weight.push_back(score(h, g, t));
        most = std::max(most, weight.back());
      }
      double sum = sinks.empty() ? 0.0 : std::exp(sinks[static_cast<std::size_t>(h)] - most);
      for (double& w : weight) sum += w = std::exp(w - most);
      for (std::int64_t i = 0; i < form.value_size; ++i) {
        double expected = 0.0;
        double magnitude = 0.0;
        for (std::int64_t t = start; t < tokens; ++t) {
          const double value = shared ? keys.at(g, t, i) : values.at(g, t, i);
          const double term = weight[static_cast<std::size_t>(t - start)] / sum * value;
          expected += term;
          magnitude += std::abs(term);
        }
        // float32's rounding of scores of about 10, which are exponents, and of the sums.
        ASSERT_NEAR(found[static_cast<std::size_t>(h * form.value_size + i)], expected,
                    3e-5 * magnitude + 1e-30)
            << "head " << h << " number " << i << " of " << tokens << " tokens";
      }
    }
  }

  double score(std::int64_t h, std::int64_t g, std::int64_t t) const {
    double dot = 0.0;
    for (std::int64_t i = 0; i < form.key_size; ++i) dot += query.at(h, 0, i) * keys.at(g, t, i);
    for (std::int64_t i = 0; i < form.second_key_size; ++i) {
      dot += second_query.at(h, 0, i) * second_keys.at(g, t, i);
    }
    dot *= double{form.scaling};
    if (form.softcap > 0) dot = double{form.softcap} * std::tanh(dot / double{form.softcap});
    return mask.empty() ? dot : dot + mask[static_cast<std::size_t>(t)];
  }

  Form form;
  std::int64_t tokens;
  bool shared;
  std::int64_t start = 0;
  bool float_query = false;
  std::vector<float> mask, sinks;
  Random random;
  Rows query, second_query, keys, second_keys, values;
};

Form form_of(std::int64_t heads, std::int64_t groups, std::int64_t key, std::int64_t second,
             std::int64_t value) {
  return {heads, groups, key, second, value, 1.0f / std::sqrt(static_cast<float>(key + second)),
          0.0f};
}

class TokenAttentionTest : public testing::VariantTest<AttentionKernel> {
 protected:
  KernelTable table() const {
    KernelTable table = best();
    table.attention = &kernel();
    return table;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, TokenAttentionTest,
                         ::testing::ValuesIn(testing::variants_of(testing::attention_kernels)),
                         testing::variant_name<AttentionKernel>);

TEST_P(TokenAttentionTest, EqualsTheReference) {
  const auto engine = engine_of(2, table());
  for (const std::int64_t tokens : {1, 63, 65, 200, 2113}) {
    for (const Form& form :
         {form_of(4, 4, 64, 0, 64), form_of(8, 2, 128, 0, 128), form_of(5, 1, 192, 0, 128),
          form_of(21, 1, 40, 0, 24), form_of(6, 2, 256, 0, 80)}) {
      AttentionCase c(form, tokens);
      c.expect_near(c.run(engine));
    }
    AttentionCase latent(form_of(3, 1, 512, 64, 512), tokens, true);
    latent.expect_near(latent.run(engine));
    latent.float_query = true;
    latent.expect_near(latent.run(engine));
  }
}

TEST_P(TokenAttentionTest, WindowMaskSinksAndSoftcap) {
  const auto engine = engine_of(2, table());
  AttentionCase c(form_of(6, 2, 48, 0, 32), 301);
  c.form.softcap = 3.0f;
  c.start = 130;
  c.sinks = c.random.normals(6);
  c.mask = c.random.normals(301);
  for (std::size_t t = 150; t < 290; ++t) c.mask[t] = -INFINITY;
  c.expect_near(c.run(engine));
}

TEST_P(TokenAttentionTest, BitsDoNotDependOnThreads) {
  for (const std::int64_t tokens : {9, 700, 4500}) {
    AttentionCase c(form_of(20, 1, 64, 16, 64), tokens, true);
    const std::vector<float> expected = c.run(engine_of(1, table()));
    for (const int threads : {2, 3, 5}) {
      const auto engine = engine_of(threads, table());
      const auto attention = c.attention(engine);
      for (int i = 0; i < 2; ++i) ASSERT_EQ(c.run(*attention), expected) << threads;
    }
  }
}

TEST(TokenAttention, RoundsItsOutputOnce) {
  AttentionCase c(form_of(4, 2, 64, 0, 40), 100);
  const auto engine = engine_of(2, best());
  const std::vector<float> exact = c.run(engine);
  std::vector<std::uint16_t> out(4 * 50, 0x1234);
  c.attention(engine)->forward(c.arrays({out.data(), 4 * 50, 50, 0, false}), 0, 100);
  for (std::size_t h = 0; h < 4; ++h) {
    for (std::size_t i = 0; i < 40; ++i) ASSERT_EQ(out[h * 50 + i], f32_to_bf16(exact[h * 40 + i]));
    ASSERT_EQ(out[h * 50 + 40], 0x1234) << "written after the head";
  }
}

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(TokenAttention, RefusesFormsThatCannotBe) {
  const auto engine = engine_of(1, best());
  const auto refusal = [&](const Form& form) {
    return message_of([&] { TokenAttention(engine, form, {}); });
  };
  EXPECT_EQ(refusal(form_of(5, 2, 8, 0, 8)), "heads is 5, expected a multiple of 2 groups");
  EXPECT_EQ(refusal(form_of(4, 0, 8, 0, 8)), "groups is 0, expected 1 to 4096");
  EXPECT_EQ(refusal(form_of(4, 2, 8, -1, 8)), "second_key_size is -1, expected 0 to 4096");
  EXPECT_EQ(refusal(form_of(4, 2, 8, 0, 5000)), "value_size is 5000, expected 1 to 4096");
  Form form = form_of(4, 2, 8, 0, 8);
  form.scaling = NAN;
  EXPECT_EQ(refusal(form), "scaling is nan, expected a number");
  form = form_of(4, 2, 8, 0, 8);
  form.softcap = -1.0f;
  EXPECT_EQ(refusal(form), "softcap is -1, expected a number, 0 for none");
  const std::vector<float> sinks(3);
  EXPECT_EQ(message_of([&] {
              TokenAttention(engine, form_of(4, 2, 8, 0, 8), testing::view_of(sinks, {3}, "sinks"));
            }),
            "sinks has shape [3], expected [4]");
}

TEST(TokenAttention, RefusesArraysThatAreTooSmall) {
  AttentionCase c(form_of(4, 2, 8, 4, 8), 10);
  const auto engine = engine_of(1, best());
  const auto attention = c.attention(engine);
  std::vector<float> out(32);
  const HeadArray whole{out.data(), 32, 8, 0, true};
  const auto refusal = [&](const auto& change, std::int64_t start = 0, std::int64_t end = 10) {
    TokenAttention::Arrays arrays = c.arrays(whole);
    change(arrays);
    return message_of([&] { attention->forward(arrays, start, end); });
  };
  const auto nothing = [](const auto&) {};
  EXPECT_EQ(refusal(nothing), "nothing was thrown");
  EXPECT_EQ(refusal(nothing, 3, 3),
            "tokens 3 to 3, expected a start of at least 0 and an end above it");
  // The last token of the last group is one number short.
  EXPECT_EQ(refusal([](auto& a) { --a.keys.count; }),
            "keys has 271 elements, heads 165 and tokens 11 apart, expected room for [2, 10, 8]");
  EXPECT_EQ(refusal(nothing, 0, 11),
            "keys has 272 elements, heads 165 and tokens 11 apart, expected room for [2, 11, 8]");
  EXPECT_EQ(refusal([](auto& a) { a.values.token_stride = std::int64_t{1} << 62; }),
            "values has 272 elements, heads 165 and tokens 4611686018427387904 apart, expected "
            "room for [2, 10, 8]");
  EXPECT_EQ(refusal([](auto& a) { a.second_keys.data = nullptr; }).substr(0, 15),
            "second_keys has");
  EXPECT_EQ(refusal([](auto& a) { a.keys.float32 = true; }), "keys is float32, expected bfloat16");
  EXPECT_EQ(refusal([](auto& a) { a.out.count = 31; }),
            "out has 31 elements, heads 8 and tokens 0 apart, expected room for [4, 1, 8]");
  EXPECT_EQ(refusal([](auto& a) { a.query.head_stride = -1; }),
            "query has strides -1 and 11, expected none below 0");
  EXPECT_EQ(refusal([&](auto& a) {
              a.mask = out.data();
              a.mask_count = 9;
            }),
            "mask has 9 elements, expected 10");
  engine->close();
  TokenAttention::Arrays arrays = c.arrays(whole);
  EXPECT_THROW(attention->forward(arrays, 0, 10), std::runtime_error);
}

}  // namespace
}  // namespace ktrt
