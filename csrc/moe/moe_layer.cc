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

}  // namespace

MoeLayer::MoeLayer(std::shared_ptr<Engine> engine, const MoeShape& shape, WeightFormat format,
                   const Activation& activation, int down_slices)
    : engine_(std::move(engine)),
      activation_(activation),
      experts_(engine_, shape, format, down_slices) {
  check_activation(activation);
  const auto lease = engine_->lease();
  queues_ = std::vector<PartQueues>(static_cast<std::size_t>(engine_->parts()));
  workspace_.emplace(lease.scratch(), shape, engine_->num_threads(), engine_->max_qlen(),
                     max_job_rows(engine_->kernels()));
  close_handler_.emplace(*engine_, lease, [this] { release(); });
}

void MoeLayer::release() {
  experts_.release();
  loras_.clear();
}

void MoeLayer::load_lora(int id, const LoraPair& gate, const LoraPair& up, const LoraPair& down) {
  auto lora = std::make_shared<const ExpertLora>(shape(), gate, up, down);
  const auto lease = engine_->lease();
  loras_.put(id, std::move(lora));
  ++lora_version_;
}

void MoeLayer::unload_lora(int id) {
  const auto lease = engine_->lease();
  loras_.remove(id);
  ++lora_version_;
}

void MoeLayer::activate_loras(std::span<const int> ids, std::span<const float> weights) {
  const auto lease = engine_->lease();
  if (loras_.activate(ids, weights)) ++lora_version_;
}

std::vector<std::pair<int, float>> MoeLayer::active_loras() {
  const auto lease = engine_->lease();
  std::vector<std::pair<int, float>> found;
  for (std::size_t i = 0; i < loras_.active_ids().size(); ++i) {
    found.emplace_back(loras_.active_ids()[i], loras_.active_weights()[i]);
  }
  return found;
}

std::vector<int> MoeLayer::loras() {
  const auto lease = engine_->lease();
  return loras_.numbers();
}

std::shared_ptr<const ExpertLora> MoeLayer::share_lora(int id) {
  const auto lease = engine_->lease();
  auto found = loras_.find(id);
  KTRT_CHECK(found != nullptr, "there is no LoRA " << id << "; " << loras_.size() << " are held");
  return found;
}

void MoeLayer::check_forward(const TensorView& hidden_states, const TensorView& expert_ids,
                             const TensorView& routing_weights, const TensorView& out) const {
  hidden_states.expect_float();
  hidden_states.expect_shape({-1, shape().hidden_size});
  const std::int64_t qlen = hidden_states.shape[0];
  KTRT_CHECK(qlen <= engine_->max_qlen(),
             "qlen is " << qlen << ", at most max_qlen (" << engine_->max_qlen() << ") expected");
  out.expect_shape({qlen, shape().hidden_size});
  KTRT_CHECK(out.dtype == hidden_states.dtype,
             out.name << " is " << name_of(out.dtype) << ", expected the dtype of "
                      << hidden_states.name << " (" << name_of(hidden_states.dtype) << ")");
  KTRT_CHECK(qlen <= 1 || std::abs(out.stride[0]) >= shape().hidden_size,
             out.name << " has overlapping rows (their stride is " << out.stride[0]
                      << "), expected " << shape().hidden_size << " or more");
  expert_ids.expect_shape({qlen, -1});
  KTRT_CHECK(expert_ids.dtype == DType::kInt32 || expert_ids.dtype == DType::kInt64,
             expert_ids.name << " is " << name_of(expert_ids.dtype) << ", expected int32 or int64");
  KTRT_CHECK(expert_ids.shape[1] <= shape().top_k,
             expert_ids.name << " has " << expert_ids.shape[1] << " slots, at most top_k ("
                             << shape().top_k << ") expected");
  routing_weights.expect_float();
  routing_weights.expect_shape({qlen, expert_ids.shape[1]});
}

void MoeLayer::forward(const TensorView& hidden_states, const TensorView& expert_ids,
                       const TensorView& routing_weights, const TensorView& out,
                       const std::optional<TensorView>& adapter_ids) {
  check_forward(hidden_states, expert_ids, routing_weights, out);
  const auto lease = engine_->lease();
  experts_.check_all_loaded();
  mixes_.choose(loras_, adapter_ids, hidden_states.shape[0]);
  workspace_->place(lease.scratch(), mixes_.input_width(), mixes_.down_width());
  plan_.build(expert_ids, routing_weights, shape().num_experts, workspace_->max_job_rows(),
              mixes_.of_tokens());

  const KernelTable& kernels = engine_->kernels();
  std::atomic<int>* counters = lease.scratch().counters(2 * plan_.jobs().size());
  ForwardTask task{.weights = experts_.weights(),
                   .activation = activation_,
                   .biases = experts_.biases(),
                   .mixes = mixes_,
                   .plan = plan_,
                   .kernels = kernels,
                   .gemm = kernels.gemm(format()),
                   .workspace = *workspace_,
                   .finished_strips = counters,
                   .shrunk_blocks = counters + plan_.jobs().size(),
                   .shrinks = shrinks_,
                   .queues = queues_,
                   .home = engine_->home(),
                   .hidden_states = hidden_states,
                   .out = out};
  run_forward(task, lease.pool());
  name_kernels(task);
  // Jobs are in the order of their experts.
  int experts = 0;
  for (int last = -1; const Job& job : plan_.jobs()) {
    experts += job.expert != last;
    last = job.expert;
  }
  last_experts_.store(experts, std::memory_order_relaxed);
}

void MoeLayer::name_kernels(const ForwardTask& task) {
  used_ = {};
  const bool shrinks = mixes_.input_width() > 0 || mixes_.down_width() > 0;
  for (const Job& job : plan_.jobs()) {
    const bool many = job.rows >= task.gemm.many_from;
    const GemmKernel& gemm = task.gemm.for_rows(job.rows);
    (many ? used_.gemm : used_.gemm_few_rows) = gemm.name;
    if (!shrinks) continue;
    (many ? used_.lora_shrink : used_.lora_shrink_few_rows) = task.kernels.shrink_for(gemm).name;
  }
  used_.elementwise = task.kernels.elementwise->name;
}

KernelsUsed MoeLayer::last_kernels() const {
  const auto lock = engine_->lock();
  return used_;
}

}  // namespace ktrt
