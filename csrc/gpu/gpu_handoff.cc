#include "gpu/gpu_handoff.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "base/aligned_buffer.h"
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
constexpr nanoseconds kLongestStep = 100ms;  // longer ones: the process was stopped meanwhile

constexpr std::size_t kArrayAlignment = 256;

TensorView rows(const char* name, DType dtype, std::int64_t count, std::int64_t columns) {
  TensorView view;
  view.name = name;
  view.dtype = dtype;
  view.ndim = 2;
  view.shape = {count, columns};
  view.stride = {columns, 1};
  return view;
}

std::size_t bytes_of(const TensorView& view) {
  return static_cast<std::size_t>(view.shape[0] * view.shape[1]) * size_of(view.dtype);
}

// One after the other, from `memory` on.
void place(std::initializer_list<TensorView*> views, std::byte* memory) {
  for (TensorView* view : views) {
    view->data = memory;
    memory += round_up(bytes_of(*view), kArrayAlignment);
  }
}

std::size_t bytes_of(std::initializer_list<TensorView*> views) {
  std::size_t sum = 0;
  for (const TensorView* view : views) sum += round_up(bytes_of(*view), kArrayAlignment);
  return sum;
}

}  // namespace

GpuHandoff::GpuHandoff(std::shared_ptr<Engine> engine, nanoseconds timeout,
                       const std::string& driver, std::optional<SignalMechanism> mechanism)
    : engine_(std::move(engine)),
      timeout_(timeout),
      owner_(getpid()),
      driver_(driver),
      memory_(driver_) {
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
  const std::lock_guard lock(mutex_);
  return memory_.bytes();
}

int GpuHandoff::add_slot(std::shared_ptr<MoeLayer> layer, int tokens, int top_k, DType dtype,
                         const std::string& name) {
  KTRT_CHECK(layer != nullptr && &layer->engine() == engine_.get(),
             "the layer belongs to another engine than the hand-off");
  KTRT_CHECK(tokens >= 1 && tokens <= engine_->max_qlen(),
             "tokens is " << tokens << ", expected 1 to max_qlen (" << engine_->max_qlen() << ")");
  KTRT_CHECK(
      top_k >= 1 && top_k <= layer->shape().top_k,
      "top_k is " << top_k << ", expected 1 to the layer's (" << layer->shape().top_k << ")");
  const int hidden = layer->shape().hidden_size;
  TensorView hidden_states = rows("hidden_states", dtype, tokens, hidden);
  hidden_states.expect_float();
  TensorView expert_ids = rows("expert_ids", DType::kInt64, tokens, top_k);
  TensorView routing_weights = rows("routing_weights", DType::kFloat32, tokens, top_k);
  TensorView out = rows("out", dtype, tokens, hidden);

  const std::lock_guard lock(mutex_);
  check_open();
  const CurrentContext current(driver_);
  const auto arrays = {&hidden_states, &expert_ids, &routing_weights, &out};
  place(arrays, memory_.shared_buffer(bytes_of(arrays)));
  const PinnedMemory::Word word = memory_.new_word();
  const std::size_t index = slots_.size();
  const std::string text = "slot " + std::to_string(index) + " (" +
                           (name.empty() ? "layer " + std::to_string(number_of(*layer)) : name) +
                           ", " + std::to_string(tokens) + (tokens == 1 ? " token)" : " tokens)");
  std::vector<std::int64_t> ids(static_cast<std::size_t>(tokens * top_k));
  slots_.push_back(std::make_unique<SignalledSlot>(
      SignalledSlot{Slot{text, std::move(layer), hidden_states, expert_ids, routing_weights, out,
                         SlotWord(word.host), word.device, std::move(ids)},
                    server_.get()}));
  server_->add(slots_.back()->slot);
  return static_cast<int>(index);
}

// Layers count in the order in which they got their first slot.
std::size_t GpuHandoff::number_of(const MoeLayer& layer) const {
  std::vector<const MoeLayer*> layers;
  for (const auto& slot : slots_) {
    const MoeLayer* other = slot->slot.layer.get();
    if (std::find(layers.begin(), layers.end(), other) == layers.end()) layers.push_back(other);
  }
  return static_cast<std::size_t>(std::find(layers.begin(), layers.end(), &layer) - layers.begin());
}

void GpuHandoff::submit(int slot, CuStream stream, CuDevicePtr hidden_states,
                        CuDevicePtr expert_ids, CuDevicePtr routing_weights) {
  KTRT_CHECK(hidden_states != 0 && expert_ids != 0 && routing_weights != 0,
             "hidden_states, expert_ids and routing_weights must be device addresses, found a null "
             "pointer");
  const std::lock_guard lock(mutex_);
  SignalledSlot& found = find(slot);
  if (submitted_ != nullptr) {
    throw std::runtime_error(submitted_->slot.name + " was submitted and not waited for; " +
                             found.slot.name + " shares its memory (synchronize forgets it)");
  }
  const CurrentContext current(driver_);
  const bool capturing = is_capturing(stream);
  server_->throw_failure();
  Slot* const expected = &found.slot;
  if (!capturing) server_->expect({&expected, 1});
  try {
    const CudaApi& api = driver_.api();
    const auto copy = [&](const TensorView& to, CuDevicePtr from) {
      driver_.check(api.memcpy_dtoh_async(to.data, from, bytes_of(to), stream),
                    "cuMemcpyDtoHAsync");
    };
    copy(found.slot.hidden_states, hidden_states);
    copy(found.slot.expert_ids, expert_ids);
    copy(found.slot.routing_weights, routing_weights);
    enqueue_start(driver_, mechanism_, found, stream);
  } catch (...) {
    if (!capturing) server_->retract();
    throw;
  }
  submitted_ = &found;
  submitted_in_capture_ = capturing;
}

void GpuHandoff::wait(int slot, CuStream stream, CuDevicePtr out) {
  KTRT_CHECK(out != 0, "out must be a device address, found a null pointer");
  const std::lock_guard lock(mutex_);
  SignalledSlot& found = find(slot);
  if (submitted_ != &found) {
    throw std::runtime_error(found.slot.name + " has not been submitted" +
                             (submitted_ ? "; " + submitted_->slot.name + " has" : ""));
  }
  const CurrentContext current(driver_);
  if (is_capturing(stream) != submitted_in_capture_) {
    throw std::runtime_error(found.slot.name + " was submitted " +
                             (submitted_in_capture_ ? "in" : "outside") +
                             " a capture; the wait must be so too");
  }
  enqueue_wait(driver_, mechanism_, found, stream);
  submitted_ = nullptr;
  driver_.check(
      driver_.api().memcpy_htod_async(out, found.slot.out.data, bytes_of(found.slot.out), stream),
      "cuMemcpyHtoDAsync");
}

void GpuHandoff::expect(const std::vector<int>& slots) {
  const std::lock_guard lock(mutex_);
  check_open();
  std::vector<Slot*> expected;
  for (const int slot : slots) expected.push_back(&find(slot).slot);
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

// What the stream has not waited for, and the failure.
void GpuHandoff::forget() {
  const std::lock_guard lock(mutex_);
  submitted_ = nullptr;
  server_->forget_failure();
}

// False: the stream is still busy although nothing of ours has happened for the timeout; then there
// is a failure.
bool GpuHandoff::drain(CuStream stream, const std::function<void()>& interrupt) {
  std::uint64_t steps = 0;
  nanoseconds idle{0};
  auto last = steady_clock::now();
  auto interrupt_at = last + kInterruptEvery;
  auto busy_until = last + kPollHard;
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
      busy_until = now + kPollHard;
    } else if (now < busy_until) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
    idle = progress.steps == steps ? idle + std::min<nanoseconds>(now - last, kLongestStep)
                                   : nanoseconds(0);
    steps = progress.steps;
    last = now;
    if (idle > timeout_) {
      server_->fail("the stream has not drained and no slot has moved for the timeout", true);
      if (idle > 2 * timeout_) return false;
    }
    if (interrupt && now > interrupt_at) {
      interrupt();
      interrupt_at = now + kInterruptEvery;
    }
  }
}

void GpuHandoff::close() {
  if (getpid() != owner_) return;
  // First, and without the mutex: whoever holds it may wait for the device.
  server_->fail("the hand-off was closed while slots were in use");
  const std::lock_guard lock(mutex_);
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

SignalledSlot& GpuHandoff::find(int slot) {
  check_open();
  KTRT_CHECK(slot >= 0 && static_cast<std::size_t>(slot) < slots_.size(),
             "slot is " << slot << ", expected 0 to " << slots_.size() << " - 1");
  return *slots_[static_cast<std::size_t>(slot)];
}

void GpuHandoff::check_open() const {
  if (closed_) throw std::runtime_error("the hand-off is closed");
  if (getpid() != owner_) {
    throw std::runtime_error("the hand-off belongs to the process that made this one by fork()");
  }
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
