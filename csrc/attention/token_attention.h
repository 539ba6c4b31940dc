// Attention of single tokens over a cache of keys and values, BF16 with float32 sums, on the
// engine's threads: one token, or one of each of several sequences. See span_attention.h.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "attention/head_array.h"
#include "attention/prompt_attention.h"
#include "attention/slot_rows.h"
#include "attention/span_attention.h"
#include "base/tensor_view.h"
#include "engine/engine.h"

namespace ktrt {

class TokenAttention {
 public:
  using Form = SpanAttention::Form;

  // One token is a row. Keys and values [slots, groups, tokens, size] of as many sequences.
  struct Arrays {
    HeadArray query;              // [heads, rows, key_size]
    HeadArray second_query;       // [heads, rows, second_key_size]
    HeadArray keys;               // [slots, groups, tokens, key_size]
    HeadArray second_keys;        // [slots, groups, tokens, second_key_size]
    HeadArray values;             // [slots, groups, tokens, value_size]
    HeadArray out;                // [heads, rows, value_size]
    const float* mask = nullptr;  // [mask_count], of all rows
    std::int64_t mask_count = 0;
  };

  // sinks: [heads] in any float dtype, copied. Throws std::invalid_argument.
  TokenAttention(std::shared_ptr<Engine> engine, const Form& form,
                 const std::optional<TensorView>& sinks);

  const Form& form() const { return spans_.form(); }
  const char* kernel_name() const { return engine_->kernels().attention->name; }

  // One row over tokens [start, end) of slot 0. Throws std::invalid_argument naming an array that
  // is too small; std::runtime_error once the engine is closed.
  // `ring`: token t lies at t % ring, for as many tokens at most; 0: at t.
  void forward(const Arrays& arrays, std::int64_t start, std::int64_t end, std::int64_t ring = 0);
  // Each row over its slot's first tokens, or the window's of them: the same bits as alone.
  void forward_rows(const Arrays& arrays, const SlotRows& rows);
  // Whether this processor has a kernel for forward_prompt().
  bool takes_prompts() const { return prompts_ != nullptr; }
  // Throws std::invalid_argument; as forward() does.
  void forward_prompt(const PromptArrays& arrays, const PromptSpan& span);

 private:
  using Task = SpanAttention::Task;

  void check(const Arrays& arrays, std::int64_t rows, std::int64_t tokens,
             std::int64_t slots) const;
  SpanAttention::Row row_of(const Arrays& arrays, std::int64_t slot, std::int64_t start,
                            std::int64_t end) const;
  void run(const Arrays& arrays, std::int64_t first_row, std::int64_t ring,
           const Engine::Lease& lease);
  void pack(const Task& task, const Arrays& arrays, std::int64_t first_row, std::int64_t row,
            std::int64_t head) const;
  void merge(const Task& task, const HeadArray& out, std::int64_t first_row, std::int64_t row,
             std::int64_t head, int thread) const;

  const std::shared_ptr<Engine> engine_;
  SpanAttention spans_;
  const PromptAttentionKernel* const prompts_;
  std::vector<SpanAttention::Row> rows_;  // of the forward that runs
};

}  // namespace ktrt
