#include "linear_attention/short_conv.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "base/check.h"
#include "linear_attention/of_engine.h"

namespace ktrt {

namespace {

// Tokens that pass through the buffers at once.
constexpr int kTokens = 16;
// Tokens of a block that a thread claims.
constexpr std::int64_t kBlock = 256;

}  // namespace

struct ShortConv::Buffers {
  float* x;       // [taps - 1 + kTokens][kConvChannels]
  float* weight;  // [taps][kConvChannels]
  float* bias;
  float* out;   // [kTokens][kConvChannels]
  float* rows;  // [kConvChannels][kMaxTaps]: what arrays have channel by channel
};

ShortConv::ShortConv(std::shared_ptr<Engine> engine, const Form& form)
    : engine_(std::move(engine)), kernel_(kernel_of(engine_.get())), form_(form) {
  KTRT_CHECK(form.channels >= 1 && form.channels <= (1 << 24),
             "channels is " << form.channels << ", expected 1 to 2^24");
  KTRT_CHECK(form.taps >= 1 && form.taps <= kMaxTaps,
             "taps is " << form.taps << ", expected 1 to " << std::int64_t{kMaxTaps});
}

void ShortConv::check(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) const {
  const TokenShape rows{sequences, tokens, 1, form_.channels};
  check_token_array("x", arrays.x, rows);
  check_token_array("out", arrays.out, rows);
  check_token_array("weight", arrays.weight, {1, 1, 1, form_.channels * form_.taps});
  const bool float32 = arrays.x.float32;
  KTRT_CHECK(arrays.out.float32 == float32 && arrays.weight.float32 == float32,
             "x, weight and out have different dtypes, expected one");
  if (arrays.bias.data != nullptr) {
    check_token_array("bias", arrays.bias, {1, 1, 1, form_.channels});
    KTRT_CHECK(arrays.bias.float32 == float32, "bias has another dtype than x");
  }
  if (arrays.state.data == nullptr) return;
  KTRT_CHECK(arrays.state.float32 == float32, "state has another dtype than x");
  KTRT_CHECK(arrays.state_tokens >= form_.taps - 1 && arrays.state_tokens <= kMaxTaps,
             "state has " << arrays.state_tokens << " tokens, expected " << form_.taps - 1 << " to "
                          << std::int64_t{kMaxTaps});
  check_token_array("state", arrays.state, {sequences, 1, 1, form_.channels * arrays.state_tokens});
}

void ShortConv::forward(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) {
  check_counts(sequences, tokens);
  if (sequences == 0 || tokens == 0) return;
  check(arrays, sequences, tokens);
  const auto lease = engine_->lease();
  const std::size_t own =
      scratch_stride(static_cast<std::size_t>(2 * form_.taps + 2 * kTokens + kMaxTaps) *
                     kConvChannels * sizeof(float));
  const auto threads = static_cast<std::size_t>(lease.pool().size());
  std::byte* const memory = lease.scratch().block(threads * own);
  const std::int64_t channel_blocks = (form_.channels + kConvChannels - 1) / kConvChannels;
  // The state is read before it is written where one block has all tokens.
  const std::int64_t step = arrays.state.data != nullptr ? tokens : kBlock;
  const std::int64_t token_blocks = (tokens + step - 1) / step;
  const std::int64_t blocks = sequences * token_blocks * channel_blocks;
  std::atomic<std::int64_t> next{0};
  lease.pool().run([&](int thread) {
    auto* const floats = reinterpret_cast<float*>(memory + static_cast<std::size_t>(thread) * own);
    const std::int64_t taps = form_.taps;
    const Buffers buffers{floats, floats + (taps - 1 + kTokens) * kConvChannels,
                          floats + (2 * taps - 1 + kTokens) * kConvChannels,
                          floats + (2 * taps + kTokens) * kConvChannels,
                          floats + (2 * taps + 2 * kTokens) * kConvChannels};
    for (;;) {
      const std::int64_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks) return;
      const std::int64_t begin = block / channel_blocks % token_blocks * step;
      run_block(arrays, buffers, block / channel_blocks / token_blocks,
                block % channel_blocks * kConvChannels, begin, std::min(begin + step, tokens));
    }
  });
}

// The inputs of the taps - 1 tokens before `begin`.
void ShortConv::read_history(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
                             std::int64_t first_channel, int channels, std::int64_t begin) const {
  const auto& floats = kernel_.floats;
  const std::int64_t before = form_.taps - 1;
  const std::int64_t held = arrays.state_tokens;
  if (begin < before && arrays.state.data != nullptr) {
    floats(arrays.state.at(sequence, 0, 0, first_channel * held), arrays.state.float32,
           static_cast<int>(channels * held), buffers.rows);
  }
  for (std::int64_t j = 0; j < before; ++j) {
    float* const row = buffers.x + j * kConvChannels;
    const std::int64_t token = begin - before + j;
    if (token >= 0) {
      floats(arrays.x.at(sequence, token, 0, first_channel), arrays.x.float32, channels, row);
    } else if (arrays.state.data != nullptr) {
      for (int c = 0; c < channels; ++c) row[c] = buffers.rows[c * held + held + token];
    }
  }
}

void ShortConv::shift_state(const Arrays& arrays, std::int64_t sequence, std::int64_t first_channel,
                            int channels, std::int64_t tokens) const {
  const std::int64_t held = arrays.state_tokens;
  const std::int64_t kept = std::max<std::int64_t>(held - tokens, 0);
  const auto shift = [&](auto* rows) {
    using Number = std::remove_pointer_t<decltype(rows)>;
    for (std::int64_t j = 0; j < held; ++j) {
      // After the held ones that stay, each channel's row has its last inputs.
      if (j < kept) {
        for (int c = 0; c < channels; ++c) rows[c * held + j] = rows[c * held + held - kept + j];
        continue;
      }
      const auto* const x =
          static_cast<const Number*>(arrays.x.at(sequence, tokens - held + j, 0, first_channel));
      for (int c = 0; c < channels; ++c) rows[c * held + j] = x[c];
    }
  };
  void* const rows = arrays.state.at(sequence, 0, 0, first_channel * held);
  if (arrays.state.float32) {
    shift(static_cast<float*>(rows));
  } else {
    shift(static_cast<std::uint16_t*>(rows));
  }
}

void ShortConv::run_block(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
                          std::int64_t first_channel, std::int64_t begin, std::int64_t end) const {
  const KernelTable& kernels = engine_->kernels();
  const auto& floats = kernel_.floats;
  const int channels =
      static_cast<int>(std::min<std::int64_t>(kConvChannels, form_.channels - first_channel));
  const std::int64_t before = form_.taps - 1;
  // Zeros before the first token, without a bias, and in the channels that fill up the last block.
  const std::int64_t zeros = channels < kConvChannels ? before + kTokens : before;
  std::fill_n(buffers.x, zeros * kConvChannels, 0.0f);
  std::fill_n(buffers.bias, kConvChannels, 0.0f);
  floats(arrays.weight.at(0, 0, 0, first_channel * form_.taps), arrays.weight.float32,
         static_cast<int>(channels * form_.taps), buffers.rows);
  for (std::int64_t j = 0; j < form_.taps; ++j) {
    for (int c = 0; c < channels; ++c) {
      buffers.weight[j * kConvChannels + c] = buffers.rows[c * form_.taps + j];
    }
  }
  if (arrays.bias.data != nullptr) {
    floats(arrays.bias.at(0, 0, 0, first_channel), arrays.bias.float32, channels, buffers.bias);
  }
  read_history(arrays, buffers, sequence, first_channel, channels, begin);
  for (std::int64_t token = begin; token < end; token += kTokens) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTokens, end - token));
    for (int t = 0; t < count; ++t) {
      floats(arrays.x.at(sequence, token + t, 0, first_channel), arrays.x.float32, channels,
             buffers.x + (before + t) * kConvChannels);
    }
    kernel_.short_conv({buffers.x, buffers.weight, buffers.bias, static_cast<int>(form_.taps),
                        count, form_.silu, buffers.out});
    for (int t = 0; t < count; ++t) {
      const float* const from = buffers.out + t * kConvChannels;
      void* const to = arrays.out.at(sequence, token + t, 0, first_channel);
      if (arrays.out.float32) {
        std::copy_n(from, channels, static_cast<float*>(to));
      } else {
        kernels.elementwise->f32_to_bf16(from, channels, static_cast<std::uint16_t*>(to));
      }
    }
    std::memmove(buffers.x, buffers.x + count * kConvChannels,
                 static_cast<std::size_t>(before * kConvChannels) * sizeof(float));
  }
  if (arrays.state.data != nullptr) {
    shift_state(arrays, sequence, first_channel, channels, end - begin);
  }
}

}  // namespace ktrt
