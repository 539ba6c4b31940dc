// A causal convolution of each channel over a few tokens, as layers with a state have before it.
#pragma once

#include <cstdint>
#include <memory>

#include "engine/engine.h"
#include "kernels/linear_attention_args.h"
#include "linear_attention/token_array.h"

namespace ktrt {

class ShortConv {
 public:
  static constexpr std::int64_t kMaxTaps = 16;

  struct Form {
    std::int64_t channels;
    std::int64_t taps;
    bool silu;
  };

  // All BF16, or all float32. weight [channels, taps], bias [channels] or none; state [sequences,
  // channels, state_tokens] or none: the last inputs before the first token, zeros without, and
  // the last ones of all afterwards.
  struct Arrays {
    TokenArray x, out;  // one head of `channels` numbers
    TokenArray weight, bias;
    TokenArray state;
    std::int64_t state_tokens = 0;  // at least taps - 1
  };

  // Throws std::invalid_argument.
  ShortConv(std::shared_ptr<Engine> engine, const Form& form);

  // Throws std::invalid_argument: arrays; std::runtime_error once the engine is closed.
  void forward(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens);

 private:
  struct Buffers;

  void check(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) const;
  void run_block(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
                 std::int64_t first_channel, std::int64_t begin, std::int64_t end) const;
  void read_history(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
                    std::int64_t first_channel, int channels, std::int64_t begin) const;
  void shift_state(const Arrays& arrays, std::int64_t sequence, std::int64_t first_channel,
                   int channels, std::int64_t tokens) const;

  const std::shared_ptr<Engine> engine_;
  const LinearAttentionKernel& kernel_;
  const Form form_;
};

}  // namespace ktrt
