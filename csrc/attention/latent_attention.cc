#include "attention/latent_attention.h"

#include <algorithm>
#include <atomic>
#include <utility>

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

TokenAttention::Form inner_form(const LatentAttention::Form& form) {
  TokenAttention::Form inner;
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
  float* exact;            // in natural order
  float* packed;           // in the kernels'
  float* sums;             // in the kernels'
  float* scratch;          // for merge
  std::uint16_t* rounded;  // BF16
};

LatentAttention::LatentAttention(std::shared_ptr<Engine> engine, const Form& form,
                                 const TensorView& keys, const TensorView& values)
    : engine_(std::move(engine)), form_(form), attention_(engine_, inner_form(form), std::nullopt) {
  for (const auto& [name, size] : {std::pair{"nope", form.nope}, std::pair{"value", form.value}}) {
    KTRT_CHECK(size >= 1 && size <= TokenAttention::kMaxSize,
               name << " is " << size << ", expected 1 to " << TokenAttention::kMaxSize);
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

void LatentAttention::unload_lora(int number) {
  const auto lease = engine_->lease();
  loras_.remove(number);
}

void LatentAttention::activate_loras(std::span<const int> numbers, std::span<const float> weights) {
  const auto lease = engine_->lease();
  loras_.activate(numbers, weights);
}

void LatentAttention::check(const Arrays& a, std::int64_t tokens) const {
  KTRT_CHECK(tokens >= 1, "tokens is " << tokens << ", expected at least 1");
  check_head_array("query", a.query, false, form_.heads, 1, form_.nope + form_.rope);
  check_head_array("latents", a.latents, false, 1, tokens, form_.rank);
  if (form_.rope > 0) check_head_array("positions", a.positions, false, 1, tokens, form_.rope);
  check_head_array("out", a.out, false, form_.heads, 1, form_.value);
}

LatentAttention::Own LatentAttention::own_of(const Task& task, int thread) const {
  float* const rows = task.of_caller(thread);
  return {rows, rows + width_, rows + 2 * width_, rows + 3 * width_,
          reinterpret_cast<std::uint16_t*>(rows + 4 * width_)};
}

// sums [out] += (x [in] · shrinkᵀ) · expand, x and sums as the kernels pack rows; shrink [r][in]
// and expand [r][out].
void LatentAttention::add_lora(const float* x, std::int64_t in, const std::uint16_t* shrink,
                               const std::uint16_t* expand, std::int64_t out, float* sums) const {
  const AttentionKernel& kernel = *engine_->kernels().attention;
  constexpr float kCarry = 1.0f;
  float shrunk[kAttentionBlock];
  for (std::int64_t first = 0; first < loras_.active()->rank; first += kAttentionBlock) {
    AttentionScoreArgs score{};
    score.q = x;
    score.heads = 1;
    score.keys = shrink + first * in;
    score.key_stride = in;
    score.tokens =
        static_cast<int>(std::min<std::int64_t>(kAttentionBlock, loras_.active()->rank - first));
    score.size = static_cast<int>(in);
    score.scores = shrunk;
    kernel.scores(score);
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

// out [columns] = x [k] · Wᵀ, W [columns][k] from memory.
void LatentAttention::multiply(const std::uint16_t* x, const std::uint16_t* w, std::int64_t columns,
                               std::int64_t k, float* out) const {
  DenseDotArgs dot{};
  dot.x = x;
  dot.x_stride = dot.w_stride = k;
  dot.rows = 1;
  dot.w = w;
  dot.columns = static_cast<int>(columns);
  dot.k = static_cast<int>(k);
  dot.cold = true;
  dot.last = true;
  dot.c = out;
  dot.c_stride = columns;
  engine_->kernels().dense_bf16->dot(dot);
}

// Packs q U of a head, then the rest of q.
void LatentAttention::make_query(const Task& task, const HeadArray& query, std::int64_t head,
                                 int thread) const {
  const KernelTable& kernels = engine_->kernels();
  const Own own = own_of(task, thread);
  const std::uint16_t* const q = bf16_at(query, head, 0);
  const std::uint16_t* b = nullptr;
  if (loras_.active() != nullptr) {
    b = loras_.active()->b_keys.as<std::uint16_t>() + head * loras_.active()->rank * form_.nope;
    ask_for(b, loras_.active()->rank * form_.nope);
  }
  multiply(q, keys_ + head * form_.rank * form_.nope, form_.rank, form_.nope, own.exact);
  float* const to = task.queries + head * attention_.query_width_;
  kernels.attention->pack(nullptr, own.exact, static_cast<int>(form_.rank), to);
  if (loras_.active() != nullptr) {
    kernels.attention->pack(q, nullptr, static_cast<int>(form_.nope), own.packed);
    add_lora(own.packed, form_.nope, b, loras_.active()->a.as<std::uint16_t>(), form_.rank, to);
  }
  kernels.attention->pack(q + form_.nope, nullptr, static_cast<int>(form_.rope),
                          to + attention_.first_width_);
}

// Merges a head's spans and multiplies by V.
void LatentAttention::make_output(const Task& task, const HeadArray& out, std::int64_t head,
                                  int thread) const {
  const KernelTable& kernels = engine_->kernels();
  const auto rank = static_cast<int>(form_.rank);
  const auto value = static_cast<int>(form_.value);
  const Own own = own_of(task, thread);
  const std::uint16_t* b = nullptr;
  if (loras_.active() != nullptr) {
    b = loras_.active()->b_values.as<std::uint16_t>() + head * loras_.active()->rank * form_.value;
    ask_for(b, loras_.active()->rank * form_.value);
  }
  AttentionMergeArgs merge = attention_.merge_args(task, head, thread);
  merge.out_f32 = own.exact;
  kernels.attention->merge(merge);
  kernels.elementwise->f32_to_bf16(own.exact, rank, own.rounded);
  if (loras_.active() != nullptr) kernels.attention->pack(nullptr, own.exact, rank, own.packed);
  multiply(own.rounded, values_ + head * form_.value * form_.rank, form_.value, form_.rank,
           own.exact);
  auto* const to = const_cast<std::uint16_t*>(bf16_at(out, head, 0));
  if (loras_.active() == nullptr) {
    kernels.elementwise->f32_to_bf16(own.exact, value, to);
    return;
  }
  kernels.attention->pack(nullptr, own.exact, value, own.sums);
  add_lora(own.packed, form_.rank, loras_.active()->a.as<std::uint16_t>(), b, form_.value,
           own.sums);
  // Merging one span whose weights sum up to 1 only restores the natural order.
  const float max = 0.0f;
  const float sum = 1.0f;
  merge.sums = own.sums;
  merge.max = &max;
  merge.sum = &sum;
  merge.parts = 1;
  merge.size = value;
  merge.scratch = own.scratch;
  merge.out_f32 = nullptr;
  merge.out_bf16 = to;
  kernels.attention->merge(merge);
}

void LatentAttention::forward(const Arrays& arrays, std::int64_t tokens) {
  check(arrays, tokens);
  TokenAttention::Arrays inner;
  inner.keys = inner.values = arrays.latents;
  inner.second_keys = arrays.positions;
  const auto lease = engine_->lease();
  ThreadPool& pool = lease.pool();
  // Four rows of floats and one of BF16.
  const Task task = attention_.make_task(inner, 0, tokens, lease, 5 * width_);
  std::atomic<std::int64_t> queries{0};
  std::atomic<std::int64_t> items{0};
  std::atomic<std::int64_t> outputs{0};
  const auto each_head = [&](std::atomic<std::int64_t>& next, const auto& run) {
    for (;;) {
      const std::int64_t head = next.fetch_add(1, std::memory_order_relaxed);
      if (head >= form_.heads) break;
      run(head);
    }
  };
  const auto make_queries = [&](int thread) {
    each_head(queries, [&](std::int64_t h) { make_query(task, arrays.query, h, thread); });
  };
  const auto make_outputs = [&](int thread) {
    each_head(outputs, [&](std::int64_t h) { make_output(task, arrays.out, h, thread); });
  };
  if (attention_.is_small(tokens, form_.heads * form_.rank * (form_.nope + form_.value))) {
    make_queries(0);
    attention_.compute_items(task, items, 0);
    make_outputs(0);
    return;
  }
  pool.run([&](int thread) {
    make_queries(thread);
    pool.barrier();
    attention_.compute_items(task, items, thread);
    pool.barrier();
    make_outputs(thread);
  });
}

}  // namespace ktrt
