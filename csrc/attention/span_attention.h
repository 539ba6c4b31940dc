// Attention of one query a row, each row over its own sequence: the work that TokenAttention and
// LatentAttention share. BF16 keys and values, float32 sums, on the engine's threads.
//
// The tokens of a group are cut into spans, whose number depends on nothing but how many tokens
// there are and where they begin; threads claim the spans of all rows from one queue. A span goes
// through in blocks of 64 tokens: scores, their exponentials against the largest so far, weighted
// sum of values. A head's spans are then merged in their order. So the bits depend neither on the
// number of threads nor on other rows, and the sums that are written between are small compared to
// the keys that are read. Rows go through in passes, so that their sums stay below a limit.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace ktrt {

class SpanAttention {
 public:
  static constexpr std::int64_t kMaxSize = 4096;
  // Rows of one task, at most: what they need in scratch memory grows with them.
  static constexpr std::int64_t kMaxRows = 64;

  struct Form {
    std::int64_t heads = 0;
    std::int64_t groups = 0;
    std::int64_t key_size = 0;
    std::int64_t second_key_size = 0;  // of keys that lie in two arrays
    std::int64_t value_size = 0;
    float scaling = 1.0f;
    float softcap = 0.0f;  // 0: none
  };

  // Elements between groups and between tokens.
  struct Strides {
    std::int64_t group = 0;
    std::int64_t token = 0;
  };
  // Alike for all rows.
  struct Layout {
    Strides keys, second_keys, values;
    bool values_are_keys = false;
    std::int64_t ring = 0;        // token t lies at t % ring, whole blocks; 0: at t
    const float* mask = nullptr;  // by token; may be null
    // Packed queries are BF16, for the kernel's bf16_scores.
    bool bf16_queries = false;

    std::int64_t place(std::int64_t token) const { return ring > 0 ? token % ring : token; }
  };

  // A row's sequence: tokens [start, end) of what the pointers' group 0, token 0 begins. Without
  // tokens, nothing is computed for the row.
  struct Row {
    const std::uint16_t* keys = nullptr;
    const std::uint16_t* second_keys = nullptr;
    const std::uint16_t* values = nullptr;
    std::int64_t start = 0;
    std::int64_t end = 0;
    // Filled by plan(): tokens of a span, spans of a group, the first span's place among the sums
    // of the pass, the pass's items up to here.
    std::int64_t span = 0;
    std::int64_t spans = 0;
    std::int64_t first_sum = 0;
    std::int64_t end_item = 0;

    bool empty() const { return start >= end; }
    // Blocks and spans begin at multiples of a block's tokens, wherever the row does.
    std::int64_t first() const { return start - start % kAttentionBlock; }
  };

  // Rows [begin, end), whose sums are in scratch memory together.
  struct Pass {
    std::int64_t begin = 0;
    std::int64_t end = 0;
    std::int64_t items = 0;
  };

  // One forward, and its scratch memory. Valid until the next plan().
  struct Task {
    Layout layout;
    std::vector<Row>* rows;
    const std::vector<Pass>* passes;
    std::atomic<int>* claimed;  // [passes]
    float* queries;             // packed [rows][heads][query_width]
    float* sums;                // packed [spans of a pass][heads][value_width]
    float* max;                 // [spans of a pass][heads]
    float* sum;                 // [spans of a pass][heads]
    float* own;                 // [threads][own_floats]
    std::int64_t own_floats;
    std::int64_t used_floats;  // of own_floats, before the caller's

    const Row& row(std::int64_t index) const { return (*rows)[static_cast<std::size_t>(index)]; }
    std::int64_t row_count() const { return static_cast<std::int64_t>(rows->size()); }
    float* of_caller(int thread) const { return own + thread * own_floats + used_floats; }
  };

  // Throws std::invalid_argument.
  SpanAttention(std::shared_ptr<Engine> engine, const Form& form);
  // [heads]: a score without a value for each head.
  void set_sinks(std::vector<float> sinks) { sinks_ = std::move(sinks); }

  const std::vector<float>& sinks() const { return sinks_; }

  const Form& form() const { return form_; }
  // Floats of the first array's part in a packed query.
  std::int64_t first_width() const { return first_width_; }

  // `rows`: 1 to kMaxRows; kept and completed. `extra`: floats per thread for the caller, after the
  // attention's own. Under `lease`, as everything below.
  Task plan(const Layout& layout, std::vector<Row>& rows, const Engine::Lease& lease,
            std::int64_t extra);
  // Whether waking threads takes longer than the attention and `other_reads` more numbers, which
  // are multiplied with each row.
  bool is_small(const std::vector<Row>& rows, std::int64_t other_reads) const;
  // Where a row's packed query goes before compute(); free for the caller after its pass.
  float* query(const Task& task, std::int64_t row, std::int64_t head) const {
    return task.queries + (row * form_.heads + head) * query_width_;
  }
  // Spans of the pass, until none is left: for all threads at once.
  void compute(const Task& task, std::int64_t pass, int thread) const;
  // The arguments that merge a row's spans once its pass is computed, except for where the output
  // goes. The row is not empty.
  AttentionMergeArgs merge_args(const Task& task, std::int64_t row, std::int64_t head,
                                int thread) const;

 private:
  struct Block;
  struct Span;

  Span span_of(const Task& task, const Pass& pass, std::int64_t item, std::int64_t row) const;
  AttentionComing coming(const Strides& strides, const std::uint16_t* data, const Block& block,
                         std::int64_t size) const;
  void score(const Task& task, const Block& block, const Block& next, float* scores) const;
  void compute_span(const Task& task, const Span& span, const Span& next, int thread) const;

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
  std::vector<Pass> passes_;
};

}  // namespace ktrt
