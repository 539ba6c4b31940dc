#include "linear_attention/selective_scan.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <utility>

#include "base/check.h"
#include "linear_attention/of_engine.h"

namespace ktrt {

namespace {

// Tokens that pass through the buffers at once.
constexpr int kTokens = 16;

// Between [size][kScanChannels] and a row of `size` numbers for each channel.
void move_rows(float* lanes, float* rows, std::int64_t size, int channels, bool store) {
  for (int c = 0; c < channels; ++c) {
    for (std::int64_t n = 0; n < size; ++n) {
      float& lane = lanes[n * kScanChannels + c];
      float& number = rows[c * size + n];
      store ? void(number = lane) : void(lane = number);
    }
  }
}

}  // namespace

struct SelectiveScan::Buffers {
  float *state, *a, *x, *dt, *out, *b, *c;
};

SelectiveScan::SelectiveScan(std::shared_ptr<Engine> engine, std::int64_t channels,
                             std::int64_t size)
    : engine_(std::move(engine)),
      kernel_(kernel_of(engine_.get())),
      channels_(channels),
      size_(size) {
  KTRT_CHECK(channels >= 1 && channels <= (1 << 24) && size >= 1 && size <= kMaxSize,
             "channels and size are " << channels << " and " << size
                                      << ", expected 1 to 2^24 and 1 to "
                                      << std::int64_t{kMaxSize});
}

void SelectiveScan::check(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) const {
  const TokenShape channels{sequences, tokens, 1, channels_};
  const TokenShape sizes{sequences, tokens, 1, size_};
  check_token_array("x", arrays.x, channels);
  check_token_array("dt", arrays.dt, channels);
  check_token_array("out", arrays.out, channels);
  check_token_array("b", arrays.b, sizes);
  check_token_array("c", arrays.c, sizes);
  check_token_array("a", arrays.a, {1, 1, 1, channels_ * size_});
  KTRT_CHECK(arrays.a.float32, "a is bfloat16, expected float32");
  check_state_array(arrays.state, sequences, channels_ * size_);
}

void SelectiveScan::forward(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) {
  check_counts(sequences, tokens);
  if (sequences == 0 || tokens == 0) return;
  check(arrays, sequences, tokens);
  const auto lease = engine_->lease();
  const std::int64_t floats = (2 * size_ + 3 * kTokens) * kScanChannels + 2 * kTokens * size_;
  const std::size_t own = scratch_stride(static_cast<std::size_t>(floats) * sizeof(float));
  const auto threads = static_cast<std::size_t>(lease.pool().size());
  std::byte* const memory = lease.scratch().block(threads * own);
  const std::int64_t channel_blocks = (channels_ + kScanChannels - 1) / kScanChannels;
  const std::int64_t blocks = sequences * channel_blocks;
  std::atomic<std::int64_t> next{0};
  lease.pool().run([&](int thread) {
    auto* place = reinterpret_cast<float*>(memory + static_cast<std::size_t>(thread) * own);
    const auto take = [&place](std::int64_t count) {
      float* const here = place;
      place += count;
      return here;
    };
    Buffers buffers{};
    for (float** each : {&buffers.state, &buffers.a}) *each = take(size_ * kScanChannels);
    for (float** each : {&buffers.x, &buffers.dt, &buffers.out}) {
      *each = take(std::int64_t{kTokens} * kScanChannels);
    }
    for (float** each : {&buffers.b, &buffers.c}) *each = take(kTokens * size_);
    for (;;) {
      const std::int64_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks) return;
      run_block(arrays, buffers, block / channel_blocks, block % channel_blocks * kScanChannels,
                tokens);
    }
  });
}

void SelectiveScan::run_block(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
                              std::int64_t first, std::int64_t tokens) const {
  const KernelTable& kernels = engine_->kernels();
  const auto& floats = kernel_.floats;
  const int channels = static_cast<int>(std::min<std::int64_t>(kScanChannels, channels_ - first));
  float* const state = arrays.state.at(sequence) + first * size_;
  // Channels that fill up the last block are zeros.
  std::fill_n(buffers.state, (2 * size_ + 2 * kTokens) * kScanChannels, 0.0f);
  move_rows(buffers.state, state, size_, channels, false);
  move_rows(buffers.a, static_cast<float*>(arrays.a.at(0, 0, 0, first * size_)), size_, channels,
            false);
  for (std::int64_t token = 0; token < tokens; token += kTokens) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTokens, tokens - token));
    for (int t = 0; t < count; ++t) {
      const auto read = [&](const TokenArray& array, std::int64_t index, int numbers, float* out) {
        floats(array.at(sequence, token + t, 0, index), array.float32, numbers, out);
      };
      read(arrays.x, first, channels, buffers.x + t * kScanChannels);
      read(arrays.dt, first, channels, buffers.dt + t * kScanChannels);
      read(arrays.b, 0, static_cast<int>(size_), buffers.b + t * size_);
      read(arrays.c, 0, static_cast<int>(size_), buffers.c + t * size_);
    }
    kernel_.selective_scan({buffers.state, buffers.a, static_cast<int>(size_), count, buffers.x,
                            buffers.dt, buffers.b, buffers.c, buffers.out});
    for (int t = 0; t < count; ++t) {
      const float* const from = buffers.out + t * kScanChannels;
      void* const to = arrays.out.at(sequence, token + t, 0, first);
      if (arrays.out.float32) {
        std::copy_n(from, channels, static_cast<float*>(to));
      } else {
        kernels.elementwise->f32_to_bf16(from, channels, static_cast<std::uint16_t*>(to));
      }
    }
  }
  move_rows(buffers.state, state, size_, channels, true);
}

}  // namespace ktrt
