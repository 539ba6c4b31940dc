#include "moe/engine.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/check.h"
#include "kernels/select.h"
#include "moe/moe_layer.h"

namespace ktrt {

namespace {

int max_job_rows(const KernelTable& kernels) {
  return kernels.gemm_bf16.many->tile_order ? kMaxTileJobRows : kMaxJobRows;
}

int count_parts(const std::vector<int>& home, std::size_t threads) {
  KTRT_CHECK(home.size() == threads && threads > 0, "home names the parts of "
                                                        << home.size() << " threads, expected "
                                                        << threads << ", at least 1");
  const auto [lowest, highest] = std::minmax_element(home.begin(), home.end());
  KTRT_CHECK(*lowest >= 0, "home names part " << *lowest << ", expected at least 0");
  const int parts = *highest + 1;
  for (int part = 0; part < parts; ++part) {
    KTRT_CHECK(std::find(home.begin(), home.end(), part) != home.end(),
               "no thread has part " << part << " of the weights as its own");
  }
  return parts;
}

}  // namespace

Engine::Engine(const std::vector<int>& cpus, const std::vector<int>& home, int max_qlen)
    : Engine(cpus, home, max_qlen, active_isa(), select_kernels(active_isa(), cpu_features())) {}

Engine::Engine(const std::vector<int>& cpus, const std::vector<int>& home, int max_qlen, Isa isa,
               const KernelTable& kernels)
    : isa_(isa),
      kernels_(kernels),
      num_threads_(static_cast<int>(cpus.size())),
      caller_cpu_(cpus.empty() ? -1 : cpus.front()),
      home_(home),
      parts_(count_parts(home, cpus.size())),
      process_(getpid()),
      workspace_(num_threads_, max_qlen, max_job_rows(kernels)) {
  pool_.emplace(cpus);
}

bool Engine::closed() const {
  if (forked()) return true;
  const auto held = lock();
  return !pool_.has_value();
}

std::size_t Engine::workspace_bytes() const {
  const auto held = lock();
  return workspace_.bytes() + scratch_.bytes();
}

double Engine::run_probe(const ReadProbe& probe) {
  const auto lock = lock_open();
  return probe.run(*pool_);
}

void Engine::close() {
  if (forked()) return;
  const auto held = lock();
  pool_.reset();
  workspace_.release();
  scratch_.reset();
  for (MoeLayer* layer : layers_) layer->release();
}

bool Engine::forked() const { return getpid() != process_; }

std::unique_lock<std::mutex> Engine::lock() const {
  if (forked()) {
    throw std::runtime_error(
        "the engine was created by process " + std::to_string(process_) +
        " and its threads do not exist in this fork of it; create an engine here, or start "
        "processes with the method \"spawn\"");
  }
  return std::unique_lock(mutex_);
}

std::unique_lock<std::mutex> Engine::lock_open() {
  auto held = lock();
  if (!pool_.has_value()) throw std::runtime_error("the engine is closed");
  return held;
}

std::byte* Engine::scratch(std::size_t bytes) {
  if (scratch_.bytes() < bytes) scratch_ = AlignedBuffer(std::max(bytes, 2 * scratch_.bytes()));
  return scratch_.as<std::byte>();
}

}  // namespace ktrt
