#include "cuda/gpu_handoff.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "base/check.h"

namespace ktrt {
namespace {

using std::chrono::nanoseconds;
using std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr nanoseconds kWaitSlice = 5ms;        // for the server, between looks at the stream
constexpr nanoseconds kInterruptEvery = 50ms;  // a Ctrl-C waits no longer
constexpr nanoseconds kPollHard = 2ms;         // the device's work after the last slot is short
constexpr nanoseconds kNap = 50us;
constexpr nanoseconds kDrainPatience = 1s;   // once nothing of ours keeps the stream waiting
constexpr nanoseconds kLongestStep = 100ms;  // longer ones: the process was stopped meanwhile

}  // namespace

GpuHandoff::GpuHandoff(std::shared_ptr<Engine> engine, nanoseconds timeout,
                       const std::string& driver, std::optional<SignalMechanism> mechanism)
    : engine_(std::move(engine)),
      timeout_(timeout),
      owner_(getpid()),
      driver_(driver),
      memory_(driver_) {
  KTRT_CHECK(engine_ != nullptr, "engine is missing");
  KTRT_CHECK(timeout > 0ns, "timeout must be positive");
  const CurrentContext current(driver_);
  const bool ops_wanted = mechanism != SignalMechanism::kHostFunctions;
  const bool ops = ops_wanted && stream_memory_ops_work(driver_, memory_.new_word());
  if (mechanism == SignalMechanism::kStreamMemoryOps && !ops) {
    throw std::runtime_error(
        "this driver and device have no stream memory operations that can be captured: use "
        "mechanism 'auto' or 'host_functions'");
  }
  mechanism_ = ops ? SignalMechanism::kStreamMemoryOps : SignalMechanism::kHostFunctions;
  server_ = std::make_unique<SlotServer>(engine_->caller_cpu(), timeout,
                                         mechanism_ == SignalMechanism::kHostFunctions);
}

GpuHandoff::~GpuHandoff() {
  if (getpid() == owner_) {
    close();
    return;
  }
  // After fork(): threads and device are the parent's, and so are the locks they held.
  new auto(std::move(server_));
  new auto(std::move(slots_));
  new auto(engine_);
  memory_.leak();
}

std::size_t GpuHandoff::pinned_bytes() {
  const auto lock = lock_own();
  return memory_.bytes();
}

int GpuHandoff::add_slot(std::shared_ptr<MoeLayer> layer, int tokens, int top_k, DType dtype,
                         const std::string& name, bool adapters) {
  KTRT_CHECK(layer != nullptr && &layer->engine() == engine_.get(),
             "the layer belongs to another engine than the hand-off");
  auto slot = std::make_unique<LayerSlot>(std::move(layer), tokens, top_k, dtype, adapters);
  const auto lock = lock_own();
  check_open();
  const CurrentContext current(driver_);
  slot->place(memory_.shared_buffer(slot->pinned_bytes()));
  const PinnedMemory::Word word = memory_.new_word();
  const std::size_t index = slots_.size();
  const std::string who = name.empty() ? "layer " + std::to_string(number_of(*slot->layer)) : name;
  slot->signalled = {{"slot " + std::to_string(index) + " (" + who + ", " + std::to_string(tokens) +
                          (tokens == 1 ? " token)" : " tokens)"),
                      [slot = slot.get()] { slot->forward(); }, SlotWord(word.host)},
                     word.device,
                     server_.get()};
  slots_.push_back(std::move(slot));
  server_->add(slots_.back()->signalled.slot);
  return static_cast<int>(index);
}

// Layers count in the order in which they got their first slot.
std::size_t GpuHandoff::number_of(const MoeLayer& layer) const {
  std::vector<const MoeLayer*> layers;
  for (const auto& slot : slots_) {
    const MoeLayer* other = slot->layer.get();
    if (std::find(layers.begin(), layers.end(), other) == layers.end()) layers.push_back(other);
  }
  return static_cast<std::size_t>(std::find(layers.begin(), layers.end(), &layer) - layers.begin());
}

void GpuHandoff::submit(int slot, CuStream stream, CuDevicePtr hidden_states,
                        CuDevicePtr expert_ids, CuDevicePtr routing_weights,
                        CuDevicePtr adapter_ids) {
  KTRT_CHECK(hidden_states != 0 && expert_ids != 0 && routing_weights != 0,
             "hidden_states, expert_ids and routing_weights must be device addresses, found a null "
             "pointer");
  const auto lock = lock_own();
  LayerSlot& found = find(slot);
  KTRT_CHECK((adapter_ids != 0) == found.adapter_ids.has_value(),
             found.signalled.slot.name << " was made " << (adapter_ids == 0 ? "with" : "without")
                                       << " adapter ids, and submit was called "
                                       << (adapter_ids == 0 ? "without" : "with") << " them");
  if (submitted_ != nullptr) {
    throw std::runtime_error(submitted_->signalled.slot.name +
                             " was submitted and not waited for; " + found.signalled.slot.name +
                             " shares its memory (synchronize forgets it)");
  }
  const CurrentContext current(driver_);
  const bool capturing = is_capturing(stream);
  server_->throw_failure();
  Slot* const expected = &found.signalled.slot;
  if (!capturing) server_->expect({&expected, 1});
  try {
    const CudaApi& api = driver_.api();
    const auto copy = [&](const TensorView& to, CuDevicePtr from) {
      driver_.check(api.memcpy_dtoh_async(to.data, from, bytes_of(to), stream),
                    "cuMemcpyDtoHAsync");
    };
    copy(found.hidden_states, hidden_states);
    copy(found.expert_ids, expert_ids);
    copy(found.routing_weights, routing_weights);
    if (found.adapter_ids) copy(*found.adapter_ids, adapter_ids);
    enqueue_start(driver_, mechanism_, found.signalled, stream);
  } catch (...) {
    if (!capturing) server_->retract();
    throw;
  }
  submitted_ = &found;
  submitted_in_capture_ = capturing;
}

void GpuHandoff::wait(int slot, CuStream stream, CuDevicePtr out) {
  KTRT_CHECK(out != 0, "out must be a device address, found a null pointer");
  const auto lock = lock_own();
  LayerSlot& found = find(slot);
  if (submitted_ != &found) {
    throw std::runtime_error(found.signalled.slot.name + " has not been submitted" +
                             (submitted_ ? "; " + submitted_->signalled.slot.name + " has" : ""));
  }
  const CurrentContext current(driver_);
  if (is_capturing(stream) != submitted_in_capture_) {
    throw std::runtime_error(found.signalled.slot.name + " was submitted " +
                             (submitted_in_capture_ ? "in" : "outside") +
                             " a capture; the wait must be so too");
  }
  enqueue_wait(driver_, mechanism_, found.signalled, stream);
  submitted_ = nullptr;
  driver_.check(driver_.api().memcpy_htod_async(out, found.out.data, bytes_of(found.out), stream),
                "cuMemcpyHtoDAsync");
}

void GpuHandoff::expect(const std::vector<int>& slots) {
  const auto lock = lock_own();
  check_open();
  std::vector<Slot*> expected;
  for (const int slot : slots) expected.push_back(&find(slot).signalled.slot);
  server_->expect(expected);
}

void GpuHandoff::synchronize(CuStream stream, const std::function<void()>& interrupt) {
  check_open();
  const CurrentContext current(driver_);
  if (is_capturing(stream)) {
    throw std::runtime_error("synchronize cannot be called while the stream is being captured");
  }
  bool drained = false;
  try {
    drained = drain(stream, interrupt);
  } catch (...) {
    server_->fail("synchronize was interrupted");
    if (drain(stream, nullptr)) forget();
    throw;
  }
  try {
    server_->throw_failure();
  } catch (...) {
    if (drained) forget();
    throw;
  }
  if (drained) forget();
}

// Drops submits that the stream has not waited for, and the failure.
void GpuHandoff::forget() {
  const auto lock = lock_own();
  submitted_ = nullptr;
  server_->forget_failure();
}

// False: the stream is still busy although nothing of ours has happened for long; then there is a
// failure.
bool GpuHandoff::drain(CuStream stream, const std::function<void()>& interrupt) {
  SlotServer::Progress before;
  nanoseconds idle{0};
  auto last = steady_clock::now();
  auto interrupt_at = last + kInterruptEvery;
  auto poll_until = last + kPollHard;
  for (;;) {
    const SlotServer::Progress progress = server_->wait(kWaitSlice);
    const CuResult result = driver_.api().stream_query(stream);
    if (result == kCuSuccess) {
      if (!progress.pending) return true;
      server_->fail_if_not_started();
    } else if (result != kCuNotReady) {
      server_->fail(driver_.describe(result, "cuStreamQuery"));
      return true;
    }
    const auto now = steady_clock::now();
    if (progress.pending) {
      poll_until = now + kPollHard;
    } else if (now < poll_until) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
    const bool still =
        !progress.running && progress.steps == before.steps && progress.failed == before.failed;
    idle = still ? idle + std::min<nanoseconds>(now - last, kLongestStep) : nanoseconds(0);
    before = progress;
    last = now;
    if (idle > (progress.failed ? kDrainPatience : timeout_)) {
      if (progress.failed) return false;
      server_->fail(
          "the stream has not drained and no slot has moved for " + seconds_text(timeout_), true);
    }
    if (interrupt && now > interrupt_at) {
      interrupt();
      interrupt_at = now + kInterruptEvery;
    }
  }
}

void GpuHandoff::close() {
  if (getpid() != owner_) return;
  // First, and without the mutex: its holder may wait for the device.
  server_->fail("the hand-off was closed while slots were in use");
  const auto lock = lock_own();
  if (closed_) return;
  closed_ = true;
  try {
    const CurrentContext current(driver_);
    const CuResult drained = driver_.api().ctx_synchronize();
    server_->stop();
    if (drained == kCuSuccess) memory_.release();
  } catch (const std::runtime_error&) {  // the context is gone
    server_->stop();
  }
  // Nothing is left, or the device may still use it.
  memory_.leak();
  submitted_ = nullptr;
  slots_.clear();
}

LayerSlot& GpuHandoff::find(int slot) {
  check_open();
  KTRT_CHECK(slot >= 0 && static_cast<std::size_t>(slot) < slots_.size(),
             "slot is " << slot << ", expected 0 to " << static_cast<int>(slots_.size()) - 1);
  return *slots_[static_cast<std::size_t>(slot)];
}

void GpuHandoff::check_process() const {
  if (getpid() != owner_) {
    throw std::runtime_error("the hand-off belongs to the process that made this one by fork()");
  }
}

// The only way to the mutex: its copy in a fork may be held by a thread that is not there.
std::unique_lock<std::mutex> GpuHandoff::lock_own() {
  check_process();
  return std::unique_lock(mutex_);
}

void GpuHandoff::check_open() const {
  check_process();
  if (closed_) throw std::runtime_error("the hand-off is closed");
}

bool GpuHandoff::is_capturing(CuStream stream) const {
  int status = kCuCaptureNone;
  driver_.check(driver_.api().stream_is_capturing(stream, &status), "cuStreamIsCapturing");
  if (status == kCuCaptureInvalidated) {
    throw std::runtime_error("the stream's capture has been invalidated by an earlier error");
  }
  return status == kCuCaptureActive;
}

}  // namespace ktrt
