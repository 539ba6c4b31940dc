// Lets a CUDA stream start the engine and wait for it, without the host in between.
//
//   stream:  copies to the pinned slot → word = started … word == done? → copy of the result
//   worker:                              sees it → forward → word = done
//
// The stream's part can be captured into a graph and replayed. Slots of one hand-off run one after
// the other, on one stream or on streams that are ordered among each other, and share memory.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cuda/cuda_driver.h"
#include "cuda/layer_slot.h"
#include "cuda/pinned_memory.h"
#include "cuda/slot_server.h"
#include "cuda/stream_signals.h"
#include "engine/engine.h"
#include "moe/moe_layer.h"

namespace ktrt {

class GpuHandoff {
 public:
  // Uses the context that is current, from then on in any thread. Throws std::invalid_argument
  // (timeout), std::runtime_error (no usable driver, or not the mechanism that was requested).
  GpuHandoff(std::shared_ptr<Engine> engine, std::chrono::nanoseconds timeout,
             const std::string& driver, std::optional<SignalMechanism> mechanism = std::nullopt);
  ~GpuHandoff();
  GpuHandoff(const GpuHandoff&) = delete;
  GpuHandoff& operator=(const GpuHandoff&) = delete;

  SignalMechanism mechanism() const { return mechanism_; }
  bool closed() const { return closed_; }
  std::size_t pinned_bytes();

  // Not during a capture. `name`: the layer's, for error messages; empty for its number.
  // `adapters`: every submit brings the tokens' adapter ids. Throws std::invalid_argument: sizes, a
  // layer of another engine.
  int add_slot(std::shared_ptr<MoeLayer> layer, int tokens, int top_k, DType dtype,
               const std::string& name, bool adapters = false);

  // Device addresses of contiguous arrays: hidden_states [tokens, hidden_size] of the slot's dtype,
  // expert_ids int64 and routing_weights float32 [tokens, top_k]; adapter_ids int32 [tokens] where
  // the slot has them, else 0. Outside a capture this expects the slot too.
  void submit(int slot, CuStream stream, CuDevicePtr hidden_states, CuDevicePtr expert_ids,
              CuDevicePtr routing_weights, CuDevicePtr adapter_ids = 0);
  // out [tokens, hidden_size]. Belongs to the last submit, which was captured if this is.
  void wait(int slot, CuStream stream, CuDevicePtr out);
  // A graph is about to be launched in which these slots start in this order.
  void expect(const std::vector<int>& slots);

  // Returns once the stream has drained. Throws what went wrong since the last call: HandoffTimeout
  // or std::runtime_error; then the device waits for nothing any more, and the next use starts
  // clean, unless other work keeps the stream busy for a second more. `interrupt` is called now
  // and then and may throw, with the same consequences.
  void synchronize(CuStream stream, const std::function<void()>& interrupt);

  // Releases the device, waits until it has drained, ends the threads and frees the memory. Graphs
  // that captured a slot must not be launched afterwards. Idempotent.
  void close();

 private:
  LayerSlot& find(int slot);
  std::size_t number_of(const MoeLayer& layer) const;
  void check_process() const;
  std::unique_lock<std::mutex> lock_own();
  void check_open() const;
  bool is_capturing(CuStream stream) const;
  bool drain(CuStream stream, const std::function<void()>& interrupt);
  void forget();

  const std::shared_ptr<Engine> engine_;
  const std::chrono::nanoseconds timeout_;
  const pid_t owner_;
  const CudaDriver driver_;
  PinnedMemory memory_;
  SignalMechanism mechanism_;
  std::atomic<bool> closed_{false};
  // Held by everything that changes slots or enqueues; never taken by the server's threads,
  // which is why a call of the driver may block under it.
  std::mutex mutex_;
  std::vector<std::unique_ptr<LayerSlot>> slots_;
  LayerSlot* submitted_ = nullptr;  // and not waited for
  bool submitted_in_capture_ = false;
  std::unique_ptr<SlotServer> server_;  // never replaced; stopped by close()
};

}  // namespace ktrt
