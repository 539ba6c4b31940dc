// Many rows in one call against each row in a call for itself, bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "attention/latent_attention.h"
#include "attention/token_attention.h"
#include "helpers/linear_case.h"
#include "kernels/variants.h"

namespace ktrt {
namespace {

using testing::at;
using testing::best_kernels;
using testing::engine_of;
using testing::message_of;
using testing::Random;
using testing::to_bf16;
using testing::view_of;
using Bits = std::vector<std::uint16_t>;

constexpr std::int64_t kCapacity = 2100;
// One of nothing, blocks and spans that end everywhere; one slot twice.
const std::vector<std::int64_t> kLengths{65, 0, 1, 2049, 63, 300, 64, 65};
const std::vector<std::int64_t> kSlots{3, 1, 0, 5, 2, 4, 6, 3};
constexpr std::int64_t kSlotCount = 7;

Bits normals(Random& random, std::int64_t count, float deviation = 1.0f) {
  return to_bf16(random.normals(static_cast<std::size_t>(count), deviation));
}

HeadArray array_of(const Bits& bits, std::int64_t head, std::int64_t token, std::int64_t slot = 0) {
  return {const_cast<std::uint16_t*>(bits.data()),
          static_cast<std::int64_t>(bits.size()),
          head,
          token,
          false,
          slot};
}

// The same from a slot or a row on.
HeadArray from(HeadArray array, std::int64_t elements) {
  array.data = static_cast<std::uint16_t*>(array.data) + elements;
  array.count -= elements;
  return array;
}

// Numbers [kSlotCount, groups, kCapacity, size]: NaN after each slot's tokens.
struct Pool {
  Pool(std::int64_t groups_, std::int64_t size_, Random& random) : groups(groups_), size(size_) {
    constexpr std::uint16_t kNan = 0x7fc0;
    bits.assign(at(kSlotCount * groups * kCapacity, size, 0), kNan);
    for (std::int64_t slot = 0; slot < kSlotCount; ++slot) {
      std::int64_t held = 0;
      for (std::size_t i = 0; i < kSlots.size(); ++i) {
        if (kSlots[i] == slot) held = std::max(held, kLengths[i]);
      }
      for (std::int64_t group = 0; group < groups; ++group) {
        const Bits tokens = normals(random, held * size);
        std::copy(tokens.begin(), tokens.end(),
                  bits.begin() + (slot * groups + group) * kCapacity * size);
      }
    }
  }
  HeadArray array() const {
    return array_of(bits, kCapacity * size, size, groups * kCapacity * size);
  }
  HeadArray of_slot(std::int64_t slot) const {
    return from(array(), slot * groups * kCapacity * size);
  }

  std::int64_t groups, size;
  Bits bits;
};

SlotRows rows_of(const std::vector<std::int64_t>& slots, const std::vector<std::int64_t>& lengths) {
  return {slots.data(), lengths.data(), static_cast<std::int64_t>(slots.size()), kSlotCount,
          kCapacity};
}

// The output of row `row` in [rows][heads][size], as bytes to compare.
Bits row_of(const Bits& out, std::size_t row, std::int64_t width) {
  const auto first = out.begin() + static_cast<std::ptrdiff_t>(row) * width;
  return {first, first + width};
}

class DecodeRows : public testing::VariantTest<AttentionKernel> {
 protected:
  KernelTable table() const {
    KernelTable table = best_kernels();
    table.attention = &kernel();
    return table;
  }
};
INSTANTIATE_TEST_SUITE_P(Variants, DecodeRows,
                         ::testing::ValuesIn(testing::variants_of(testing::attention_kernels)),
                         testing::variant_name<AttentionKernel>);

struct TokenCase {
  TokenCase(const TokenAttention::Form& form_, std::int64_t rows)
      : form(form_),
        random(static_cast<std::uint64_t>(form.key_size)),
        query(normals(random, form.heads * rows * form.key_size, 2.0f)),
        keys(form.groups, form.key_size, random),
        values(form.groups, form.value_size, random) {}

  // As a model has them: queries [heads][rows][size], outputs [rows][heads][size].
  TokenAttention::Arrays arrays(Bits& out, std::int64_t rows) const {
    TokenAttention::Arrays arrays;
    arrays.query = array_of(query, rows * form.key_size, form.key_size);
    arrays.keys = keys.array();
    arrays.values = values.array();
    arrays.out = array_of(out, form.value_size, form.heads * form.value_size);
    return arrays;
  }
  Bits together(TokenAttention& attention, const SlotRows& rows) const {
    Bits out(at(rows.rows, form.heads * form.value_size, 0), 0x1234);
    attention.forward_rows(arrays(out, rows.rows), rows);
    return out;
  }
  Bits alone(TokenAttention& attention, const SlotRows& rows, std::int64_t row) const {
    Bits out(static_cast<std::size_t>(form.heads * form.value_size));
    if (rows.lengths[row] == 0) return out;
    TokenAttention::Arrays one = arrays(out, rows.rows);
    one.query = from(one.query, row * form.key_size);
    one.keys = keys.of_slot(rows.slots[row]);
    one.values = values.of_slot(rows.slots[row]);
    attention.forward(one, 0, rows.lengths[row]);
    return out;
  }

  TokenAttention::Form form;
  Random random;
  Bits query;
  Pool keys, values;
};

TEST_P(DecodeRows, TokensEqualEachRowAlone) {
  for (const TokenAttention::Form& form : {TokenAttention::Form{4, 4, 64, 0, 64, 0.2f, 0.0f},
                                           TokenAttention::Form{8, 2, 128, 0, 128, 0.1f, 3.0f},
                                           TokenAttention::Form{21, 1, 40, 0, 24, 0.3f, 0.0f}}) {
    const TokenCase c(form, static_cast<std::int64_t>(kSlots.size()));
    const std::vector<float> sinks(static_cast<std::size_t>(form.heads), 0.5f);
    const SlotRows rows = rows_of(kSlots, kLengths);
    for (const int threads : {1, 3}) {
      TokenAttention attention(engine_of(threads, table()), form,
                               view_of(sinks, {form.heads}, "sinks"));
      const Bits found = c.together(attention, rows);
      for (std::size_t row = 0; row < kSlots.size(); ++row) {
        ASSERT_EQ(row_of(found, row, form.heads * form.value_size),
                  c.alone(attention, rows, static_cast<std::int64_t>(row)))
            << "row " << row << " of " << kLengths[row] << " tokens, " << threads << " threads";
      }
    }
  }
}

// More rows than a task takes, and rows whose sums fill a pass each.
TEST(DecodeRows, TokensOfManyRows) {
  const std::vector<std::pair<TokenAttention::Form, std::size_t>> cases{
      {TokenAttention::Form{4, 2, 16, 0, 16, 0.3f, 0.0f}, 150},
      {TokenAttention::Form{128, 1, 32, 0, 512, 0.2f, 0.0f}, 6}};
  for (const auto& [form, count] : cases) {
    const TokenCase c(form, static_cast<std::int64_t>(count));
    std::vector<std::int64_t> slots(count);
    std::vector<std::int64_t> lengths(count);
    for (std::size_t i = 0; i < count; ++i) {
      slots[i] = count > 100 ? kSlots[i % kSlots.size()] : 5;
      lengths[i] = count > 100 ? kLengths[i % kSlots.size()] : 300;
    }
    const SlotRows rows = rows_of(slots, lengths);
    TokenAttention attention(engine_of(2, best_kernels()), form, std::nullopt);
    const Bits found = c.together(attention, rows);
    for (std::size_t row = 0; row < count; ++row) {
      ASSERT_EQ(row_of(found, row, form.heads * form.value_size),
                c.alone(attention, rows, static_cast<std::int64_t>(row)))
          << row;
    }
  }
}

// The last 128 tokens of a slot, in a ring.
TEST(DecodeRows, WindowsInARingEqualThoseOfFlatMemory) {
  const TokenAttention::Form form{4, 2, 16, 0, 16, 0.3f, 0.0f};
  const TokenCase c(form, 1);
  constexpr std::int64_t kRing = 128;
  for (const std::int64_t length : {7, 100, 128, 1000, 1001, 2049}) {
    Bits ring_keys(2 * kRing * 16), ring_values(2 * kRing * 16);
    TokenAttention attention(engine_of(2, best_kernels()), form, std::nullopt);
    const std::vector<std::int64_t> slots{5}, lengths{length};
    SlotRows rows = rows_of(slots, lengths);
    rows.window = 70;
    const std::int64_t start = std::max<std::int64_t>(0, length - rows.window);
    for (const std::int64_t group : {0, 1}) {
      for (std::int64_t t = start; t < length; ++t) {
        const std::int64_t to = (group * kRing + t % kRing) * 16;
        std::copy_n(bf16_at(c.keys.of_slot(5), group, t), 16, ring_keys.begin() + to);
        std::copy_n(bf16_at(c.values.of_slot(5), group, t), 16, ring_values.begin() + to);
      }
    }
    Bits alone(64), found(64), one(64);
    TokenAttention::Arrays arrays = c.arrays(alone, 1);
    arrays.keys = c.keys.of_slot(5);
    arrays.values = c.values.of_slot(5);
    attention.forward(arrays, start, length);
    EXPECT_EQ(c.together(attention, rows), alone) << length;
    arrays.out = c.arrays(found, 1).out;
    arrays.keys = array_of(ring_keys, kRing * 16, 16);
    arrays.values = array_of(ring_values, kRing * 16, 16);
    const std::vector<std::int64_t> first{0};
    rows.slots = first.data();
    rows.slot_count = 1;
    rows.capacity = kRing;
    attention.forward_rows(arrays, rows);
    EXPECT_EQ(found, alone) << length;
    arrays.out = c.arrays(one, 1).out;
    attention.forward(arrays, start, length, kRing);
    EXPECT_EQ(one, alone) << length;
  }
}

TEST(DecodeRows, SlotsAndLengthsAreReadAtEachCall) {
  const TokenAttention::Form form{4, 2, 16, 0, 16, 0.3f, 0.0f};
  const TokenCase c(form, 2);
  TokenAttention attention(engine_of(2, best_kernels()), form, std::nullopt);
  std::vector<std::int64_t> slots{3, 5};
  std::vector<std::int64_t> lengths{65, 2049};
  const SlotRows rows = rows_of(slots, lengths);
  const Bits before = c.together(attention, rows);
  slots = {5, 3};
  lengths = {700, 0};
  const Bits after = c.together(attention, rows);
  EXPECT_NE(row_of(after, 0, 64), row_of(before, 0, 64));
  EXPECT_EQ(row_of(after, 0, 64), c.alone(attention, rows, 0));
  EXPECT_EQ(row_of(after, 1, 64), Bits(64)) << "a row of nothing is zeros";
}

TEST(DecodeRows, RefusesRowsThatAreNotThere) {
  const TokenAttention::Form form{4, 2, 16, 0, 16, 0.3f, 0.0f};
  const TokenCase c(form, 2);
  TokenAttention attention(engine_of(2, best_kernels()), form, std::nullopt);
  std::vector<std::int64_t> slots{3, 5};
  std::vector<std::int64_t> lengths{65, 2049};
  SlotRows rows = rows_of(slots, lengths);
  const auto refusal = [&] { return message_of([&] { c.together(attention, rows); }); };
  slots[1] = 7;
  EXPECT_EQ(refusal(), "slots[1] is 7, expected 0 to 6");
  slots[1] = -1;
  EXPECT_EQ(refusal(), "slots[1] is -1, expected 0 to 6");
  lengths[1] = 0;
  EXPECT_EQ(refusal(), "nothing was thrown") << "a row of nothing has no slot";
  slots[1] = 5;
  lengths[0] = kCapacity + 1;
  EXPECT_EQ(refusal(), "lengths[0] is 2101, expected 0 to 2100");
  lengths[0] = -1;
  EXPECT_EQ(refusal(), "lengths[0] is -1, expected 0 to 2100");
  lengths[0] = 1;
  ++rows.capacity;
  EXPECT_EQ(refusal(),
            "keys has 470400 elements, slots 67200, heads 33600 and tokens 16 apart, expected room "
            "for [7, 2, 2101, 16]");
  rows.capacity = std::int64_t{1} << 62;
  EXPECT_EQ(refusal().substr(0, 8), "keys has");
  rows = rows_of(slots, lengths);
  rows.slot_count = 8;
  EXPECT_EQ(refusal().substr(0, 8), "keys has");
  rows = rows_of(slots, lengths);
  rows.rows = 0;
  EXPECT_EQ(refusal(), "rows is 0, expected at least 1");
  rows.rows = 2;
  rows.lengths = nullptr;
  EXPECT_EQ(refusal(), "slots or lengths is null, expected addresses");
}

// Latent attention with LoRAs 0 of rank 8, 1 of rank 70 (more than a block of scores) and 4 of rank
// 1.
struct LatentRows {
  LatentRows(const LatentAttention::Form& form_, std::int64_t rows)
      : form(form_),
        random(static_cast<std::uint64_t>(form.rank)),
        keys(normals(random, form.heads * form.rank * form.nope, scale())),
        values(normals(random, form.heads * form.value * form.rank, scale())),
        query(normals(random, form.heads * rows * (form.nope + form.rope))),
        latents(1, form.rank, random),
        positions(1, form.rope, random) {}
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(form.rank)); }

  std::unique_ptr<LatentAttention> attention(std::shared_ptr<Engine> engine) {
    auto made = std::make_unique<LatentAttention>(
        std::move(engine), form,
        view_of(keys.data(), DType::kBfloat16, {form.heads * form.rank, form.nope}, "keys"),
        view_of(values.data(), DType::kBfloat16, {form.heads * form.value, form.rank}, "values"));
    Random numbers(7);
    for (const auto& [number, rank] : {std::pair{0, 8}, std::pair{1, 70}, std::pair{4, 1}}) {
      const std::int64_t outputs = form.heads * (form.nope + form.value);
      const std::vector<float> a = numbers.normals(at(rank, form.rank, 0), scale());
      const std::vector<float> b = numbers.normals(at(outputs, rank, 0), 0.5f);
      made->load_lora(number, view_of(a, {rank, form.rank}, "a"), view_of(b, {outputs, rank}, "b"));
    }
    return made;
  }

  LatentAttention::Arrays arrays(Bits& out, std::int64_t rows) const {
    const std::int64_t size = form.nope + form.rope;
    return {array_of(query, rows * size, size), latents.array(), positions.array(),
            array_of(out, form.value, form.heads * form.value)};
  }
  Bits together(LatentAttention& attention, const SlotRows& rows,
                const std::vector<std::int32_t>& ids) const {
    Bits out(at(rows.rows, form.heads * form.value, 0), 0x1234);
    const AdapterIds adapters{ids.empty() ? nullptr : ids.data(),
                              static_cast<std::int64_t>(ids.size())};
    attention.forward_rows(arrays(out, rows.rows), rows, adapters);
    return out;
  }
  // The row in a call for itself, with the active LoRAs.
  Bits alone(LatentAttention& attention, const SlotRows& rows, std::int64_t row) const {
    Bits out(static_cast<std::size_t>(form.heads * form.value));
    if (rows.lengths[row] == 0) return out;
    LatentAttention::Arrays one = arrays(out, rows.rows);
    one.query = from(one.query, row * (form.nope + form.rope));
    one.latents = latents.of_slot(rows.slots[row]);
    one.positions = positions.of_slot(rows.slots[row]);
    attention.forward(one, rows.lengths[row]);
    return out;
  }

  LatentAttention::Form form;
  Random random;
  Bits keys, values, query;
  Pool latents, positions;
};

void activate(LatentAttention& attention, std::int32_t id) {
  if (id == kBaseRow) {
    testing::apply_no_lora(attention);
  } else if (id == kActiveRow) {
    attention.activate_loras(std::vector<int>{4, 0}, std::vector<float>{0.5f, -1.0f});
  } else {
    testing::apply_lora(attention, id);
  }
}

TEST_P(DecodeRows, LatentsEqualEachRowAlone) {
  const std::vector<std::vector<std::int32_t>> batches{
      {0, 1, -1, 4, 1, 0, -2, -1}, std::vector<std::int32_t>(8, 1), {}};
  for (const LatentAttention::Form& form :
       {LatentAttention::Form{4, 16, 8, 40, 12, 0.2f}, LatentAttention::Form{1, 7, 3, 5, 70, 0.5f},
        LatentAttention::Form{20, 128, 64, 512, 128, 0.07f}}) {
    LatentRows c(form, static_cast<std::int64_t>(kSlots.size()));
    const SlotRows rows = rows_of(kSlots, kLengths);
    const auto attention = c.attention(engine_of(3, table()));
    for (const auto& ids : batches) {
      activate(*attention, kActiveRow);
      const Bits found = c.together(*attention, rows, ids);
      for (std::size_t row = 0; row < kSlots.size(); ++row) {
        activate(*attention, ids.empty() ? kActiveRow : ids[row]);
        ASSERT_EQ(row_of(found, row, form.heads * form.value),
                  c.alone(*attention, rows, static_cast<std::int64_t>(row)))
            << "row " << row << " of " << kLengths[row] << " tokens, rank " << form.rank;
      }
    }
  }
}

TEST(DecodeRows, LatentsOfManyRows) {
  const std::vector<std::pair<LatentAttention::Form, std::size_t>> cases{
      {LatentAttention::Form{4, 16, 8, 40, 12, 0.2f}, 150},
      {LatentAttention::Form{128, 16, 8, 512, 16, 0.2f}, 6}};
  for (const auto& [form, count] : cases) {
    LatentRows c(form, static_cast<std::int64_t>(count));
    std::vector<std::int64_t> slots(count);
    std::vector<std::int64_t> lengths(count);
    std::vector<std::int32_t> ids(count);
    for (std::size_t i = 0; i < count; ++i) {
      slots[i] = count > 100 ? kSlots[i % kSlots.size()] : 5;
      lengths[i] = count > 100 ? kLengths[i % kSlots.size()] : 300;
      ids[i] = std::vector<std::int32_t>{0, 1, -1, 4, -1}[i % 5];
    }
    const SlotRows rows = rows_of(slots, lengths);
    const auto attention = c.attention(engine_of(2, best_kernels()));
    const Bits found = c.together(*attention, rows, ids);
    for (std::size_t row = 0; row < count; ++row) {
      activate(*attention, ids[row]);
      ASSERT_EQ(row_of(found, row, form.heads * form.value),
                c.alone(*attention, rows, static_cast<std::int64_t>(row)))
          << row;
    }
  }
}

// Weights act between A and B: a LoRA at weight 0.5 is one of half of B, which is exact in BF16;
// two parts are one LoRA of both ranks, apart from the order of the sums.
TEST(DecodeRows, LatentsAddWeightedSums) {
  LatentRows c({4, 16, 8, 40, 12, 0.2f}, 1);
  const auto attention = c.attention(engine_of(1, best_kernels()));
  const std::vector<std::int64_t> slots{5};
  const std::vector<std::int64_t> lengths{300};
  const SlotRows rows = rows_of(slots, lengths);
  Random numbers(7);
  std::vector<float> a = numbers.normals(8 * 40, c.scale());
  std::vector<float> b = numbers.normals(4 * 28 * 8, 0.5f);
  const auto load = [&](int number) {
    attention->load_lora(number, view_of(a, {8, 40}, "a"), view_of(b, {4 * 28, 8}, "b"));
  };
  load(2);
  attention->activate_loras(std::vector<int>{2}, std::vector<float>{0.5f});
  const Bits weighted = c.alone(*attention, rows, 0);
  for (float& each : b) each *= 0.5f;
  load(3);
  activate(*attention, 3);
  EXPECT_EQ(c.alone(*attention, rows, 0), weighted);
  // The same LoRA at 1.5 and at -0.5 is it at 1, and with nothing the base.
  attention->load_empty_lora(9);
  const auto near = [&](const std::vector<int>& ids, const std::vector<float>& weights,
                        const Bits& expected) {
    attention->activate_loras(ids, weights);
    const Bits found = c.alone(*attention, rows, 0);
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_NEAR(bf16_to_f32(found[i]), bf16_to_f32(expected[i]), 0.02) << i;
    }
  };
  near({2, 3}, {1.0f, -1.0f}, weighted);
  activate(*attention, kBaseRow);
  const Bits base = c.alone(*attention, rows, 0);
  EXPECT_NE(base, weighted);
  near({2, 3}, {0.5f, -1.0f}, base);
  activate(*attention, 9);
  EXPECT_EQ(c.alone(*attention, rows, 0), base);
  EXPECT_EQ(c.together(*attention, rows, {9}), base);
}

TEST(DecodeRows, LatentsWhoseSetChangesDuringForwards) {
  LatentRows c({4, 16, 8, 40, 12, 0.2f}, static_cast<std::int64_t>(kSlots.size()));
  const SlotRows rows = rows_of(kSlots, kLengths);
  const auto attention = c.attention(engine_of(2, best_kernels()));
  const std::vector<std::int32_t> ids{0, 1, -1, 4, 1, 0, -1, -1};
  const Bits before = c.together(*attention, rows, ids);
  Random numbers(3);
  const std::vector<float> a = numbers.normals(8 * 40, c.scale());
  const std::vector<float> b = numbers.normals(4 * 28 * 8, 0.5f);
  std::atomic<bool> stop{false};
  std::thread changing([&] {
    for (int i = 0; !stop.load(); ++i) {
      attention->load_lora(2, view_of(a, {8, 40}, "a"), view_of(b, {4 * 28, 8}, "b"));
      attention->activate_loras(std::vector<int>{i % 2 == 0 ? 2 : 0}, std::vector<float>{1.0f});
      if (i % 2 == 1) attention->unload_lora(2);
      EXPECT_GT(attention->lora_bytes(), 0U);
    }
  });
  for (int i = 0; i < 50; ++i) EXPECT_EQ(c.together(*attention, rows, ids), before);
  stop.store(true);
  changing.join();
}

TEST(DecodeRows, LatentsRefuseAdaptersThatAreNotHeld) {
  LatentRows c({4, 16, 8, 40, 12, 0.2f}, 2);
  const auto attention = c.attention(engine_of(1, best_kernels()));
  const std::vector<std::int64_t> slots{0, 1};
  const std::vector<std::int64_t> lengths{1, 0};
  const SlotRows rows = rows_of(slots, lengths);
  EXPECT_EQ(
      message_of([&] { c.together(*attention, rows, {0, 2}); }),
      "adapter_ids[1] is 2, expected the number of a LoRA that is held, -1 for none or -2 for "
      "the active ones");
  EXPECT_EQ(message_of([&] { c.together(*attention, rows, {0}); }),
            "there are 1 adapter ids for 2 rows");
}

}  // namespace
}  // namespace ktrt
