#include "attention/prompt_attention.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "base/aligned_buffer.h"

namespace ktrt {

namespace {

// Rows of a block of queries, about: their sums of values of 128 numbers take 128 KB, so that they
// stay in the L2 cache, and packing 64 keys and values for them a fiftieth of the time.
constexpr std::int64_t kBlockRows = 256;
// Rows that go through scores, exponentials and values together: a multiple of the register
// block's rows whose scores stay in the L1 cache.
constexpr std::int64_t kRowsTogether = 48;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

class Prompt {
 public:
  Prompt(const SpanAttention::Form& form, const std::vector<float>& sinks,
         const PromptArrays& arrays, const PromptSpan& span, const PromptAttentionKernel& kernel)
      : form_(form),
        sinks_(sinks),
        arrays_(arrays),
        span_(span),
        kernel_(kernel),
        heads_(form.heads / form.groups),
        positions_(std::max<std::int64_t>(kBlockRows / heads_, 1)),
        rows_(positions_ * heads_),
        key_width_(round_up<std::int64_t>(form.key_size, 32)),
        value_width_(round_up<std::int64_t>(form.value_size, kPromptColumns)) {}

  std::int64_t items() const {
    return form_.groups * ((span_.tokens + positions_ - 1) / positions_);
  }
  std::int64_t own_bytes() const {
    const std::int64_t halves =
        rows_ * key_width_ + kPromptKeys * (key_width_ + value_width_ + kRowsTogether);
    const std::int64_t floats = kRowsTogether * (kPromptKeys + 1) + rows_ * (value_width_ + 2);
    return round_up<std::int64_t>(2 * halves + 4 * floats, kCacheLine);
  }
  void compute(std::int64_t item, std::byte* memory) const;

 private:
  // A thread's memory, and what it works on.
  struct Block {
    float* sums;             // [rows][value_width]
    float* scores;           // [kRowsTogether][kPromptKeys]
    float* max;              // [rows]
    float* sum;              // [rows]
    float* carry;            // [kRowsTogether]
    std::uint16_t* query;    // [rows][key_width]
    std::uint16_t* keys;     // packed
    std::uint16_t* values;   // packed
    std::uint16_t* weights;  // [kRowsTogether][kPromptKeys]
    std::int64_t group;
    std::int64_t position;  // of the first rows
    std::int64_t rows;
  };

  Block block_of(std::int64_t item, std::byte* memory) const;
  void pack_queries(const Block& block) const;
  void add_keys(const Block& block, std::int64_t key) const;
  void finish(const Block& block) const;

  const SpanAttention::Form& form_;
  const std::vector<float>& sinks_;
  const PromptArrays& arrays_;
  const PromptSpan& span_;
  const PromptAttentionKernel& kernel_;
  const std::int64_t heads_;      // of a group
  const std::int64_t positions_;  // of a block
  const std::int64_t rows_;       // of a block, at most
  const std::int64_t key_width_, value_width_;
};

// The last positions, which see the most, come first.
Prompt::Block Prompt::block_of(std::int64_t item, std::byte* memory) const {
  Block block{};
  block.sums = reinterpret_cast<float*>(memory);
  block.scores = block.sums + rows_ * value_width_;
  block.max = block.scores + kRowsTogether * kPromptKeys;
  block.sum = block.max + rows_;
  block.carry = block.sum + rows_;
  block.query = reinterpret_cast<std::uint16_t*>(block.carry + kRowsTogether);
  block.keys = block.query + rows_ * key_width_;
  block.values = block.keys + kPromptKeys * key_width_;
  block.weights = block.values + kPromptKeys * value_width_;
  const std::int64_t end = span_.tokens - item / form_.groups * positions_;
  const std::int64_t begin = std::max<std::int64_t>(end - positions_, 0);
  block.group = item % form_.groups;
  block.position = span_.start + begin;
  block.rows = (end - begin) * heads_;
  return block;
}

void Prompt::pack_queries(const Block& block) const {
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const std::uint16_t* const from = bf16_at(arrays_.query, block.group * heads_ + row % heads_,
                                              block.position - span_.start + row / heads_);
    std::uint16_t* const to = block.query + row * key_width_;
    std::fill(std::copy_n(from, form_.key_size, to), to + key_width_, std::uint16_t{0});
  }
}

// One block of keys, from position `key` on.
void Prompt::add_keys(const Block& block, std::int64_t key) const {
  const auto key_size = static_cast<int>(form_.key_size);
  const auto value_size = static_cast<int>(form_.value_size);
  const std::int64_t end =
      std::min<std::int64_t>(block.position + block.rows / heads_ - key, kPromptKeys);
  PromptPackArgs pack{};
  pack.begin = static_cast<int>(std::max<std::int64_t>(span_.first - key, 0));
  pack.end = static_cast<int>(end);
  const auto packed = [&](const HeadArray& array, int size, std::uint16_t* out) {
    pack.rows = bf16_at(array, block.group, key - span_.first);
    pack.stride = array.token_stride;
    pack.size = size;
    pack.out = out;
    return pack;
  };
  kernel_.pack_keys(packed(arrays_.keys, key_size, block.keys));
  kernel_.pack_values(packed(arrays_.values, value_size, block.values));
  for (std::int64_t first = 0; first < block.rows; first += kRowsTogether) {
    const std::int64_t rows = std::min(kRowsTogether, block.rows - first);
    const std::int64_t position = block.position + first / heads_;
    const std::int64_t last = block.position + (first + rows - 1) / heads_;
    if (key > last || key + kPromptKeys <= span_.seen_from(position)) continue;
    const auto count = static_cast<int>(rows);
    kernel_.multiply({block.query + first * key_width_, key_width_, count, block.keys,
                      static_cast<int>(key_width_ / 2), kPromptKeys, nullptr, block.scores});
    kernel_.softmax({block.scores, count, static_cast<int>(first), static_cast<int>(heads_),
                     block.position + 1 - key, span_.window, form_.scaling, form_.softcap,
                     block.max + first, block.sum + first, block.carry, block.weights});
    kernel_.multiply({block.weights, kPromptKeys, count, block.values, kPromptKeys / 2,
                      static_cast<int>(value_width_), block.carry,
                      block.sums + first * value_width_});
  }
}

void Prompt::finish(const Block& block) const {
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const std::int64_t head = block.group * heads_ + row % heads_;
    const std::uint16_t* const out =
        bf16_at(arrays_.out, head, block.position - span_.start + row / heads_);
    kernel_.finish({block.sums + row * value_width_, block.max[row], block.sum[row],
                    sinks_[static_cast<std::size_t>(head)], static_cast<int>(form_.value_size),
                    const_cast<std::uint16_t*>(out)});
  }
}

void Prompt::compute(std::int64_t item, std::byte* memory) const {
  const Block block = block_of(item, memory);
  pack_queries(block);
  std::fill_n(block.sums, block.rows * value_width_, 0.0f);
  std::fill_n(block.max, block.rows, kNothing);
  std::fill_n(block.sum, block.rows, 0.0f);
  const std::int64_t end = block.position + block.rows / heads_;
  const std::int64_t seen = span_.seen_from(block.position);
  for (std::int64_t key = seen - seen % kPromptKeys; key < end; key += kPromptKeys) {
    add_keys(block, key);
  }
  finish(block);
}

}  // namespace

void attend_prompt(const SpanAttention::Form& form, const std::vector<float>& sinks,
                   const PromptArrays& arrays, const PromptSpan& span, const Engine::Lease& lease,
                   const PromptAttentionKernel& kernel) {
  const Prompt prompt(form, sinks, arrays, span, kernel);
  ThreadPool& pool = lease.pool();
  const auto own = static_cast<std::size_t>(prompt.own_bytes());
  std::byte* const memory = lease.scratch().block(own * static_cast<std::size_t>(pool.size()));
  std::atomic<std::int64_t> next{0};
  pool.run([&](int thread) {
    for (;;) {
      const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= prompt.items()) break;
      prompt.compute(item, memory + static_cast<std::size_t>(thread) * own);
    }
  });
}

}  // namespace ktrt
