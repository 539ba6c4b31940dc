#include "attention/latent_attention.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/address_range.h"
#include "base/bf16.h"
#include "base/check.h"
#include "engine/weight_args.h"
#include "lora/check_lora.h"

namespace ktrt {

namespace {

constexpr std::int64_t kLineValues = kCacheLine / sizeof(std::uint16_t);

void check_matrix(const TensorView& weight, std::int64_t rows, std::int64_t columns) {
  check_weight(weight);
  weight.expect_shape({rows, columns});
}

void ask_for(const std::uint16_t* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLineValues) __builtin_prefetch(values + i, 0, 2);
}

SpanAttention::Form inner_form(const LatentAttention::Form& form) {
  SpanAttention::Form inner;
  inner.heads = form.heads;
  inner.groups = 1;
  inner.key_size = form.rank;
  inner.second_key_size = form.rope;
  inner.value_size = form.rank;
  inner.scaling = form.scaling;
  return inner;
}

}  // namespace

// A thread's scratch memory: rows of width_ numbers.
struct LatentAttention::Own {
  float* exact;            // of a block of rows, in natural order
  float* packed;           // in the kernels'
  float* sums;             // in the kernels'
  float* scratch;          // for merge
  std::uint16_t* rounded;  // BF16, of a block of rows
};

// Rows of a task that are multiplied together.
struct LatentAttention::RowBlock {
  std::int64_t first;
  int rows;

  // x [rows][x_stride] times W [columns][k] gives out [rows][columns]. The first block reads W from
  // memory, the others from the cache.
  void multiply(const DenseKernel& kernel, const std::uint16_t* x, std::int64_t x_stride,
                const std::uint16_t* w, std::int64_t columns, std::int64_t k, float* out) const {
    DenseDotArgs dot{};
    dot.x = x;
    dot.x_stride = x_stride;
    dot.rows = rows;
    dot.w = w;
    dot.w_stride = k;
    dot.columns = static_cast<int>(columns);
    dot.k = static_cast<int>(k);
    if (first == 0) prefetch_own(dot);
    dot.last = true;
    dot.c = out;
    dot.c_stride = columns;
    kernel.dot(dot);
  }
};

LatentAttention::LatentAttention(std::shared_ptr<Engine> engine, const Form& form,
                                 const TensorView& keys, const TensorView& values)
    : engine_(std::move(engine)), form_(form), spans_(engine_, inner_form(form)) {
  for (const auto& [name, size] : {std::pair{"nope", form.nope}, std::pair{"value", form.value}}) {
    KTRT_CHECK(size >= 1 && size <= SpanAttention::kMaxSize,
               name << " is " << size << ", expected 1 to " << SpanAttention::kMaxSize);
  }
  check_matrix(keys, form.heads * form.rank, form.nope);
  check_matrix(values, form.heads * form.value, form.rank);
  keys_ = static_cast<const std::uint16_t*>(keys.data);
  values_ = static_cast<const std::uint16_t*>(values.data);
  width_ = round_up<std::int64_t>(std::max({form.rank, form.nope, form.value}),
                                  engine_->kernels().attention->width);
}

void LatentAttention::load_lora(int number, const TensorView& a, const TensorView& b) {
  const std::int64_t rows = form_.nope + form_.value;  // of a head in kv_b_proj
  check_lora(a, b, form_.rank, form_.heads * rows, kMaxRank);
  Lora lora;
  lora.rank = a.shape[0];
  const auto buffer = [](std::int64_t values) {
    return AlignedBuffer(static_cast<std::size_t>(values) * sizeof(bf16_t));
  };
  lora.a = buffer(lora.rank * form_.rank);
  lora.b_keys = buffer(form_.heads * lora.rank * form_.nope);
  lora.b_values = buffer(form_.heads * lora.rank * form_.value);
  for (std::int64_t r = 0; r < lora.rank; ++r) {
    const auto* row = reinterpret_cast<const float*>(a.row(r));
    std::transform(row, row + form_.rank, lora.a.as<bf16_t>() + r * form_.rank, f32_to_bf16);
  }
  for (std::int64_t head = 0; head < form_.heads; ++head) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto* row = reinterpret_cast<const float*>(b.row(head * rows + i));
      const bool is_key = i < form_.nope;
      const std::int64_t width = is_key ? form_.nope : form_.value;
      bf16_t* to =
          is_key ? lora.b_keys.as<bf16_t>() + i : lora.b_values.as<bf16_t>() + i - form_.nope;
      for (std::int64_t r = 0; r < lora.rank; ++r) {
        to[(head * lora.rank + r) * width] = f32_to_bf16(row[r]);
      }
    }
  }
  const auto lease = engine_->lease();
  loras_.put(number, std::make_shared<const Lora>(std::move(lora)));
}

void LatentAttention::load_empty_lora(int number) {
  const auto lease = engine_->lease();
  loras_.put(number, std::make_shared<const Lora>());
}

void LatentAttention::unload_lora(int number) {
  const auto lease = engine_->lease();
  loras_.remove(number);
}

void LatentAttention::activate_loras(std::span<const int> numbers, std::span<const float> weights) {
  const auto lease = engine_->lease();
  loras_.activate(numbers, weights);
}

std::size_t LatentAttention::lora_bytes() const {
  const auto lock = engine_->lock();
  return loras_.bytes();
}

void LatentAttention::check(const Arrays& a, std::int64_t rows, std::int64_t tokens,
                            std::int64_t slots) const {
  check_head_array("query", a.query, false, {form_.heads, rows, form_.nope + form_.rope});
  check_head_array("latents", a.latents, false, {1, tokens, form_.rank, slots});
  if (form_.rope > 0) {
    check_head_array("positions", a.positions, false, {1, tokens, form_.rope, slots});
  }
  check_head_array("out", a.out, false, {form_.heads, rows, form_.value});
}

SpanAttention::Row LatentAttention::row_of(const Arrays& a, std::int64_t slot,
                                           std::int64_t length) const {
  SpanAttention::Row row;
  row.keys = row.values = bf16_at(a.latents, 0, 0, slot);
  row.second_keys = bf16_at(a.positions, 0, 0, slot);
  row.end = length;
  return row;
}

LatentAttention::Own LatentAttention::own_of(const Task& task, int thread) const {
  const std::int64_t block = engine_->kernels().dense_bf16->block_rows;
  float* const rows = task.of_caller(thread);
  float* const others = rows + block * width_;
  return {rows, others, others + width_, others + 2 * width_,
          reinterpret_cast<std::uint16_t*>(others + 3 * width_)};
}

// Calls work(RowBlock) for as few blocks of all rows as the dense kernel takes, evenly filled.
template <class Work>
void LatentAttention::for_blocks(std::int64_t rows, const Work& work) const {
  const std::int64_t most = engine_->kernels().dense_bf16->block_rows;
  const std::int64_t blocks = (rows + most - 1) / most;
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t first = rows * i / blocks;
    work(RowBlock{first, static_cast<int>(rows * (i + 1) / blocks - first)});
  }
}

// Prefetches a head's B where all rows have the same LoRA: it is read after U or V.
void LatentAttention::ask_for_lora(std::int64_t head, bool values) const {
  if (chosen_.mixes.size() != 1) return;
  const std::int64_t width = values ? form_.value : form_.nope;
  for (const Loras::Part& part : chosen_.mixes.front()) {
    const AlignedBuffer& b = values ? part.lora->b_values : part.lora->b_keys;
    const std::int64_t count = part.lora->rank * width;
    ask_for(b.as<std::uint16_t>() + head * count, count);
  }
}

bool LatentAttention::adds(const Loras::Mix& mix) {
  return std::ranges::any_of(mix, [](const Loras::Part& part) { return part.lora->rank > 0; });
}

// sums [out] += weight · (x [in] · shrinkᵀ) · expand, x and sums as the kernels pack rows; shrink
// [r][in] and expand [r][out].
void LatentAttention::add_lora(const float* x, std::int64_t in, const std::uint16_t* shrink,
                               const std::uint16_t* expand, std::int64_t out, const Lora& lora,
                               float weight, float* sums) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  constexpr float kCarry = 1.0f;
  float shrunk[kAttentionBlock];
  for (std::int64_t first = 0; first < lora.rank; first += kAttentionBlock) {
    AttentionScoreArgs score{};
    score.q = x;
    score.heads = 1;
    score.keys = shrink + first * in;
    score.key_stride = in;
    score.tokens = static_cast<int>(std::min<std::int64_t>(kAttentionBlock, lora.rank - first));
    score.size = static_cast<int>(in);
    score.scores = shrunk;
    kernel.scores(score);
    if (weight != 1.0f) {
      for (int i = 0; i < score.tokens; ++i) shrunk[i] *= weight;
    }
    AttentionValueArgs value{};
    value.weights = shrunk;
    value.heads = 1;
    value.values = expand + first * out;
    value.value_stride = out;
    value.tokens = score.tokens;
    value.size = static_cast<int>(out);
    value.carry = &kCarry;
    value.sums = sums;
    kernel.values(value);
  }
}

// Packs q U of a head, then the rest of q, for all rows; `query` begins with the task's first.
void LatentAttention::make_queries(const Task& task, const HeadArray& query, std::int64_t head,
                                   int thread) const {
  const KernelTable& kernels = engine_->kernels();
  const AttentionKernel& kernel = *kernels.attention;
  const Own own = own_of(task, thread);
  ask_for_lora(head, false);
  for_blocks(task.row_count(), [&](const RowBlock& block) {
    block.multiply(*kernels.dense_bf16, bf16_at(query, head, block.first), query.token_stride,
                   keys_ + head * form_.rank * form_.nope, form_.rank, form_.nope, own.exact);
    for (int i = 0; i < block.rows; ++i) {
      const std::int64_t row = block.first + i;
      const std::uint16_t* const q = bf16_at(query, head, row);
      float* const to = spans_.query(task, row, head);
      kernel.pack(nullptr, own.exact + i * form_.rank, static_cast<int>(form_.rank), to);
      const Loras::Mix& mix = chosen_.mix(row);
      if (adds(mix)) kernel.pack(q, nullptr, static_cast<int>(form_.nope), own.packed);
      for (const auto& [lora, weight] : mix) {
        add_lora(own.packed, form_.nope,
                 lora->b_keys.as<std::uint16_t>() + head * lora->rank * form_.nope,
                 lora->a.as<std::uint16_t>(), form_.rank, *lora, weight, to);
      }
      kernel.pack(q + form_.nope, nullptr, static_cast<int>(form_.rope), to + spans_.first_width());
    }
  });
}

// Merges a head's spans where the query was, in natural order.
void LatentAttention::merge(const Task& task, std::int64_t row, std::int64_t head,
                            int thread) const {
  float* const to = spans_.query(task, row, head);
  if (task.row(row).empty()) {
    std::fill_n(to, form_.rank, 0.0f);
    return;
  }
  AttentionMergeArgs merge = spans_.merge_args(task, row, head, thread);
  merge.out_f32 = to;
  engine_->kernels().attention->merge(merge);
}

// Multiplies a head's merged sums by V, for all rows; `out` begins with the task's first.
void LatentAttention::make_outputs(const Task& task, const HeadArray& out, std::int64_t head,
                                   int thread) const {
  const KernelTable& kernels = engine_->kernels();
  const Own own = own_of(task, thread);
  ask_for_lora(head, true);
  for (std::int64_t row = task.passes->back().begin; row < task.row_count(); ++row) {
    merge(task, row, head, thread);
  }
  for_blocks(task.row_count(), [&](const RowBlock& block) {
    for (int i = 0; i < block.rows; ++i) {
      kernels.elementwise->f32_to_bf16(spans_.query(task, block.first + i, head),
                                       static_cast<int>(form_.rank), own.rounded + i * form_.rank);
    }
    block.multiply(*kernels.dense_bf16, own.rounded, form_.rank,
                   values_ + head * form_.value * form_.rank, form_.value, form_.rank, own.exact);
    for (int i = 0; i < block.rows; ++i) {
      auto* const to = const_cast<std::uint16_t*>(bf16_at(out, head, block.first + i));
      store(task, block.first + i, head, own.exact + i * form_.value, to, thread);
    }
  });
}

// Rounds a row's product, with its LoRA added.
void LatentAttention::store(const Task& task, std::int64_t row, std::int64_t head,
                            const float* product, std::uint16_t* to, int thread) const {
  const KernelTable& kernels = engine_->kernels();
  const AttentionKernel& kernel = *kernels.attention;
  const auto value = static_cast<int>(form_.value);
  const Loras::Mix& mix = chosen_.mix(row);
  if (!adds(mix) || task.row(row).empty()) {
    kernels.elementwise->f32_to_bf16(product, value, to);
    return;
  }
  const Own own = own_of(task, thread);
  kernel.pack(nullptr, spans_.query(task, row, head), static_cast<int>(form_.rank), own.packed);
  kernel.pack(nullptr, product, value, own.sums);
  for (const auto& [lora, weight] : mix) {
    add_lora(own.packed, form_.rank, lora->a.as<std::uint16_t>(),
             lora->b_values.as<std::uint16_t>() + head * lora->rank * form_.value, form_.value,
             *lora, weight, own.sums);
  }
  // Merging one span whose weights sum up to 1 only restores the natural order.
  const float max = 0.0f;
  const float sum = 1.0f;
  AttentionMergeArgs merge = spans_.merge_args(task, row, head, thread);
  merge.sums = own.sums;
  merge.max = &max;
  merge.sum = &sum;
  merge.parts = 1;
  merge.size = value;
  merge.scratch = own.scratch;
  merge.out_bf16 = to;
  kernel.merge(merge);
}

// rows_ and chosen_, which are `first_row` and on of the arrays.
void LatentAttention::run(const Arrays& arrays, std::int64_t first_row,
                          const Engine::Lease& lease) {
  ThreadPool& pool = lease.pool();
  SpanAttention::Layout layout;
  layout.keys.token = layout.values.token = arrays.latents.token_stride;
  layout.second_keys.token = arrays.positions.token_stride;
  layout.values_are_keys = true;
  // A thread needs a block of rows in floats and in BF16, and three rows more.
  const std::int64_t block = engine_->kernels().dense_bf16->block_rows;
  const Task task = spans_.plan(layout, rows_, lease, (block + 3 + (block + 1) / 2) * width_);
  const auto from_first = [first_row](HeadArray array) {
    array.data = const_cast<std::uint16_t*>(bf16_at(array, 0, first_row));
    return array;
  };
  const HeadArray query = from_first(arrays.query);
  const HeadArray out = from_first(arrays.out);
  std::atomic<std::int64_t> queries{0};
  std::atomic<std::int64_t> outputs{0};
  const auto each_head = [&](std::atomic<std::int64_t>& next, const auto& work) {
    for (;;) {
      const std::int64_t head = next.fetch_add(1, std::memory_order_relaxed);
      if (head >= form_.heads) break;
      work(head);
    }
  };
  const auto attend = [&](int thread, int threads, const auto& barrier) {
    each_head(queries, [&](std::int64_t head) { make_queries(task, query, head, thread); });
    barrier();
    const auto last = static_cast<std::int64_t>(task.passes->size()) - 1;
    for (std::int64_t pass = 0; pass <= last; ++pass) {
      spans_.compute(task, pass, thread);
      barrier();
      if (pass == last) break;
      const SpanAttention::Pass& rows = (*task.passes)[static_cast<std::size_t>(pass)];
      for (std::int64_t head = form_.heads * thread / threads;
           head < form_.heads * (thread + 1) / threads; ++head) {
        for (std::int64_t row = rows.begin; row < rows.end; ++row) merge(task, row, head, thread);
      }
      barrier();
    }
    each_head(outputs, [&](std::int64_t head) { make_outputs(task, out, head, thread); });
  };
  if (spans_.is_small(rows_, form_.heads * form_.rank * (form_.nope + form_.value))) {
    attend(0, 1, [] {});
  } else {
    pool.run([&](int thread) { attend(thread, pool.size(), [&] { pool.barrier(); }); });
  }
}

void LatentAttention::forward(const Arrays& arrays, std::int64_t tokens) {
  KTRT_CHECK(tokens >= 1, "tokens is " << tokens << ", expected at least 1");
  check(arrays, 1, tokens, 1);
  const auto lease = engine_->lease();
  rows_.assign(1, row_of(arrays, 0, tokens));
  loras_.choose({}, 1, chosen_);
  run(arrays, 0, lease);
}

void LatentAttention::forward_rows(const Arrays& arrays, const SlotRows& rows,
                                   const AdapterIds& adapters) {
  check_slot_rows(rows);
  check(arrays, rows.rows, rows.capacity, rows.slot_count);
  check_address_range("adapter_ids", adapters.ids, adapters.count, sizeof(std::int32_t));
  KTRT_CHECK(adapters.ids == nullptr || adapters.count == rows.rows,
             "there are " << adapters.count << " adapter ids for " << rows.rows << " rows");
  const auto lease = engine_->lease();
  for (std::int64_t first = 0; first < rows.rows; first += SpanAttention::kMaxRows) {
    const std::int64_t count = std::min(SpanAttention::kMaxRows, rows.rows - first);
    rows_.clear();
    for (std::int64_t row = first; row < first + count; ++row) {
      const SlotRow found = slot_row(rows, row);
      KTRT_CHECK(rows.window == 0, "window is " << rows.window << ", expected none: 0");
      rows_.push_back(row_of(arrays, found.slot, found.length));
    }
    const AdapterIds ids =
        adapters.ids == nullptr ? AdapterIds{} : AdapterIds{adapters.ids + first, count};
    loras_.choose(ids, count, chosen_);
    run(arrays, first, lease);
  }
}

}  // namespace ktrt
