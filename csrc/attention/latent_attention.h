// One token's multi-head latent attention, on the engine's threads: over latents c [tokens, rank]
// and positions [tokens, rope], as a cache holds them.
//
// kv_b_proj makes keys U c and values V c of a head. For one query q · (U c) = (q U) · c and
// Σ p (V c) = V (Σ p c): U and V are read once, and latents are not expanded. A forward has three
// steps with a barrier between: q U of every head; attention, as in token_attention.h; each head's
// spans merged and multiplied with its V. LoRA of kv_b_proj is applied on the way, A and B in BF16
// and everything between in float32: scores are differences of large numbers.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "attention/head_array.h"
#include "attention/token_attention.h"
#include "base/aligned_buffer.h"
#include "base/tensor_view.h"
#include "engine/engine.h"
#include "lora/one_of_loras.h"

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

  struct Arrays {
    HeadArray query;      // BF16 [heads, 1, nope + rope]
    HeadArray latents;    // BF16 [1, tokens, rank]
    HeadArray positions;  // BF16 [1, tokens, rope]
    HeadArray out;        // BF16 [heads, 1, value]
  };

  // keys: Uᵀ of every head, BF16 [heads · rank, nope]; values: V, BF16 [heads · value, rank]. Both
  // contiguous, borrowed for the object's life. Throws std::invalid_argument.
  LatentAttention(std::shared_ptr<Engine> engine, const Form& form, const TensorView& keys,
                  const TensorView& values);

  // kv_b_proj's LoRAs by number, of which one acts, or none: see OneOfLoras. a [r, rank], b [heads
  // · (nope + value), r]: float32, scaling folded into b; each is rounded to BF16 once. Throw
  // std::invalid_argument.
  void load_lora(int number, const TensorView& a, const TensorView& b);
  void unload_lora(int number);
  void activate_loras(std::span<const int> numbers, std::span<const float> weights);

  // Over the first `tokens`. Throws as TokenAttention::forward() does.
  void forward(const Arrays& arrays, std::int64_t tokens);

 private:
  struct Lora {
    std::int64_t rank = 0;
    AlignedBuffer a;         // BF16 [r][rank]
    AlignedBuffer b_keys;    // BF16 [heads][r][nope]
    AlignedBuffer b_values;  // BF16 [heads][r][value]
  };
  struct Own;
  using Task = TokenAttention::Task;

  void check(const Arrays& arrays, std::int64_t tokens) const;
  Own own_of(const Task& task, int thread) const;
  void make_query(const Task& task, const HeadArray& query, std::int64_t head, int thread) const;
  void make_output(const Task& task, const HeadArray& out, std::int64_t head, int thread) const;
  void multiply(const std::uint16_t* x, const std::uint16_t* w, std::int64_t columns,
                std::int64_t k, float* out) const;
  void add_lora(const float* x, std::int64_t in, const std::uint16_t* shrink,
                const std::uint16_t* expand, std::int64_t out, float* sums) const;

  const std::shared_ptr<Engine> engine_;
  const Form form_;
  TokenAttention attention_;
  const std::uint16_t* keys_ = nullptr;
  const std::uint16_t* values_ = nullptr;
  std::int64_t width_ = 0;  // of the longest packed row
  OneOfLoras<Lora> loras_;
};

}  // namespace ktrt
