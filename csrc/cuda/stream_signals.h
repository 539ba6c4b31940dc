// How a stream starts a slot and waits for it.
#pragma once

#include <optional>
#include <string>

#include "cuda/cuda_driver.h"
#include "cuda/pinned_memory.h"
#include "cuda/slot.h"
#include "cuda/slot_server.h"

namespace ktrt {

enum class SignalMechanism {
  kStreamMemoryOps,  // the device itself writes and polls the slot's word
  kHostFunctions,    // a thread of the driver does so: slower, but every driver has them
};

const char* name_of(SignalMechanism mechanism);

// Throws std::invalid_argument for an unknown name; "auto" gives nothing.
std::optional<SignalMechanism> parse_mechanism(const std::string& name);

// Whether this driver and device run stream memory operations on `word`, and capture them. Uses a
// separate stream; the context must be current.
bool stream_memory_ops_work(const CudaDriver& driver, const PinnedMemory::Word& word);

// A slot as the device's side needs it, and what host functions are given. Must stay where it is as
// long as anything enqueued, or a graph that captured it, may run.
struct SignalledSlot {
  Slot slot;
  CuDevicePtr word_address;
  SlotServer* server;
};

// Enqueue, after the work that the stream has already. Throw std::runtime_error.
void enqueue_start(const CudaDriver& driver, SignalMechanism mechanism, SignalledSlot& slot,
                   CuStream stream);
void enqueue_wait(const CudaDriver& driver, SignalMechanism mechanism, SignalledSlot& slot,
                  CuStream stream);

}  // namespace ktrt
