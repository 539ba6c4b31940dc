// Linear attention: a state of key_size × value_size numbers per head instead of keys and values,
// for one token of a decode step or for all tokens of a prompt.
//
// Heads and blocks of kStateColumns columns of the state are independent, and threads claim them. A
// block stays in the L1 cache while all tokens pass, so that the state is read and written once.
// The recurrence itself takes no more arithmetic than its chunked forms do (80,000 multiply-adds
// per token and head of 128 × 128), and its bits depend neither on the threads nor on how a prompt
// is cut into forwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "engine/engine.h"
#include "kernels/linear_attention_args.h"
#include "linear_attention/token_array.h"

namespace ktrt {

class LinearAttention {
 public:
  static constexpr std::int64_t kMaxSize = 256;

  struct Form {
    std::int64_t heads;      // of values, and of the state
    std::int64_t key_heads;  // a divisor of heads: each serves as many consecutive heads
    std::int64_t key_size;
    std::int64_t value_size;
    float scaling;          // of queries
    bool subtracts;         // the delta rule: values minus what the state holds for the key
    bool unit_keys;         // queries and keys are divided by their norms
    bool decay_per_key;     // a decay for each number of a key, or one for each head
    bool transposed_state;  // [value_size, key_size]
  };

  // decay is the logarithm of what the state is multiplied by, at most 0. beta may be absent: 1.
  struct Arrays {
    TokenArray query, key, value, decay, beta, out;
    StateArray state;  // [sequences][heads, key_size, value_size], written in place
  };

  // Throws std::invalid_argument.
  LinearAttention(std::shared_ptr<Engine> engine, const Form& form);

  // Throws std::invalid_argument: arrays; std::runtime_error once the engine is closed.
  void forward(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens);

 private:
  struct Buffers;

  void check(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) const;
  Buffers buffers_in(std::byte* memory) const;
  void run_block(const Arrays& arrays, const Buffers& buffers, std::int64_t block,
                 std::int64_t tokens) const;
  void move_state(float* held, float* state, std::int64_t columns, bool store) const;
  void prepare(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
               std::int64_t head, std::int64_t token, int count) const;

  const std::shared_ptr<Engine> engine_;
  const LinearAttentionKernel& kernel_;
  const Form form_;
  const std::int64_t rows_;           // key_size, filled up
  const std::int64_t column_blocks_;  // of a head
};

}  // namespace ktrt
