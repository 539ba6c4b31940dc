#include "attention/span_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"

namespace ktrt {

namespace {

// Their sums of values of 512 numbers, 32 KB, stay in the L1 and L2 caches.
constexpr std::int64_t kHeadsTogether = 16;
// Spans of a group, at most: their sums are then small compared to the keys that they read.
constexpr std::int64_t kMaxSpans = 32;
// Sums of a pass, for each thread: they stay in the L2 caches. 16 rows of 1,000 tokens on one
// thread take 5.86 ms (32 heads of 128 numbers) or 8.20 ms (latents of 512 numbers), 6.06 and 8.70
// ms with 16 MB. A pass costs two barriers.
constexpr std::int64_t kPassBytes = 512 << 10;
// Reading one number of the cache takes about as long as multiplying it for this many heads.
constexpr std::int64_t kHeadsPerRead = 6;
// Below this the caller is done before another thread has woken up.
constexpr std::int64_t kAloneBelow = 128 << 10;
// How far ahead keys are prefetched.
constexpr std::int64_t kAheadBytes = 6144;
constexpr std::int64_t kLineFloats = kCacheLine / sizeof(float);
constexpr std::int64_t kScoreFloats = kHeadsTogether * kAttentionBlock;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

const std::uint16_t* at(const std::uint16_t* data, const SpanAttention::Strides& strides,
                        std::int64_t group, std::int64_t token) {
  return data + group * strides.group + token * strides.token;
}

}  // namespace

// Tokens of a group, for some of its heads.
struct SpanAttention::Block {
  std::int64_t group;
  const float* queries;
  int heads;
  std::int64_t token;
  int tokens;
};

SpanAttention::SpanAttention(std::shared_ptr<Engine> engine, const Form& form)
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
  const std::int64_t width = engine_->kernels().attention->width;
  first_width_ = round_up(form.key_size, width);
  query_width_ = first_width_ + round_up(form.second_key_size, width);
  value_width_ = round_up(form.value_size, width);
  ahead_ = static_cast<int>(
      std::clamp<std::int64_t>(kAheadBytes / (2 * form.key_size), 4, kAttentionBlock));
}

SpanAttention::Task SpanAttention::plan(const Layout& layout, std::vector<Row>& rows,
                                        const Engine::Lease& lease, std::int64_t extra) {
  const std::int64_t sum_bytes = form_.heads * value_width_ * std::int64_t{sizeof(float)};
  const std::int64_t pass_bytes = kPassBytes * lease.pool().size();
  std::int64_t most_sums = 0;
  std::int64_t sums = 0;
  passes_.assign(1, {});
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Row& row = rows[i];
    const std::int64_t tokens = row.empty() ? 0 : row.end - row.first();
    const std::int64_t blocks = (tokens + kAttentionBlock - 1) / kAttentionBlock;
    row.span = (blocks + kMaxSpans - 1) / kMaxSpans * kAttentionBlock;
    row.spans = row.empty() ? 0 : (tokens + row.span - 1) / row.span;
    if (sums > 0 && (sums + row.spans) * sum_bytes > pass_bytes) {
      passes_.push_back({passes_.back().end, passes_.back().end, 0});
      sums = 0;
    }
    Pass& pass = passes_.back();
    row.first_sum = sums;
    sums += row.spans;
    pass.items += form_.groups * row.spans * chunks_;
    row.end_item = pass.items;
    pass.end = static_cast<std::int64_t>(i) + 1;
    most_sums = std::max(most_sums, sums);
  }
  const std::int64_t queries =
      round_up(static_cast<std::int64_t>(rows.size()) * form_.heads * query_width_, kLineFloats);
  const std::int64_t values = round_up(most_sums * form_.heads * value_width_, kLineFloats);
  const std::int64_t stats = round_up(most_sums * form_.heads, kLineFloats);
  const std::int64_t used = round_up(kScoreFloats + kHeadsTogether + value_width_, kLineFloats);
  const std::int64_t own = used + round_up(extra, kLineFloats);
  const auto floats =
      static_cast<std::size_t>(queries + values + 2 * stats + own * lease.pool().size());
  auto* const scratch = reinterpret_cast<float*>(lease.scratch().block(floats * sizeof(float)));
  Task task{layout,  &rows,   &passes_, lease.scratch().counters(passes_.size()),
            scratch, nullptr, nullptr,  nullptr,
            nullptr, own,     used};
  task.sums = task.queries + queries;
  task.max = task.sums + values;
  task.sum = task.max + stats;
  task.own = task.sum + stats;
  return task;
}

bool SpanAttention::is_small(const std::vector<Row>& rows, std::int64_t other_reads) const {
  std::int64_t tokens = 0;
  for (const Row& row : rows) tokens += std::max<std::int64_t>(row.end - row.start, 0);
  const std::int64_t reads = tokens * form_.groups * (form_.key_size + form_.value_size);
  return reads * (kHeadsPerRead + group_heads_) +
             other_reads * (kHeadsPerRead + static_cast<std::int64_t>(rows.size())) <
         kAloneBelow * (kHeadsPerRead + 1);
}

// scores [heads][kAttentionBlock] of a block of tokens.
void SpanAttention::score(const Task& task, const Row& row, const Block& block,
                          float* scores) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const Layout& layout = task.layout;
  AttentionScoreArgs score{};
  score.q = block.queries;
  score.q_stride = query_width_;
  score.heads = block.heads;
  score.keys = at(row.keys, layout.keys, block.group, block.token);
  score.key_stride = layout.keys.token;
  score.tokens = block.tokens;
  score.size = static_cast<int>(form_.key_size);
  score.ahead = ahead_;
  if (!layout.values_are_keys) {
    score.coming = {at(row.values, layout.values, block.group, block.token), layout.values.token,
                    block.tokens, static_cast<int>(form_.value_size)};
  }
  score.scores = scores;
  kernel.scores(score);
  if (form_.second_key_size == 0) return;
  score.q += first_width_;
  score.keys = at(row.second_keys, layout.second_keys, block.group, block.token);
  score.key_stride = layout.second_keys.token;
  score.size = static_cast<int>(form_.second_key_size);
  score.add = true;
  score.coming = {};
  kernel.scores(score);
}

// One span of a row's tokens for some heads of a group; `item` counts heads fastest, which read the
// same.
void SpanAttention::compute_span(const Task& task, std::int64_t index, std::int64_t item,
                                 int thread) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const Row& row = task.row(index);
  const Strides& strides = task.layout.values;
  const std::int64_t chunk = item % chunks_;
  const std::int64_t span = item / chunks_ % row.spans;
  Block block{};
  block.group = item / chunks_ / row.spans;
  const std::int64_t first = group_heads_ * chunk / chunks_;
  block.heads = static_cast<int>(group_heads_ * (chunk + 1) / chunks_ - first);
  const std::int64_t head = block.group * group_heads_ + first;
  block.queries = query(task, index, head);
  const std::int64_t stat = (row.first_sum + span) * form_.heads + head;
  float* scores = task.own + thread * task.own_floats;

  AttentionSoftmaxArgs softmax{scores,          block.heads,     0,
                               form_.scaling,   form_.softcap,   nullptr,
                               task.max + stat, task.sum + stat, scores + kScoreFloats};
  AttentionValueArgs value{};
  value.weights = scores;
  value.heads = block.heads;
  value.size = static_cast<int>(form_.value_size);
  value.value_stride = strides.token;
  value.sums = task.sums + stat * value_width_;
  value.sum_stride = value_width_;
  std::fill_n(softmax.max, block.heads, kNothing);
  std::fill_n(softmax.sum, block.heads, 0.0f);

  const std::int64_t origin = row.first() + span * row.span;
  const std::int64_t begin = std::max(row.start, origin);
  const std::int64_t end = std::min(row.end, origin + row.span);
  std::int64_t next = 0;
  for (std::int64_t token = begin; token < end; token = next) {
    next = (token / kAttentionBlock + 1) * kAttentionBlock;
    block.token = task.layout.place(token);
    block.tokens = static_cast<int>(std::min(end, next) - token);
    score(task, row, block, scores);
    softmax.tokens = value.tokens = block.tokens;
    if (task.layout.mask != nullptr) softmax.mask = task.layout.mask + token;
    kernel.softmax(softmax);
    value.values = at(row.values, strides, block.group, block.token);
    value.carry = token == begin ? nullptr : softmax.carry;
    value.coming = {};
    if (next < row.end) {
      value.coming = {at(row.keys, task.layout.keys, block.group, task.layout.place(next)),
                      task.layout.keys.token,
                      static_cast<int>(std::min<std::int64_t>(row.end - next, ahead_)),
                      static_cast<int>(form_.key_size)};
    }
    kernel.values(value);
  }
}

void SpanAttention::compute(const Task& task, std::int64_t pass, int thread) const {
  const Pass& of = (*task.passes)[static_cast<std::size_t>(pass)];
  std::atomic<int>& next = task.claimed[pass];
  std::int64_t row = of.begin;
  std::int64_t before = 0;  // items of the pass's rows before this one
  for (;;) {
    const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
    if (item >= of.items) break;
    while (item >= task.row(row).end_item) before = task.row(row++).end_item;
    compute_span(task, row, item - before, thread);
  }
}

AttentionMergeArgs SpanAttention::merge_args(const Task& task, std::int64_t index,
                                             std::int64_t head, int thread) const {
  const Row& row = task.row(index);
  const std::int64_t first = row.first_sum * form_.heads + head;
  AttentionMergeArgs merge{};
  merge.sums = task.sums + first * value_width_;
  merge.part_stride = form_.heads * value_width_;
  merge.max = task.max + first;
  merge.sum = task.sum + first;
  merge.stat_stride = form_.heads;
  merge.parts = static_cast<int>(row.spans);
  merge.sink = sinks_[static_cast<std::size_t>(head)];
  merge.size = static_cast<int>(form_.value_size);
  merge.scratch = task.own + thread * task.own_floats;
  return merge;
}

}  // namespace ktrt
