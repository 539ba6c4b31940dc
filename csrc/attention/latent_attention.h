// Multi-head latent attention of single tokens, on the engine's threads: over latents c [tokens,
// rank] and positions [tokens, rope], as a cache holds them. One token, or one of each of several
// sequences.
//
// kv_b_proj makes keys U c and values V c of a head. For one query q · (U c) = (q U) · c and
// Σ p (V c) = V (Σ p c): U and V are read once for all rows, and latents are not expanded. A
// forward has three steps with a barrier between: q U of every head; attention, see
// span_attention.h; each head's spans merged and multiplied with its V. LoRA of kv_b_proj is
// applied on the way, A and B in BF16 and everything between in float32: scores are differences of
// large numbers.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "attention/head_array.h"
#include "attention/slot_rows.h"
#include "attention/span_attention.h"
#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "engine/engine.h"
#include "lora/lora_table.h"

namespace ktrt {

class LatentAttention {
 public:
  static constexpr int kMaxRank = 1024;

  struct Form {
    std::int64_t heads = 0;
    std::int64_t nope = 0;   // numbers of a query that meet U
    std::int64_t rope = 0;   // those that meet positions
    std::int64_t rank = 0;   // of a latent
    std::int64_t value = 0;  // of a head's output
    float scaling = 1.0f;
  };

  // One token is a row. Latents and positions of as many sequences as there are slots.
  struct Arrays {
    HeadArray query;      // BF16 [heads, rows, nope + rope]
    HeadArray latents;    // BF16 [slots, 1, tokens, rank]
    HeadArray positions;  // BF16 [slots, 1, tokens, rope]
    HeadArray out;        // BF16 [heads, rows, value]
  };

  // keys: Uᵀ of every head, BF16 [heads · rank, nope]; values: V, BF16 [heads · value, rank]. Both
  // contiguous, borrowed for the object's life. Throws std::invalid_argument.
  LatentAttention(std::shared_ptr<Engine> engine, const Form& form, const TensorView& keys,
                  const TensorView& values);

  // kv_b_proj's LoRAs by number: see LoraTable. a [r, rank], b [heads · (nope + value), r]:
  // float32, scaling folded into b; each is rounded to BF16 once. Throw std::invalid_argument.
  void load_lora(int number, const TensorView& a, const TensorView& b);
  // One that adds nothing.
  void load_empty_lora(int number);
  void unload_lora(int number);
  void activate_loras(std::span<const int> numbers, std::span<const float> weights);
  // The memory of all that are held, in whole pages.
  std::size_t lora_bytes() const;

  // One row with the active LoRAs, over the first `tokens` of slot 0. Throws as
  // TokenAttention::forward() does.
  void forward(const Arrays& arrays, std::int64_t tokens);
  // Each row over its slot's first tokens, with the LoRA that its id names: the same bits as alone.
  void forward_rows(const Arrays& arrays, const SlotRows& rows, const AdapterIds& adapters);

 private:
  struct Lora {
    std::int64_t rank = 0;
    AlignedBuffer a;         // BF16 [r][rank]
    AlignedBuffer b_keys;    // BF16 [heads][r][nope]
    AlignedBuffer b_values;  // BF16 [heads][r][value]
    std::size_t bytes() const {
      return a.page_bytes() + b_keys.page_bytes() + b_values.page_bytes();
    }
  };
  using Loras = LoraTable<Lora>;
  using Task = SpanAttention::Task;
  struct Own;
  struct RowBlock;

  void check(const Arrays& arrays, std::int64_t rows, std::int64_t tokens,
             std::int64_t slots) const;
  SpanAttention::Row row_of(const Arrays& arrays, std::int64_t slot, std::int64_t length) const;
  void run(const Arrays& arrays, std::int64_t first_row, const Engine::Lease& lease);
  Own own_of(const Task& task, int thread) const;
  template <class Work>
  void for_blocks(std::int64_t rows, const Work& work) const;
  void ask_for_lora(std::int64_t head, bool values) const;
  void make_queries(const Task& task, const HeadArray& query, std::int64_t head, int thread) const;
  void merge(const Task& task, std::int64_t row, std::int64_t head, int thread) const;
  void make_outputs(const Task& task, const HeadArray& out, std::int64_t head, int thread) const;
  void store(const Task& task, std::int64_t row, std::int64_t head, const float* product,
             std::uint16_t* to, int thread) const;
  static bool adds(const Loras::Mix& mix);
  void add_lora(const float* x, std::int64_t in, const std::uint16_t* shrink,
                const std::uint16_t* expand, std::int64_t out, const Lora& lora, float weight,
                float* sums) const;

  const std::shared_ptr<Engine> engine_;
  const Form form_;
  SpanAttention spans_;
  const std::uint16_t* keys_ = nullptr;
  const std::uint16_t* values_ = nullptr;
  std::int64_t width_ = 0;  // of the longest packed row
  Loras loras_;
  // The running forward.
  std::vector<SpanAttention::Row> rows_;
  Loras::Rows chosen_;
};

}  // namespace ktrt
