// The routed experts of one MoE layer: the interface that the bindings expose.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/tensor_view.h"
#include "engine/engine.h"
#include "lora/expert_lora.h"
#include "lora/lora_set.h"
#include "moe/dispatch_plan.h"
#include "moe/expert_biases.h"
#include "moe/expert_weights.h"
#include "moe/forward.h"

namespace ktrt {

// Names of the kernel variants that ran in the last forward; null where the family did not run.
struct KernelsUsed {
  const char* gemm = nullptr;
  const char* gemm_few_rows = nullptr;  // only where few rows have a kernel of their own
  const char* lora_shrink = nullptr;
  const char* lora_shrink_few_rows = nullptr;
  const char* elementwise = nullptr;
};

// One packed matrix as kt_kernel keeps it in files: codes [bytes] uint8, scales [n] float32.
struct PackedShard {
  TensorView codes;
  TensorView scales;
};

// How image files become the layer's memory. kAuto maps what lies in huge pages (decoding from
// small ones is a third slower), and copies everything else and whatever has a NUMA node to lie on.
enum class ImageUse { kAuto, kMap, kCopy };

class MoeLayer {
 public:
  // `down_slices`: see ExpertWeights.
  MoeLayer(std::shared_ptr<Engine> engine, const MoeShape& shape, WeightFormat format,
           const Activation& activation = {}, int down_slices = 1);
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  const Engine& engine() const { return *engine_; }
  const MoeShape& shape() const { return shape_; }
  WeightFormat format() const { return format_; }
  const Activation& activation() const { return activation_; }
  int down_slices() const { return down_slices_; }
  bool has_biases() const;

  // gate (only where the experts have one), up [intermediate, hidden], down [hidden, intermediate];
  // float32, float16 or bfloat16. Throws std::invalid_argument: shapes, dtypes, expert out of
  // range, a weight that is not finite.
  void load_expert(int expert, const std::optional<TensorView>& gate, const TensorView& up,
                   const TensorView& down);

  // Of all experts, see ExpertBiases; what was set before is dropped.
  void set_biases(const std::optional<TensorView>& gate, const std::optional<TensorView>& up,
                  const std::optional<TensorView>& down);

  // The same from kt_kernel's packed matrices, used as they are: gate and up in shards of equally
  // many rows, down in `down_slices` shards of columns. Throws std::invalid_argument: sizes, a
  // scale that is not finite, a BF16 layer (kt_kernel has no such files).
  void load_packed_expert(int expert, std::span<const PackedShard> gate,
                          std::span<const PackedShard> up, std::span<const PackedShard> down);

  // Image files: one per part, written by the layer that packed the experts, in a layer of the same
  // engine parts, shape and format mapped or copied instead of packing. LoRA is not in them.
  std::vector<std::size_t> image_bytes() const;
  // Appends a part's image to an open file and returns its digest. Throws std::system_error.
  std::uint64_t write_image(int part, int fd);
  // Returns whether the files stay mapped (kMap), or were copied. Throws std::invalid_argument if a
  // size or a digest is not as expected, std::system_error.
  ImageUse use_images(std::span<const int> fds, std::span<const std::uint64_t> digests,
                      ImageUse use);

  // LoRAs by number, 0 or more; one without any pair acts on nothing. Throws std::invalid_argument.
  void load_lora(int id, const LoraPair& gate, const LoraPair& up, const LoraPair& down);
  void unload_lora(int id);
  // What forwards apply from now on: see LoraSet. Waits for a forward under way.
  void activate_loras(std::span<const int> ids, std::span<const float> weights);

  // hidden_states, out [qlen, hidden] of one float dtype; expert_ids [qlen, k ≤ top_k] int32 or
  // int64; routing_weights [qlen, k] float. `out` must not overlap `hidden_states`. `adapter_ids`
  // [qlen] int32 or int64: each token's own of the active LoRAs, -1 for none; missing: their sum.
  void forward(const TensorView& hidden_states, const TensorView& expert_ids,
               const TensorView& routing_weights, const TensorView& out,
               const std::optional<TensorView>& adapter_ids = std::nullopt);

  KernelsUsed last_kernels() const;
  std::size_t packed_bytes() const;

  // Copies of one packed matrix, in kt_kernel's byte order, part after part, slice after slice.
  std::vector<std::uint8_t> packed_codes(int expert, Projection projection);
  std::vector<float> packed_scales(int expert, Projection projection);

  // The packed memory itself: whoever holds it keeps it alive, also after the engine is closed.
  // Throws std::invalid_argument while an expert is missing. Null if no LoRA acts.
  std::shared_ptr<const ExpertWeights> share_weights();
  std::shared_ptr<const ActiveLora> share_lora();
  // Numbers and weights, in the order of activate_loras().
  std::vector<std::pair<int, float>> active_loras();
  // Changes whenever another LoRA, or another weight, acts.
  int lora_version() const { return lora_version_.load(std::memory_order_relaxed); }

 private:
  void release();
  void check_forward(const TensorView& hidden_states, const TensorView& expert_ids,
                     const TensorView& routing_weights, const TensorView& out) const;
  const ActiveLora* acting_lora() const;
  void pack(ThreadPool& pool, int expert, Projection projection, const TensorView& source);
  void copy_shards(ThreadPool& pool, int expert, Projection projection,
                   std::span<const PackedShard> shards);
  void copy_images(ThreadPool& pool, const std::vector<MappedFile>& files);
  std::uint64_t parallel_digest(ThreadPool& pool, const std::byte* data, std::size_t bytes);
  void check_expert(int expert) const;
  void check_loaded(int expert) const;
  void check_all_loaded() const;

  const std::shared_ptr<Engine> engine_;
  const MoeShape shape_;
  const WeightFormat format_;
  const int down_slices_;
  const Activation activation_;
  std::shared_ptr<ExpertWeights> weights_;  // null once the engine is closed
  std::optional<ExpertBiases> biases_;
  LoraSet loras_;
  std::atomic<int> lora_version_{0};
  std::optional<Workspace> workspace_;
  DispatchPlan plan_;
  ShrinkQueue shrinks_;
  std::vector<PartQueues> queues_;
  KernelsUsed used_;
  std::optional<Engine::CloseHandler> close_handler_;  // the last member: the first to go
};

}  // namespace ktrt
