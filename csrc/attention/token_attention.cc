#include "attention/token_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "base/address_range.h"
#include "base/check.h"
#include "engine/weight_args.h"

namespace ktrt {

namespace {

// Their sums of values of 512 numbers, 32 KB, stay in the L1 and L2 caches.
constexpr std::int64_t kHeadsTogether = 16;
// Spans of a group, at most: their sums are then small compared to the keys that they read.
constexpr std::int64_t kMaxSpans = 32;
// Reading one number of the cache takes about as long as multiplying it for this many heads.
constexpr std::int64_t kHeadsPerRead = 6;
// Below this the caller is done before another thread has woken up.
constexpr std::int64_t kAloneBelow = 128 << 10;
// How far ahead keys are prefetched.
constexpr std::int64_t kAheadBytes = 6144;
constexpr std::int64_t kLineFloats = kCacheLine / sizeof(float);
constexpr std::int64_t kScoreFloats = kHeadsTogether * kAttentionBlock;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

}  // namespace

// Tokens of a group, for some of its heads.
struct TokenAttention::Block {
  std::int64_t group;
  std::int64_t head;
  int heads;
  std::int64_t token;
  int tokens;
};

TokenAttention::TokenAttention(std::shared_ptr<Engine> engine, const Form& form,
                               const std::optional<TensorView>& sinks)
    : engine_(std::move(engine)),
      form_(form),
      group_heads_(form.groups > 0 ? form.heads / form.groups : 0),
      chunks_((group_heads_ + kHeadsTogether - 1) / kHeadsTogether) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  const auto expect_size = [](const char* name, std::int64_t size, std::int64_t least) {
    KTRT_CHECK(size >= least && size <= kMaxSize,
               name << " is " << size << ", expected " << least << " to " << kMaxSize);
  };
  expect_size("heads", form.heads, 1);
  expect_size("groups", form.groups, 1);
  expect_size("key_size", form.key_size, 1);
  expect_size("second_key_size", form.second_key_size, 0);
  expect_size("value_size", form.value_size, 1);
  KTRT_CHECK(form.heads % form.groups == 0,
             "heads is " << form.heads << ", expected a multiple of " << form.groups << " groups");
  KTRT_CHECK(std::isfinite(form.scaling), "scaling is " << form.scaling << ", expected a number");
  KTRT_CHECK(std::isfinite(form.softcap) && form.softcap >= 0.0f,
             "softcap is " << form.softcap << ", expected a number, 0 for none");
  sinks_.assign(static_cast<std::size_t>(form.heads), kNothing);
  const AlignedBuffer given = copy_floats(sinks, form.heads, form.heads);
  if (!given.empty()) sinks_.assign(given.as<float>(), given.as<float>() + form.heads);
  const std::int64_t width = engine_->kernels().attention->width;
  first_width_ = round_up(form.key_size, width);
  query_width_ = first_width_ + round_up(form.second_key_size, width);
  value_width_ = round_up(form.value_size, width);
  ahead_ = static_cast<int>(
      std::clamp<std::int64_t>(kAheadBytes / (2 * form.key_size), 4, kAttentionBlock));
}

void TokenAttention::check(const Arrays& a, std::int64_t start, std::int64_t end) const {
  KTRT_CHECK(start >= 0 && start < end, "tokens " << start << " to " << end
                                                  << ", expected a start of at least 0 and an end "
                                                  << "above it");
  check_head_array("query", a.query, true, form_.heads, 1, form_.key_size);
  check_head_array("keys", a.keys, false, form_.groups, end, form_.key_size);
  check_head_array("values", a.values, false, form_.groups, end, form_.value_size);
  check_head_array("out", a.out, true, form_.heads, 1, form_.value_size);
  if (form_.second_key_size > 0) {
    check_head_array("second_query", a.second_query, true, form_.heads, 1, form_.second_key_size);
    check_head_array("second_keys", a.second_keys, false, form_.groups, end, form_.second_key_size);
  } else {
    KTRT_CHECK(a.second_query.data == nullptr && a.second_keys.data == nullptr,
               "second_query or second_keys is given, expected none: second_key_size is 0");
  }
  check_address_range("mask", a.mask, a.mask_count, sizeof(float));
  KTRT_CHECK(a.mask == nullptr || a.mask_count >= end,
             "mask has " << a.mask_count << " elements, expected " << end);
}

// `extra`: floats per thread for the caller, after the attention's own.
TokenAttention::Task TokenAttention::make_task(const Arrays& arrays, std::int64_t start,
                                               std::int64_t end, const Engine::Lease& lease,
                                               std::int64_t extra) const {
  const std::int64_t blocks = (end - start + kAttentionBlock - 1) / kAttentionBlock;
  const std::int64_t span = (blocks + kMaxSpans - 1) / kMaxSpans * kAttentionBlock;
  const std::int64_t spans = (end - start + span - 1) / span;
  const std::int64_t queries = form_.heads * query_width_;
  const std::int64_t sums = spans * form_.heads * value_width_;
  const std::int64_t stats = round_up(spans * form_.heads, kLineFloats);
  const std::int64_t used = round_up(kScoreFloats + kHeadsTogether + value_width_, kLineFloats);
  const std::int64_t own = used + round_up(extra, kLineFloats);
  const auto floats =
      static_cast<std::size_t>(round_up(queries, kLineFloats) + round_up(sums, kLineFloats) +
                               2 * stats + own * lease.pool().size());
  auto* const scratch = reinterpret_cast<float*>(lease.scratch().block(floats * sizeof(float)));
  Task task{arrays,  start,   end,     span,    spans, scratch,
            nullptr, nullptr, nullptr, nullptr, own,   used};
  task.sums = task.queries + round_up(queries, kLineFloats);
  task.max = task.sums + round_up(sums, kLineFloats);
  task.sum = task.max + stats;
  task.own = task.sum + stats;
  return task;
}

void TokenAttention::pack_queries(const Task& task) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const auto pack = [&](const HeadArray& from, std::int64_t head, std::int64_t size, float* to) {
    if (from.float32) {
      const float* row = static_cast<const float*>(from.data) + head * from.head_stride;
      kernel.pack(nullptr, row, static_cast<int>(size), to);
    } else {
      kernel.pack(bf16_at(from, head, 0), nullptr, static_cast<int>(size), to);
    }
  };
  for (std::int64_t head = 0; head < form_.heads; ++head) {
    float* to = task.queries + head * query_width_;
    pack(task.arrays.query, head, form_.key_size, to);
    if (form_.second_key_size > 0) {
      pack(task.arrays.second_query, head, form_.second_key_size, to + first_width_);
    }
  }
}

// scores [heads][kAttentionBlock] of a block of tokens for heads of a group, from `head` on.
void TokenAttention::score(const Task& task, const Block& block, float* scores) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const Arrays& a = task.arrays;
  AttentionScoreArgs score{};
  score.q = task.queries + block.head * query_width_;
  score.q_stride = query_width_;
  score.heads = block.heads;
  score.keys = bf16_at(a.keys, block.group, block.token);
  score.key_stride = a.keys.token_stride;
  score.tokens = block.tokens;
  score.size = static_cast<int>(form_.key_size);
  score.ahead = ahead_;
  if (a.values.data != a.keys.data) {
    score.coming = {bf16_at(a.values, block.group, block.token), a.values.token_stride,
                    block.tokens, static_cast<int>(form_.value_size)};
  }
  score.scores = scores;
  kernel.scores(score);
  if (form_.second_key_size == 0) return;
  score.q += first_width_;
  score.keys = bf16_at(a.second_keys, block.group, block.token);
  score.key_stride = a.second_keys.token_stride;
  score.size = static_cast<int>(form_.second_key_size);
  score.add = true;
  score.coming = {};
  kernel.scores(score);
}

// One span of tokens for some heads of a group; `item` counts heads fastest, which read the same.
void TokenAttention::compute(const Task& task, std::int64_t item, int thread) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const Arrays& a = task.arrays;
  const std::int64_t chunk = item % chunks_;
  const std::int64_t span = item / chunks_ % task.spans;
  Block block{};
  block.group = item / chunks_ / task.spans;
  const std::int64_t first = group_heads_ * chunk / chunks_;
  block.heads = static_cast<int>(group_heads_ * (chunk + 1) / chunks_ - first);
  block.head = block.group * group_heads_ + first;
  const std::int64_t stat = span * form_.heads + block.head;
  float* scores = task.own + thread * task.own_floats;

  AttentionSoftmaxArgs softmax{scores,          block.heads,     0,
                               form_.scaling,   form_.softcap,   nullptr,
                               task.max + stat, task.sum + stat, scores + kScoreFloats};
  AttentionValueArgs value{};
  value.weights = scores;
  value.heads = block.heads;
  value.size = static_cast<int>(form_.value_size);
  value.value_stride = a.values.token_stride;
  value.sums = task.sums + stat * value_width_;
  value.sum_stride = value_width_;
  std::fill_n(softmax.max, block.heads, kNothing);
  std::fill_n(softmax.sum, block.heads, 0.0f);

  const std::int64_t begin = task.start + span * task.span;
  const std::int64_t end = std::min(task.end, begin + task.span);
  for (std::int64_t token = begin; token < end; token += kAttentionBlock) {
    block.token = token;
    block.tokens = static_cast<int>(std::min<std::int64_t>(end - token, kAttentionBlock));
    score(task, block, scores);
    softmax.tokens = value.tokens = block.tokens;
    if (a.mask != nullptr) softmax.mask = a.mask + token;
    kernel.softmax(softmax);
    value.values = bf16_at(a.values, block.group, token);
    value.carry = token == begin ? nullptr : softmax.carry;
    const std::int64_t next = token + kAttentionBlock;
    value.coming = {};
    if (next < task.end) {
      value.coming = {bf16_at(a.keys, block.group, next), a.keys.token_stride,
                      static_cast<int>(std::min<std::int64_t>(task.end - next, ahead_)),
                      static_cast<int>(form_.key_size)};
    }
    kernel.values(value);
  }
}

void TokenAttention::compute_items(const Task& task, std::atomic<std::int64_t>& next,
                                   int thread) const {
  const std::int64_t items = form_.groups * task.spans * chunks_;
  for (;;) {
    const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
    if (item >= items) break;
    compute(task, item, thread);
  }
}

// Everything but where the output goes.
AttentionMergeArgs TokenAttention::merge_args(const Task& task, std::int64_t head,
                                              int thread) const {
  AttentionMergeArgs merge{};
  merge.sums = task.sums + head * value_width_;
  merge.part_stride = form_.heads * value_width_;
  merge.max = task.max + head;
  merge.sum = task.sum + head;
  merge.stat_stride = form_.heads;
  merge.parts = static_cast<int>(task.spans);
  merge.sink = sinks_[static_cast<std::size_t>(head)];
  merge.size = static_cast<int>(form_.value_size);
  merge.scratch = task.own + thread * task.own_floats;
  return merge;
}

void TokenAttention::merge(const Task& task, std::int64_t head, int thread) const {
  AttentionMergeArgs merge = merge_args(task, head, thread);
  const HeadArray& out = task.arrays.out;
  if (out.float32) {
    merge.out_f32 = static_cast<float*>(out.data) + head * out.head_stride;
  } else {
    merge.out_bf16 = static_cast<std::uint16_t*>(out.data) + head * out.head_stride;
  }
  engine_->kernels().attention->merge(merge);
}

// Whether waking threads takes longer than the attention and `other_reads` more numbers.
bool TokenAttention::is_small(std::int64_t tokens, std::int64_t other_reads) const {
  const std::int64_t reads = tokens * form_.groups * (form_.key_size + form_.value_size);
  return reads * (kHeadsPerRead + group_heads_) + other_reads * (kHeadsPerRead + 1) <
         kAloneBelow * (kHeadsPerRead + 1);
}

void TokenAttention::forward(const Arrays& arrays, std::int64_t start, std::int64_t end) {
  check(arrays, start, end);
  const auto lease = engine_->lease();
  ThreadPool& pool = lease.pool();
  const Task task = make_task(arrays, start, end, lease, 0);
  pack_queries(task);
  std::atomic<std::int64_t> next{0};
  if (is_small(end - start, 0)) {
    compute_items(task, next, 0);
    for (std::int64_t head = 0; head < form_.heads; ++head) merge(task, head, 0);
    return;
  }
  pool.run([&](int thread) {
    compute_items(task, next, thread);
    pool.barrier();
    const std::int64_t last = form_.heads * (thread + 1) / pool.size();
    for (std::int64_t head = form_.heads * thread / pool.size(); head < last; ++head) {
      merge(task, head, thread);
    }
  });
}

}  // namespace ktrt
