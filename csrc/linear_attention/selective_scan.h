// Mamba's selective state space: every channel has a state of a few numbers, each with its own
// decay, for one token of a decode step or for all tokens of a prompt.
#pragma once

#include <cstdint>
#include <memory>

#include "engine/engine.h"
#include "kernels/linear_attention_args.h"
#include "linear_attention/token_array.h"

namespace ktrt {

class SelectiveScan {
 public:
  static constexpr std::int64_t kMaxSize = 256;

  struct Arrays {
    TokenArray x, dt, out;  // one head of `channels` numbers; dt is what it is after its softplus
    TokenArray b, c;        // one head of `size` numbers
    TokenArray a;           // float32 [channels, size], below 0
    StateArray state;       // [sequences][channels, size], written in place
  };

  // Throws std::invalid_argument.
  SelectiveScan(std::shared_ptr<Engine> engine, std::int64_t channels, std::int64_t size);

  // Throws std::invalid_argument: arrays; std::runtime_error once the engine is closed.
  void forward(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens);

 private:
  struct Buffers;

  void check(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) const;
  void run_block(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
                 std::int64_t first, std::int64_t tokens) const;

  const std::shared_ptr<Engine> engine_;
  const LinearAttentionKernel& kernel_;
  const std::int64_t channels_, size_;
};

}  // namespace ktrt
