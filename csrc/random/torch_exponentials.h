// Exponential draws as torch's CPU generator makes them, at some of the places only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktrt {

// The numbers of torch.Generator.get_state() that a Mersenne Twister consists of, at their places
// in an array of std::uint64_t.
struct TorchState {
  static constexpr std::size_t kLeft = 1;  // in the lower half: words left in the block, plus 1
  static constexpr std::size_t kNext = 2;
  static constexpr std::size_t kBlock = 3;
  static constexpr std::size_t kBlockWords = 624;
  static constexpr std::size_t kSize = kBlock + kBlockWords;  // and more that others use
};

// out[i] = q[indices[i]] for q = torch.empty(draws).exponential_(1, generator=...), where torch
// draws one number after the other (its builds with MKL do not on Intel's CPUs); `state` moves on
// by `draws`. The words between are passed over a block at a time, which takes 0.3 ns each instead
// of 10. Throws std::invalid_argument: indices are not ascending below `draws`, or no state of
// torch's.
void torch_exponentials(std::uint64_t* state, std::size_t draws, const std::int64_t* indices,
                        std::size_t count, float* out);

}  // namespace ktrt
