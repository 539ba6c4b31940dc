#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "linear_attention/of_engine.h"

namespace ktrt {

namespace {

// Tokens whose queries, keys and decays are prepared at once: 24 KB with 128 numbers each.
constexpr int kTokens = 16;

}  // namespace

// A thread's memory: a block of the state, then what kTokens tokens need.
struct LinearAttention::Buffers {
  float *state, *query, *key, *decay, *beta, *value, *out;
};

LinearAttention::LinearAttention(std::shared_ptr<Engine> engine, const Form& form)
    : engine_(std::move(engine)),
      kernel_(kernel_of(engine_.get())),
      form_(form),
      rows_((form.key_size + kStateRows - 1) / kStateRows * kStateRows),
      column_blocks_((form.value_size + kStateColumns - 1) / kStateColumns) {
  const auto fits = [](std::int64_t size) { return size >= 1 && size <= kMaxSize; };
  KTRT_CHECK(fits(form.key_size) && fits(form.value_size),
             "key_size and value_size are " << form.key_size << " and " << form.value_size
                                            << ", expected 1 to " << std::int64_t{kMaxSize});
  KTRT_CHECK(form.key_heads >= 1 && form.heads >= 1 && form.heads <= (1 << 20) &&
                 form.heads % form.key_heads == 0,
             "heads is " << form.heads << ", expected a multiple of key_heads (" << form.key_heads
                         << "), at most 2^20");
  KTRT_CHECK(std::isfinite(form.scaling), "scaling is " << form.scaling << ", expected a number");
}

LinearAttention::Buffers LinearAttention::buffers_in(std::byte* memory) const {
  auto* next = reinterpret_cast<float*>(memory);
  const auto take = [&next](std::int64_t count) {
    float* const here = next;
    next += (count + 15) / 16 * 16;  // the next one is aligned too
    return here;
  };
  Buffers b{};
  b.state = take(rows_ * kStateColumns);
  for (float** each : {&b.query, &b.key, &b.decay}) *each = take(kTokens * rows_);
  b.beta = take(kTokens);
  b.value = take(kTokens * kStateColumns);
  b.out = take(kTokens * kStateColumns);
  return b;
}

void LinearAttention::check(const Arrays& arrays, std::int64_t sequences,
                            std::int64_t tokens) const {
  const TokenShape keys{sequences, tokens, form_.key_heads, form_.key_size};
  const TokenShape values{sequences, tokens, form_.heads, form_.value_size};
  check_token_array("query", arrays.query, keys);
  check_token_array("key", arrays.key, keys);
  check_token_array("value", arrays.value, values);
  check_token_array("out", arrays.out, values);
  const std::int64_t decays = form_.decay_per_key ? form_.key_size : 1;
  check_token_array("decay", arrays.decay, {sequences, tokens, form_.heads, decays});
  if (arrays.beta.data != nullptr) {
    check_token_array("beta", arrays.beta, {sequences, tokens, form_.heads, 1});
  }
  check_state_array(arrays.state, sequences, form_.heads * form_.key_size * form_.value_size);
}

void LinearAttention::forward(const Arrays& arrays, std::int64_t sequences, std::int64_t tokens) {
  check_counts(sequences, tokens);
  if (sequences == 0 || tokens == 0) return;
  check(arrays, sequences, tokens);
  const auto lease = engine_->lease();
  const std::int64_t floats =
      (rows_ + 2 * kTokens) * kStateColumns + 3 * kTokens * rows_ + kTokens + 7 * 16;
  const std::size_t own = scratch_stride(static_cast<std::size_t>(floats) * sizeof(float));
  const auto threads = static_cast<std::size_t>(lease.pool().size());
  std::byte* const memory = lease.scratch().block(threads * own);
  std::atomic<std::int64_t> next{0};
  const std::int64_t blocks = sequences * form_.heads * column_blocks_;
  lease.pool().run([&](int thread) {
    const Buffers buffers = buffers_in(memory + static_cast<std::size_t>(thread) * own);
    for (;;) {
      const std::int64_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks) return;
      run_block(arrays, buffers, block, tokens);
    }
  });
}

// Between a block of the state, whose rows and columns are filled up with zeros, and its place in
// the array: `state` is the block's first number there.
void LinearAttention::move_state(float* held, float* state, std::int64_t columns,
                                 bool store) const {
  constexpr std::int64_t kWidth = kStateColumns;
  const std::int64_t keys = form_.key_size;
  if (!store && (columns < kWidth || keys < rows_)) std::fill_n(held, rows_ * kWidth, 0.0f);
  if (form_.transposed_state) {
    for (std::int64_t c = 0; c < columns; ++c, state += keys) {
      if (store) {
        for (std::int64_t r = 0; r < keys; ++r) state[r] = held[r * kWidth + c];
      } else {
        for (std::int64_t r = 0; r < keys; ++r) held[r * kWidth + c] = state[r];
      }
    }
    return;
  }
  for (std::int64_t r = 0; r < keys; ++r, held += kWidth, state += form_.value_size) {
    float* const to = store ? state : held;
    const float* const from = store ? held : state;
    if (columns == kWidth) {
      std::memcpy(to, from, kWidth * sizeof(float));  // a constant: no call
    } else {
      std::copy_n(from, columns, to);
    }
  }
}

void LinearAttention::prepare(const Arrays& arrays, const Buffers& buffers, std::int64_t sequence,
                              std::int64_t head, std::int64_t token, int count) const {
  const std::int64_t key_head = head / (form_.heads / form_.key_heads);
  const int size = static_cast<int>(form_.key_size);
  for (int t = 0; t < count; ++t) {
    float* const query = buffers.query + t * rows_;
    float* const key = buffers.key + t * rows_;
    float* const decay = buffers.decay + t * rows_;
    const auto read = [&](const TokenArray& array, std::int64_t from_head, int numbers,
                          float* out) {
      kernel_.floats(array.at(sequence, token + t, from_head), array.float32, numbers, out);
    };
    for (float* each : {query, key, decay}) std::fill(each + size, each + rows_, 0.0f);
    read(arrays.query, key_head, size, query);
    read(arrays.key, key_head, size, key);
    if (form_.unit_keys) {
      kernel_.unit_vector(query, size, form_.scaling);
      kernel_.unit_vector(key, size, 1.0f);
    } else if (form_.scaling != 1.0f) {
      for (int i = 0; i < size; ++i) query[i] *= form_.scaling;
    }
    if (form_.decay_per_key) {
      read(arrays.decay, head, size, decay);
      kernel_.exponentials(decay, size);
    } else {
      read(arrays.decay, head, 1, decay);
      kernel_.exponentials(decay, 1);
      std::fill_n(decay, size, float{decay[0]});
    }
    buffers.beta[t] = 1.0f;
    if (arrays.beta.data != nullptr) read(arrays.beta, head, 1, buffers.beta + t);
  }
}

void LinearAttention::run_block(const Arrays& arrays, const Buffers& buffers, std::int64_t block,
                                std::int64_t tokens) const {
  const KernelTable& kernels = engine_->kernels();
  const std::int64_t first = block % column_blocks_ * kStateColumns;
  const std::int64_t head = block / column_blocks_ % form_.heads;
  const std::int64_t sequence = block / column_blocks_ / form_.heads;
  const int columns =
      static_cast<int>(std::min<std::int64_t>(kStateColumns, form_.value_size - first));
  float* const state = arrays.state.at(sequence) + head * form_.key_size * form_.value_size +
                       first * (form_.transposed_state ? form_.key_size : 1);
  move_state(buffers.state, state, columns, false);
  if (columns < kStateColumns) std::fill_n(buffers.value, kTokens * kStateColumns, 0.0f);
  for (std::int64_t token = 0; token < tokens; token += kTokens) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTokens, tokens - token));
    prepare(arrays, buffers, sequence, head, token, count);
    for (int t = 0; t < count; ++t) {
      kernel_.floats(arrays.value.at(sequence, token + t, head, first), arrays.value.float32,
                     columns, buffers.value + t * kStateColumns);
    }
    kernel_.state_steps({buffers.state, static_cast<int>(rows_), count, form_.subtracts,
                         buffers.query, buffers.key, buffers.decay, buffers.beta, buffers.value,
                         buffers.out});
    for (int t = 0; t < count; ++t) {
      const float* const from = buffers.out + t * kStateColumns;
      void* const to = arrays.out.at(sequence, token + t, head, first);
      if (arrays.out.float32) {
        std::copy_n(from, columns, static_cast<float*>(to));
      } else {
        kernels.elementwise->f32_to_bf16(from, columns, static_cast<std::uint16_t*>(to));
      }
    }
  }
  move_state(buffers.state, state, columns, true);
}

}  // namespace ktrt
