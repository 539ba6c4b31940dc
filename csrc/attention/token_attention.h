// Attention of one token over a cache of keys and values, BF16 with float32 sums, on the engine's
// threads.
//
// The tokens of a group are cut into spans, whose number depends on nothing but how many tokens
// there are; threads claim spans. A span goes through in blocks of 64 tokens: scores, their
// exponentials against the largest so far, weighted sum of values. A head's spans are then merged
// in their order. So the bits do not depend on the number of threads, and the sums that are written
// between is small compared to the keys that are read.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "attention/head_array.h"
#include "base/tensor_view.h"
#include "engine/engine.h"

namespace ktrt {

class TokenAttention {
 public:
  static constexpr std::int64_t kMaxSize = 4096;

  struct Form {
    std::int64_t heads = 0;
    std::int64_t groups = 0;
    std::int64_t key_size = 0;
    std::int64_t second_key_size = 0;  // of keys that lie in two arrays
    std::int64_t value_size = 0;
    float scaling = 1.0f;
    float softcap = 0.0f;  // 0: none
  };

  struct Arrays {
    HeadArray query;              // [heads, 1, key_size]
    HeadArray second_query;       // [heads, 1, second_key_size]
    HeadArray keys;               // [groups, tokens, key_size]
    HeadArray second_keys;        // [groups, tokens, second_key_size]
    HeadArray values;             // [groups, tokens, value_size]
    HeadArray out;                // [heads, 1, value_size]
    const float* mask = nullptr;  // [mask_count]
    std::int64_t mask_count = 0;
  };

  // sinks: [heads] in any float dtype, copied. Throws std::invalid_argument.
  TokenAttention(std::shared_ptr<Engine> engine, const Form& form,
                 const std::optional<TensorView>& sinks);

  const Form& form() const { return form_; }
  const char* kernel_name() const { return engine_->kernels().attention->name; }

  // Over tokens [start, end). Throws std::invalid_argument naming an array that is too small;
  // std::runtime_error once the engine is closed.
  void forward(const Arrays& arrays, std::int64_t start, std::int64_t end);

 private:
  friend class LatentAttention;
  struct Block;

  // One forward, and its scratch memory.
  struct Task {
    const Arrays& arrays;
    std::int64_t start;
    std::int64_t end;
    std::int64_t span;   // tokens
    std::int64_t spans;  // of a group
    float* queries;      // packed [heads][query_width_]
    float* sums;         // packed [spans][heads][value_width_]
    float* max;          // [spans][heads]
    float* sum;          // [spans][heads]
    float* own;          // [threads][own_floats]
    std::int64_t own_floats;
    std::int64_t used_floats;  // of own_floats, before the caller's

    float* of_caller(int thread) const { return own + thread * own_floats + used_floats; }
  };

  void check(const Arrays& arrays, std::int64_t start, std::int64_t end) const;
  Task make_task(const Arrays& arrays, std::int64_t start, std::int64_t end,
                 const Engine::Lease& lease, std::int64_t extra) const;
  bool is_small(std::int64_t tokens, std::int64_t other_reads) const;
  void pack_queries(const Task& task) const;
  void score(const Task& task, const Block& block, float* scores) const;
  void compute(const Task& task, std::int64_t item, int thread) const;
  void compute_items(const Task& task, std::atomic<std::int64_t>& next, int thread) const;
  AttentionMergeArgs merge_args(const Task& task, std::int64_t head, int thread) const;
  void merge(const Task& task, std::int64_t head, int thread) const;

  const std::shared_ptr<Engine> engine_;
  const Form form_;
  const std::int64_t group_heads_;
  // Heads of a group that are computed together.
  const std::int64_t chunks_;
  std::vector<float> sinks_;  // [heads]
  // Floats of packed rows.
  std::int64_t first_width_ = 0;
  std::int64_t query_width_ = 0;
  std::int64_t value_width_ = 0;
  int ahead_ = 0;  // tokens whose keys are prefetched
};

}  // namespace ktrt
