#include "attention/token_attention.h"

#include <algorithm>
#include <utility>

#include "base/address_range.h"
#include "base/check.h"
#include "engine/weight_args.h"
#include "kernels/bf16_arithmetic.h"
#include "kernels/select.h"

namespace ktrt {

namespace {

// Up to here, the caller packs the queries of all rows: a barrier takes longer.
constexpr std::int64_t kPackedAlone = 8192;
// Positions of a prompt, at most: sums of a few of them are numbers.
constexpr std::int64_t kMaxPosition = std::int64_t{1} << 40;

float* float_at(const HeadArray& array, std::int64_t head, std::int64_t token) {
  return static_cast<float*>(array.data) + head * array.head_stride + token * array.token_stride;
}

std::uint16_t* output_at(const HeadArray& array, std::int64_t head, std::int64_t token) {
  return const_cast<std::uint16_t*>(bf16_at(array, head, token));
}

SpanAttention::Strides strides_of(const HeadArray& array) {
  return {array.head_stride, array.token_stride};
}

}  // namespace

TokenAttention::TokenAttention(std::shared_ptr<Engine> engine, const Form& form,
                               const std::optional<TensorView>& sinks)
    : engine_(std::move(engine)),
      spans_(engine_, form),
      prompts_(select_prompt_attention(active_isa(), cpu_features(), active_bf16_arithmetic())) {
  const AlignedBuffer given = copy_floats(sinks, form.heads, form.heads);
  if (!given.empty()) spans_.set_sinks({given.as<float>(), given.as<float>() + form.heads});
}

void TokenAttention::check(const Arrays& a, std::int64_t rows, std::int64_t tokens,
                           std::int64_t slots) const {
  const Form& form = spans_.form();
  check_head_array("query", a.query, true, {form.heads, rows, form.key_size});
  check_head_array("keys", a.keys, false, {form.groups, tokens, form.key_size, slots});
  check_head_array("values", a.values, false, {form.groups, tokens, form.value_size, slots});
  check_head_array("out", a.out, true, {form.heads, rows, form.value_size});
  if (form.second_key_size > 0) {
    check_head_array("second_query", a.second_query, true,
                     {form.heads, rows, form.second_key_size});
    check_head_array("second_keys", a.second_keys, false,
                     {form.groups, tokens, form.second_key_size, slots});
  } else {
    KTRT_CHECK(a.second_query.data == nullptr && a.second_keys.data == nullptr,
               "second_query or second_keys is given, expected none: second_key_size is 0");
  }
  check_address_range("mask", a.mask, a.mask_count, sizeof(float));
  KTRT_CHECK(a.mask == nullptr || a.mask_count >= tokens,
             "mask has " << a.mask_count << " elements, expected " << tokens);
}

SpanAttention::Row TokenAttention::row_of(const Arrays& a, std::int64_t slot, std::int64_t start,
                                          std::int64_t end) const {
  SpanAttention::Row row;
  row.keys = bf16_at(a.keys, 0, 0, slot);
  row.second_keys = bf16_at(a.second_keys, 0, 0, slot);
  row.values = bf16_at(a.values, 0, 0, slot);
  row.start = start;
  row.end = end;
  return row;
}

void TokenAttention::pack(const Task& task, const Arrays& arrays, std::int64_t first_row,
                          std::int64_t row, std::int64_t head) const {
  const Form& form = spans_.form();
  const AttentionKernel& kernel = *engine_->kernels().attention;
  const auto pack = [&](const HeadArray& from, std::int64_t size, float* to) {
    const std::int64_t token = first_row + row;
    if (task.layout.bf16_queries) {
      auto* const bits = reinterpret_cast<std::uint16_t*>(to);
      std::fill(std::copy_n(bf16_at(from, head, token), size, bits),
                bits + round_up<std::int64_t>(size, kernel.width), std::uint16_t{0});
    } else if (from.float32) {
      kernel.pack(nullptr, float_at(from, head, token), static_cast<int>(size), to);
    } else {
      kernel.pack(bf16_at(from, head, token), nullptr, static_cast<int>(size), to);
    }
  };
  float* const to = spans_.query(task, row, head);
  pack(arrays.query, form.key_size, to);
  if (form.second_key_size > 0) {
    pack(arrays.second_query, form.second_key_size, to + spans_.first_width());
  }
}

void TokenAttention::merge(const Task& task, const HeadArray& out, std::int64_t first_row,
                           std::int64_t row, std::int64_t head, int thread) const {
  const std::int64_t token = first_row + row;
  if (task.row(row).empty()) {
    const std::int64_t size = spans_.form().value_size;
    if (out.float32) {
      std::fill_n(float_at(out, head, token), size, 0.0f);
    } else {
      std::fill_n(output_at(out, head, token), size, std::uint16_t{0});
    }
    return;
  }
  AttentionMergeArgs merge = spans_.merge_args(task, row, head, thread);
  if (out.float32) {
    merge.out_f32 = float_at(out, head, token);
  } else {
    merge.out_bf16 = output_at(out, head, token);
  }
  engine_->kernels().attention->merge(merge);
}

// rows_, which are `first_row` and on of the arrays.
void TokenAttention::run(const Arrays& arrays, std::int64_t first_row, std::int64_t ring,
                         const Engine::Lease& lease) {
  ThreadPool& pool = lease.pool();
  const std::int64_t heads = spans_.form().heads;
  const bool bf16_queries = engine_->kernels().attention->bf16_scores != nullptr &&
                            !arrays.query.float32 && !arrays.second_query.float32;
  SpanAttention::Layout layout{strides_of(arrays.keys),
                               strides_of(arrays.second_keys),
                               strides_of(arrays.values),
                               arrays.values.data == arrays.keys.data,
                               ring,
                               arrays.mask,
                               bf16_queries};
  const Task task = spans_.plan(layout, rows_, lease, 0);
  const auto passes = static_cast<std::int64_t>(task.passes->size());
  // A share of the heads of rows [begin, end).
  const auto each = [&](std::int64_t begin, std::int64_t end, int thread, int threads,
                        const auto& work) {
    const std::int64_t count = (end - begin) * heads;
    const std::int64_t last = count * (thread + 1) / threads;
    for (std::int64_t i = count * thread / threads; i < last; ++i) {
      work(begin + i / heads, i % heads);
    }
  };
  const auto pack_rows = [&](int thread, int threads) {
    each(0, task.row_count(), thread, threads,
         [&](std::int64_t row, std::int64_t head) { pack(task, arrays, first_row, row, head); });
  };
  const auto attend = [&](int thread, int threads, const auto& barrier) {
    for (std::int64_t pass = 0; pass < passes; ++pass) {
      const SpanAttention::Pass& rows = (*task.passes)[static_cast<std::size_t>(pass)];
      spans_.compute(task, pass, thread);
      barrier();
      each(rows.begin, rows.end, thread, threads, [&](std::int64_t row, std::int64_t head) {
        merge(task, arrays.out, first_row, row, head, thread);
      });
      if (pass + 1 < passes) barrier();
    }
  };
  if (spans_.is_small(rows_, 0)) {
    pack_rows(0, 1);
    attend(0, 1, [] {});
    return;
  }
  const bool together = task.row_count() * heads * spans_.form().key_size > kPackedAlone;
  if (!together) pack_rows(0, 1);
  pool.run([&](int thread) {
    if (together) {
      pack_rows(thread, pool.size());
      pool.barrier();
    }
    attend(thread, pool.size(), [&] { pool.barrier(); });
  });
}

void TokenAttention::forward(const Arrays& arrays, std::int64_t start, std::int64_t end,
                             std::int64_t ring) {
  KTRT_CHECK(start >= 0 && start < end, "tokens " << start << " to " << end
                                                  << ", expected a start of at least 0 and an end "
                                                  << "above it");
  KTRT_CHECK(ring == 0 || (is_ring(ring) && end - start <= ring && arrays.mask == nullptr),
             "ring is " << ring << ", expected a multiple of " << kAttentionBlock << ", at least "
                        << end - start << " tokens and no mask");
  check(arrays, 1, ring > 0 ? std::min(ring, end) : end, 1);
  const auto lease = engine_->lease();
  rows_.assign(1, row_of(arrays, 0, start, end));
  run(arrays, 0, ring, lease);
}

void TokenAttention::forward_rows(const Arrays& arrays, const SlotRows& rows) {
  check_slot_rows(rows);
  check(arrays, rows.rows, rows.capacity, rows.slot_count);
  const auto lease = engine_->lease();
  for (std::int64_t first = 0; first < rows.rows; first += SpanAttention::kMaxRows) {
    const std::int64_t end = std::min(first + SpanAttention::kMaxRows, rows.rows);
    rows_.clear();
    for (std::int64_t row = first; row < end; ++row) {
      const SlotRow found = slot_row(rows, row);
      rows_.push_back(row_of(arrays, found.slot, found.start, found.length));
    }
    run(arrays, first, rows.window > 0 && is_ring(rows.capacity) ? rows.capacity : 0, lease);
  }
}

void TokenAttention::forward_prompt(const PromptArrays& a, const PromptSpan& span) {
  const Form& form = spans_.form();
  KTRT_CHECK(prompts_ != nullptr,
             "this processor has no kernel for prompts, expected AVX-512 BF16");
  KTRT_CHECK(form.second_key_size == 0,
             "second_key_size is " << form.second_key_size << ", expected 0 for a prompt");
  KTRT_CHECK(span.start >= 0 && span.start <= kMaxPosition && span.tokens >= 1 &&
                 span.tokens <= kMaxPosition,
             "start and tokens are " << span.start << " and " << span.tokens
                                     << ", expected at least 0 and 1, at most " << kMaxPosition);
  KTRT_CHECK(span.window >= 0, "window is " << span.window << ", expected 0 for none, or more");
  KTRT_CHECK(span.first >= 0 && span.first <= span.seen_from(span.start),
             "first is " << span.first << ", expected 0 to " << span.seen_from(span.start));
  const std::int64_t keys = span.start + span.tokens - span.first;
  check_head_array("query", a.query, false, {form.heads, span.tokens, form.key_size});
  check_head_array("keys", a.keys, false, {form.groups, keys, form.key_size});
  check_head_array("values", a.values, false, {form.groups, keys, form.value_size});
  check_head_array("out", a.out, false, {form.heads, span.tokens, form.value_size});
  const auto lease = engine_->lease();
  attend_prompt(form, spans_.sinks(), a, span, lease, *prompts_);
}

}  // namespace ktrt
