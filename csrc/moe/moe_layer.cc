#include "moe/moe_layer.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "base/check.h"

namespace ktrt {

namespace {

void check_activation(const Activation& a) {
  KTRT_CHECK(a.gate_limit > 0.0f && a.up_limit > 0.0f && std::isfinite(a.alpha) &&
                 std::isfinite(a.up_offset),
             "the activation has gate_limit " << a.gate_limit << ", up_limit " << a.up_limit
                                              << ", alpha " << a.alpha << ", up_offset "
                                              << a.up_offset << "; expected limits above 0 and "
                                              << "finite numbers");
  KTRT_CHECK(a.kind != ActivationKind::kSoftcapSilu ||
                 (std::isfinite(a.gate_limit) && std::isfinite(a.up_limit)),
             "the softcaps of the activation are infinite, expected finite ones");
}

void check_adapter_ids(const TensorView& ids, std::int64_t qlen) {
  ids.expect_shape({qlen});
  KTRT_CHECK(ids.dtype == DType::kInt32 || ids.dtype == DType::kInt64,
             ids.name << " is " << name_of(ids.dtype) << ", expected int32 or int64");
}

}  // namespace

MoeLayer::MoeLayer(std::shared_ptr<Engine> engine, const MoeShape& shape, WeightFormat format,
                   const Activation& activation, int down_slices)
    : engine_(std::move(engine)),
      shape_(shape),
      format_(format),
      down_slices_(down_slices),
      activation_(activation) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  check_activation(activation);
  const auto lease = engine_->lease();
  weights_ = std::make_shared<ExpertWeights>(shape, format, engine_->parts(), down_slices);
  queues_ = std::vector<PartQueues>(static_cast<std::size_t>(engine_->parts()));
  workspace_.emplace(lease.scratch(), shape, engine_->num_threads(), engine_->max_qlen(),
                     max_job_rows(engine_->kernels()));
  close_handler_.emplace(*engine_, lease, [this] { release(); });
}

void MoeLayer::release() {
  weights_.reset();
  biases_.reset();
  loras_.clear();
}

void MoeLayer::load_expert(int expert, const std::optional<TensorView>& gate, const TensorView& up,
                           const TensorView& down) {
  check_expert(expert);
  KTRT_CHECK(gate.has_value() == shape_.has_gate, "gate is " << (gate ? "given" : "missing")
                                                             << ", but the experts have "
                                                             << (shape_.has_gate ? "one" : "none"));
  if (gate) {
    gate->expect_float();
    gate->expect_shape({shape_.intermediate_size, shape_.hidden_size});
  }
  for (const TensorView* view : {&up, &down}) view->expect_float();
  up.expect_shape({shape_.intermediate_size, shape_.hidden_size});
  down.expect_shape({shape_.hidden_size, shape_.intermediate_size});

  const auto lease = engine_->lease();
  weights_->allocate();
  weights_->set_loaded(expert, false);
  if (gate) pack(lease.pool(), expert, Projection::kGate, *gate);
  pack(lease.pool(), expert, Projection::kUp, up);
  pack(lease.pool(), expert, Projection::kDown, down);
  weights_->set_loaded(expert, true);
}

void MoeLayer::check_expert(int expert) const {
  KTRT_CHECK(expert >= 0 && expert < shape_.num_experts,
             "expert is " << expert << ", expected 0 to " << shape_.num_experts - 1);
}

// Every thread packs strips of its own part, so that their pages lie on its NUMA node.
void MoeLayer::pack(ThreadPool& pool, int expert, Projection projection, const TensorView& source) {
  std::vector<std::atomic<int>> next(static_cast<std::size_t>(weights_->parts()));
  std::atomic<bool> finite{true};
  pool.run([&](int thread) {
    const int part = engine_->home()[static_cast<std::size_t>(thread)];
    const PackedLayout layout = weights_->matrix(expert, projection, part).layout;
    const int first_row = weights_->first_strip(projection, part) * kStripRows;
    std::atomic<int>& claim = next[static_cast<std::size_t>(part)];
    for (int s = claim++; s < layout.strips(); s = claim++) {
      for (int slice = 0; slice < weights_->slices(projection); ++slice) {
        TensorView rows = source;
        rows.data = source.mutable_row(first_row) +
                    static_cast<std::size_t>(slice * layout.k()) * size_of(source.dtype);
        const PackedMatrix matrix = weights_->matrix(expert, projection, part, slice);
        if (!pack_strip(rows, matrix, s)) finite.store(false, std::memory_order_relaxed);
      }
    }
  });
  KTRT_CHECK(finite.load(), source.name << " of expert " << expert
                                        << " holds NaN or infinity; the weights are damaged");
}

void MoeLayer::load_lora(int id, const LoraPair& gate, const LoraPair& up, const LoraPair& down) {
  auto lora = std::make_shared<const ExpertLora>(shape_, gate, up, down);
  const auto lease = engine_->lease();
  const auto before = loras_.active();
  loras_.put(shape_, id, std::move(lora));
  if (loras_.active() != before) ++lora_version_;
}

void MoeLayer::unload_lora(int id) {
  const auto lease = engine_->lease();
  loras_.remove(id);
}

void MoeLayer::activate_loras(std::span<const int> ids, std::span<const float> weights) {
  const auto lease = engine_->lease();
  if (loras_.activate(shape_, ids, weights)) ++lora_version_;
}

std::vector<std::pair<int, float>> MoeLayer::active_loras() {
  const auto lease = engine_->lease();
  std::vector<std::pair<int, float>> found;
  if (const ActiveLora* active = loras_.active().get()) {
    for (std::size_t i = 0; i < active->ids.size(); ++i) {
      found.emplace_back(active->ids[i], active->weights[i]);
    }
  }
  return found;
}

const ActiveLora* MoeLayer::acting_lora() const {
  const ActiveLora* active = loras_.active().get();
  return active != nullptr && !active->silent() ? active : nullptr;
}

void MoeLayer::set_biases(const std::optional<TensorView>& gate,
                          const std::optional<TensorView>& up,
                          const std::optional<TensorView>& down) {
  ExpertBiases biases(shape_, gate, up, down);
  const auto lease = engine_->lease();
  biases_.emplace(std::move(biases));
}

void MoeLayer::check_forward(const TensorView& hidden_states, const TensorView& expert_ids,
                             const TensorView& routing_weights, const TensorView& out) const {
  hidden_states.expect_float();
  hidden_states.expect_shape({-1, shape_.hidden_size});
  const std::int64_t qlen = hidden_states.shape[0];
  KTRT_CHECK(qlen <= engine_->max_qlen(),
             "qlen is " << qlen << ", at most max_qlen (" << engine_->max_qlen() << ") expected");
  out.expect_shape({qlen, shape_.hidden_size});
  KTRT_CHECK(out.dtype == hidden_states.dtype,
             out.name << " is " << name_of(out.dtype) << ", expected the dtype of "
                      << hidden_states.name << " (" << name_of(hidden_states.dtype) << ")");
  KTRT_CHECK(qlen <= 1 || std::abs(out.stride[0]) >= shape_.hidden_size,
             out.name << " has overlapping rows (their stride is " << out.stride[0]
                      << "), expected " << shape_.hidden_size << " or more");
  expert_ids.expect_shape({qlen, -1});
  KTRT_CHECK(expert_ids.dtype == DType::kInt32 || expert_ids.dtype == DType::kInt64,
             expert_ids.name << " is " << name_of(expert_ids.dtype) << ", expected int32 or int64");
  KTRT_CHECK(expert_ids.shape[1] <= shape_.top_k, expert_ids.name << " has " << expert_ids.shape[1]
                                                                  << " slots, at most top_k ("
                                                                  << shape_.top_k << ") expected");
  routing_weights.expect_float();
  routing_weights.expect_shape({qlen, expert_ids.shape[1]});
}

void MoeLayer::forward(const TensorView& hidden_states, const TensorView& expert_ids,
                       const TensorView& routing_weights, const TensorView& out,
                       const std::optional<TensorView>& adapter_ids) {
  check_forward(hidden_states, expert_ids, routing_weights, out);
  if (adapter_ids) check_adapter_ids(*adapter_ids, hidden_states.shape[0]);
  const auto lease = engine_->lease();
  check_all_loaded();
  const int* chosen = adapter_ids ? loras_.choose(*adapter_ids).data() : nullptr;
  const ActiveLora* active = acting_lora();
  const bool weighed = active != nullptr && (chosen != nullptr || !active->plain());
  workspace_->place(lease.scratch());
  plan_.build(expert_ids, routing_weights, shape_.num_experts, workspace_->max_job_rows());

  const KernelTable& kernels = engine_->kernels();
  std::atomic<int>* counters = lease.scratch().counters(2 * plan_.jobs().size());
  ForwardTask task{.weights = *weights_,
                   .activation = activation_,
                   .biases = biases_ ? &*biases_ : nullptr,
                   .lora = active ? active->lora.get() : nullptr,
                   .factors = weighed ? active->factors.data() : nullptr,
                   .chosen_factors = chosen,
                   .plan = plan_,
                   .kernels = kernels,
                   .gemm = kernels.gemm(format_),
                   .workspace = *workspace_,
                   .finished_strips = counters,
                   .shrunk_blocks = counters + plan_.jobs().size(),
                   .shrinks = shrinks_,
                   .queues = queues_,
                   .home = engine_->home(),
                   .hidden_states = hidden_states,
                   .out = out};
  run_forward(task, lease.pool());
  used_ = {};
  const bool shrinks = task.lora != nullptr && (task.lora->input_shrink().blocks > 0 ||
                                                task.lora->down_shrink().blocks > 0);
  for (const Job& job : plan_.jobs()) {
    const bool many = job.rows >= task.gemm.many_from;
    const GemmKernel& gemm = task.gemm.for_rows(job.rows);
    (many ? used_.gemm : used_.gemm_few_rows) = gemm.name;
    if (!shrinks) continue;
    (many ? used_.lora_shrink : used_.lora_shrink_few_rows) = kernels.shrink_for(gemm).name;
  }
  used_.elementwise = kernels.elementwise->name;
}

KernelsUsed MoeLayer::last_kernels() const {
  const auto lock = engine_->lock();
  return used_;
}

std::size_t MoeLayer::packed_bytes() const {
  const auto lock = engine_->lock();
  return weights_ ? weights_->packed_bytes() : 0;
}

std::vector<std::uint8_t> MoeLayer::packed_codes(int expert, Projection projection) {
  const auto lease = engine_->lease();
  check_loaded(expert);
  std::vector<std::uint8_t> codes;
  for (int part = 0; part < weights_->parts(); ++part) {
    for (int slice = 0; slice < weights_->slices(projection); ++slice) {
      const PackedMatrix matrix = weights_->matrix(expert, projection, part, slice);
      codes.insert(codes.end(), matrix.codes, matrix.codes + matrix.layout.code_bytes());
    }
  }
  return codes;
}

std::vector<float> MoeLayer::packed_scales(int expert, Projection projection) {
  const auto lease = engine_->lease();
  check_loaded(expert);
  std::vector<float> scales;
  for (int part = 0; part < weights_->parts(); ++part) {
    for (int slice = 0; slice < weights_->slices(projection); ++slice) {
      const PackedMatrix matrix = weights_->matrix(expert, projection, part, slice);
      if (matrix.scales == nullptr) continue;
      scales.insert(scales.end(), matrix.scales, matrix.scales + matrix.layout.padded_n());
    }
  }
  return scales;
}

std::shared_ptr<const ExpertWeights> MoeLayer::share_weights() {
  const auto lease = engine_->lease();
  check_all_loaded();
  return weights_;
}

std::shared_ptr<const ActiveLora> MoeLayer::share_lora() {
  const auto lease = engine_->lease();
  return acting_lora() != nullptr ? loras_.active() : nullptr;
}

bool MoeLayer::has_biases() const {
  const auto lock = engine_->lock();
  return biases_.has_value();
}

void MoeLayer::check_all_loaded() const {
  KTRT_CHECK(weights_->all_loaded(),
             "expert " << weights_->first_missing() << " has not been loaded");
}

void MoeLayer::check_loaded(int expert) const {
  KTRT_CHECK(expert >= 0 && expert < shape_.num_experts && weights_->loaded(expert),
             "expert " << expert << " has not been loaded");
}

}  // namespace ktrt
