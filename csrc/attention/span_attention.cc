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
constexpr std::int64_t kLineFloats = kCacheLine / sizeof(float);
constexpr std::int64_t kScoreFloats = kHeadsTogether * kAttentionBlock;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

const std::uint16_t* at(const std::uint16_t* data, const SpanAttention::Strides& strides,
                        std::int64_t group, std::int64_t token) {
  return data + group * strides.group + token * strides.token;
}

}  // namespace

// Tokens of a group; none: there is no such block.
struct SpanAttention::Block {
  const Row* row = nullptr;
  std::int64_t group = 0;
  std::int64_t token = 0;
  std::int64_t place = 0;
  int tokens = 0;
  const float* queries = nullptr;  // of some of the group's heads
  int heads = 0;

  void go_to(const Layout& layout, std::int64_t to, std::int64_t end) {
    token = to;
    const std::int64_t next = (token / kAttentionBlock + 1) * kAttentionBlock;
    tokens = static_cast<int>(std::clamp<std::int64_t>(end - token, 0, next - token));
    place = layout.place(token);
  }
};

// A claimed item: some heads' share of a row's tokens.
struct SpanAttention::Span {
  Block block;  // the first
  std::int64_t end = 0;
  std::int64_t head = 0;
  std::int64_t sums = 0;       // its place among the pass's
  std::int64_t row_index = 0;  // of the claimed item, the first one to look at for the next
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

AttentionComing SpanAttention::coming(const Strides& strides, const std::uint16_t* data,
                                      const Block& block, std::int64_t size) const {
  if (block.tokens == 0) return {};
  return {at(data, strides, block.group, block.place), strides.token, block.tokens,
          static_cast<int>(size)};
}

// scores [heads][kAttentionBlock] of a block; the next one's keys are prefetched meanwhile.
void SpanAttention::score(const Task& task, const Block& block, const Block& next,
                          float* scores) const {
  const Layout& layout = task.layout;
  AttentionScoreArgs score{};
  const auto set_query = [&](const float* packed) {
    score.q = packed;
    score.q_bf16 = reinterpret_cast<const std::uint16_t*>(packed);
  };
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const auto scores_of = layout.bf16_queries ? kernel.bf16_scores : kernel.scores;
  set_query(block.queries);
  score.q_stride = layout.bf16_queries ? 2 * query_width_ : query_width_;
  score.heads = block.heads;
  score.keys = at(block.row->keys, layout.keys, block.group, block.place);
  score.key_stride = layout.keys.token;
  score.tokens = block.tokens;
  score.size = static_cast<int>(form_.key_size);
  if (next.tokens > 0) score.coming = coming(layout.keys, next.row->keys, next, form_.key_size);
  score.scores = scores;
  scores_of(score);
  if (form_.second_key_size == 0) return;
  set_query(block.queries + first_width_);
  score.keys = at(block.row->second_keys, layout.second_keys, block.group, block.place);
  score.key_stride = layout.second_keys.token;
  score.size = static_cast<int>(form_.second_key_size);
  score.add = true;
  score.coming = {};
  if (next.tokens > 0) {
    score.coming = coming(layout.second_keys, next.row->second_keys, next, form_.second_key_size);
  }
  scores_of(score);
}

// An item of a pass, at row `row` or later; one without tokens after the last. It counts heads
// fastest, which read the same.
SpanAttention::Span SpanAttention::span_of(const Task& task, const Pass& pass, std::int64_t item,
                                           std::int64_t index) const {
  Span found;
  if (item >= pass.items) return found;
  while (item >= task.row(index).end_item) ++index;
  if (index > pass.begin) item -= task.row(index - 1).end_item;
  const Row& row = task.row(index);
  const std::int64_t chunk = item % chunks_;
  const std::int64_t span = item / chunks_ % row.spans;
  Block& block = found.block;
  block.row = &row;
  block.group = item / chunks_ / row.spans;
  const std::int64_t first = group_heads_ * chunk / chunks_;
  block.heads = static_cast<int>(group_heads_ * (chunk + 1) / chunks_ - first);
  found.head = block.group * group_heads_ + first;
  block.queries = query(task, index, found.head);
  found.sums = row.first_sum + span;
  found.row_index = index;
  const std::int64_t origin = row.first() + span * row.span;
  found.end = std::min(row.end, origin + row.span);
  block.go_to(task.layout, std::max(row.start, origin), found.end);
  return found;
}

// `next`: what the thread computes after it.
void SpanAttention::compute_span(const Task& task, const Span& span, const Span& next,
                                 int thread) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const Layout& layout = task.layout;
  const int heads = span.block.heads;
  const std::int64_t stat = span.sums * form_.heads + span.head;
  float* scores = task.own + thread * task.own_floats;

  AttentionSoftmaxArgs softmax{scores,          heads,           0,
                               form_.scaling,   form_.softcap,   nullptr,
                               task.max + stat, task.sum + stat, scores + kScoreFloats};
  AttentionValueArgs value{};
  value.weights = scores;
  value.heads = heads;
  value.size = static_cast<int>(form_.value_size);
  value.value_stride = layout.values.token;
  value.sums = task.sums + stat * value_width_;
  value.sum_stride = value_width_;
  std::fill_n(softmax.max, heads, kNothing);
  std::fill_n(softmax.sum, heads, 0.0f);

  Block block = span.block;
  for (bool last = false; !last;) {
    Block after = block;
    after.go_to(layout, block.token + block.tokens, span.end);
    last = after.tokens == 0;
    if (last) after = next.block;
    score(task, block, after, scores);
    softmax.tokens = value.tokens = block.tokens;
    if (layout.mask != nullptr) softmax.mask = layout.mask + block.token;
    kernel.softmax(softmax);
    value.values = at(block.row->values, layout.values, block.group, block.place);
    value.carry = block.token == span.block.token ? nullptr : softmax.carry;
    value.coming = {};
    if (!layout.values_are_keys && after.tokens > 0) {
      value.coming = coming(layout.values, after.row->values, after, form_.value_size);
    }
    kernel.values(value);
    block = after;
  }
}

void SpanAttention::compute(const Task& task, std::int64_t pass, int thread) const {
  const Pass& of = (*task.passes)[static_cast<std::size_t>(pass)];
  std::atomic<int>& claimed = task.claimed[pass];
  const auto claim = [&](std::int64_t row) {
    return span_of(task, of, claimed.fetch_add(1, std::memory_order_relaxed), row);
  };
  // One item ahead, so that its first keys are prefetched too.
  Span span = claim(of.begin);
  while (span.block.tokens > 0) {
    const Span next = claim(span.row_index);
    compute_span(task, span, next, thread);
    span = next;
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
