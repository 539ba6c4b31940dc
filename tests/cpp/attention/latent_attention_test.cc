#include "attention/latent_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "helpers/linear_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::at;
using testing::best_kernels;
using testing::engine_of;
using testing::message_of;
using testing::Random;
using testing::round_to_bf16;
using testing::to_bf16;
using testing::view_of;
using Form = LatentAttention::Form;

HeadArray array_of(std::vector<std::uint16_t>& bits, std::int64_t head_stride,
                   std::int64_t token_stride) {
  return {bits.data(), static_cast<std::int64_t>(bits.size()), head_stride, token_stride, false};
}

// kv_b_proj, its LoRA, a query and a cache.
struct LatentCase {
  LatentCase(const Form& form_, std::int64_t tokens_, int lora_rank_)
      : form(form_), tokens(tokens_), lora_rank(lora_rank_) {
    Random random(static_cast<std::uint64_t>(form.rank + tokens * 3));
    const auto numbers = [&](std::int64_t count, double deviation) {
      return random.normals(static_cast<std::size_t>(count), static_cast<float>(deviation));
    };
    const double rank = static_cast<double>(form.rank);
    weight = to_bf16(numbers(form.heads * rows() * form.rank, 1.0 / std::sqrt(rank)));
    a = numbers(lora_rank * form.rank, 1.0 / std::sqrt(rank));
    b = numbers(form.heads * rows() * lora_rank, 0.5);
    query = to_bf16(numbers(form.heads * (form.nope + form.rope), 1.0));
    latents = to_bf16(numbers(tokens * form.rank, 1.0));
    positions = to_bf16(numbers(tokens * form.rope, 1.0));
    for (std::int64_t h = 0; h < form.heads; ++h) {
      for (std::int64_t c = 0; c < form.rank; ++c) {
        for (std::int64_t n = 0; n < form.nope; ++n) keys.push_back(weight[row(h, n, c)]);
      }
      const auto first = weight.begin() + static_cast<std::ptrdiff_t>(row(h, form.nope, 0));
      values.insert(values.end(), first, first + form.value * form.rank);
    }
  }

  std::int64_t rows() const { return form.nope + form.value; }
  std::size_t row(std::int64_t head, std::int64_t i, std::int64_t c) const {
    return at(head * rows() + i, form.rank, c);
  }

  std::unique_ptr<LatentAttention> attention(std::shared_ptr<Engine> engine) const {
    auto made = std::make_unique<LatentAttention>(
        std::move(engine), form,
        view_of(keys.data(), DType::kBfloat16, {form.heads * form.rank, form.nope}, "keys"),
        view_of(values.data(), DType::kBfloat16, {form.heads * form.value, form.rank}, "values"));
    if (lora_rank > 0) set_lora(*made);
    return made;
  }
  void set_lora(LatentAttention& attention) const {
    attention.load_lora(0, view_of(a, {lora_rank, form.rank}, "a"),
                        view_of(b, {form.heads * rows(), lora_rank}, "b"));
    testing::apply_lora(attention);
  }

  LatentAttention::Arrays arrays(std::vector<std::uint16_t>& out) {
    return {array_of(query, form.nope + form.rope, 0), array_of(latents, 0, form.rank),
            array_of(positions, 0, form.rope), array_of(out, form.value, 0)};
  }
  std::vector<std::uint16_t> run(LatentAttention& attention) {
    std::vector<std::uint16_t> out(at(form.heads, form.value, 0));
    attention.forward(arrays(out), tokens);
    return out;
  }

  // kv_b_proj's row with LoRA, over latents: what it makes of number c of a latent.
  double expanded(std::int64_t head, std::int64_t i, std::int64_t c) const {
    double sum = bf16_to_f32(weight[row(head, i, c)]);
    for (int r = 0; r < lora_rank; ++r) {
      sum += double{round_to_bf16(b[at(head * rows() + i, lora_rank, r)])} *
             round_to_bf16(a[at(r, form.rank, c)]);
    }
    return sum;
  }

  // Keys and values expanded, in double precision.
  void expect_near(const std::vector<std::uint16_t>& found) const {
    const auto latent = [&](std::int64_t t, std::int64_t c) {
      return double{bf16_to_f32(latents[at(t, form.rank, c)])};
    };
    for (std::int64_t h = 0; h < form.heads; ++h) {
      const auto q = [&](std::int64_t i) {
        return double{bf16_to_f32(query[at(h, form.nope + form.rope, i)])};
      };
      std::vector<double> absorbed(static_cast<std::size_t>(form.rank));
      std::vector<double> mixed(absorbed.size());
      for (std::int64_t c = 0; c < form.rank; ++c) {
        for (std::int64_t n = 0; n < form.nope; ++n) {
          absorbed[static_cast<std::size_t>(c)] += q(n) * expanded(h, n, c);
        }
      }
      std::vector<double> weights;
      double sum = 0.0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        double score = 0.0;
        for (std::int64_t c = 0; c < form.rank; ++c) {
          score += absorbed[static_cast<std::size_t>(c)] * latent(t, c);
        }
        for (std::int64_t i = 0; i < form.rope; ++i) {
          score += q(form.nope + i) * bf16_to_f32(positions[at(t, form.rope, i)]);
        }
        sum += weights.emplace_back(std::exp(score * double{form.scaling}));
      }
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t c = 0; c < form.rank; ++c) {
          mixed[static_cast<std::size_t>(c)] +=
              weights[static_cast<std::size_t>(t)] / sum * latent(t, c);
        }
      }
      for (std::int64_t i = 0; i < form.value; ++i) {
        double expected = 0.0;
        double magnitude = 0.0;
        for (std::int64_t c = 0; c < form.rank; ++c) {
          const double each = mixed[static_cast<std::size_t>(c)];
          expected += expanded(h, form.nope + i, c) * each;
          magnitude += std::abs(double{bf16_to_f32(weight[row(h, form.nope + i, c)])} * each);
        }
        // Two roundings to BF16: of mixed before the weight, and of the output.
        ASSERT_NEAR(bf16_to_f32(found[at(h, form.value, i)]), expected,
                    1.01 / 256 * (std::abs(expected) + magnitude) + 1e-5)
            << "head " << h << " number " << i << " of " << tokens << " tokens, rank " << lora_rank
            << " of " << form.rank;
      }
    }
  }

  Form form;
  std::int64_t tokens;
  int lora_rank;
  std::vector<std::uint16_t> weight, keys, values, query, latents, positions;
  std::vector<float> a, b;
};

class LatentAttentionTest : public testing::VariantTest<AttentionKernel> {
 protected:
  KernelTable table() const {
    KernelTable table = best_kernels();
    table.attention = &kernel();
    return table;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, LatentAttentionTest,
                         ::testing::ValuesIn(testing::variants_of(testing::attention_kernels)),
                         testing::variant_name<AttentionKernel>);

TEST_P(LatentAttentionTest, EqualsExpandedKeysAndValues) {
  // Sizes of no kernel's width, one head, more heads than are computed together; ranks beyond a
  // block of scores.
  for (const Form& form : {Form{4, 16, 8, 40, 12, 0.2f}, Form{1, 7, 3, 5, 70, 0.5f},
                           Form{20, 128, 64, 512, 128, 0.07f}}) {
    for (const int rank : {0, 1, 8, 70}) {
      // Its reference multiplies by A and B for a second, under a sanitizer for ten.
      if (rank > 8 && form.rank > 100) continue;
      LatentCase c(form, form.rank > 100 ? 70 : 130, rank);
      const auto attention = c.attention(engine_of(2, table()));
      const std::vector<std::uint16_t> found = c.run(*attention);
      c.expect_near(found);
      // The same bits from any number of threads.
      EXPECT_EQ(c.run(*c.attention(engine_of(1, table()))), found);
      EXPECT_EQ(c.run(*c.attention(engine_of(5, table()))), found);
    }
  }
}

TEST(LatentAttention, LoraComesAndGoes) {
  const Form form{4, 16, 8, 40, 12, 0.2f};
  LatentCase with(form, 30, 4);
  LatentCase without = with;
  without.lora_rank = 0;
  const auto engine = engine_of(2, best_kernels());
  const auto attention = with.attention(engine);
  const std::vector<std::uint16_t> base = without.run(*without.attention(engine));
  EXPECT_NE(with.run(*attention), base);
  testing::apply_no_lora(*attention);
  EXPECT_EQ(with.run(*attention), base);
  with.b.assign(with.b.size(), 0.0f);
  with.set_lora(*attention);
  EXPECT_EQ(with.run(*attention), base) << "B = 0 is the base, bit for bit";
}

TEST(LatentAttention, RefusesWhatDoesNotFit) {
  const Form form{4, 16, 8, 40, 12, 0.2f};
  LatentCase c(form, 30, 4);
  const auto engine = engine_of(1, best_kernels());
  const auto view = [&](const std::vector<std::uint16_t>& bits, std::int64_t rows,
                        std::int64_t columns, const char* name) {
    return view_of(bits.data(), DType::kBfloat16, {rows, columns}, name);
  };
  const TensorView keys = view(c.keys, 160, 16, "keys");
  const TensorView values = view(c.values, 48, 40, "values");
  EXPECT_EQ(
      message_of([&] { LatentAttention(engine, form, view(c.keys, 16, 160, "keys"), values); }),
      "keys has shape [16, 160], expected [160, 16]");
  EXPECT_EQ(
      message_of([&] { LatentAttention(engine, form, keys, view(c.values, 40, 40, "values")); }),
      "values has shape [40, 40], expected [48, 40]");
  Form wrong = form;
  wrong.value = 0;
  EXPECT_EQ(message_of([&] { LatentAttention(engine, wrong, keys, values); }),
            "value is 0, expected 1 to 4096");
  const auto attention = c.attention(engine);
  EXPECT_EQ(message_of([&] {
              attention->load_lora(0, view_of(c.a, {4, 40}, "a"), view_of(c.b, {28, 16}, "b"));
            }),
            "b has shape [28, 16], expected [112, 4]");
  std::vector<std::uint16_t> out(48);
  LatentAttention::Arrays arrays = c.arrays(out);
  EXPECT_EQ(
      message_of([&] { attention->forward(arrays, 31); }),
      "latents has 1200 elements, heads 0 and tokens 40 apart, expected room for [1, 31, 40]");
  EXPECT_EQ(message_of([&] { attention->forward(arrays, 0); }), "tokens is 0, expected at least 1");
  arrays.out.count = 47;
  EXPECT_EQ(message_of([&] { attention->forward(arrays, 30); }),
            "out has 47 elements, heads 12 and tokens 0 apart, expected room for [4, 1, 12]");
  arrays = c.arrays(out);
  arrays.query.float32 = true;
  EXPECT_EQ(message_of([&] { attention->forward(arrays, 30); }),
            "query is float32, expected bfloat16");
  engine->close();
  EXPECT_THROW(attention->forward(c.arrays(out), 30), std::runtime_error);
}

}  // namespace
}  // namespace ktrt
