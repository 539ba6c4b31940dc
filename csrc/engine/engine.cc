#include "engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/check.h"
#include "kernels/select.h"

namespace ktrt {

namespace {

int check_max_qlen(int max_qlen) {
  KTRT_CHECK(max_qlen >= 1, "max_qlen is " << max_qlen << ", expected at least 1");
  return max_qlen;
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

Engine::Engine(const std::vector<int>& cpus, const std::vector<int>& home, int max_qlen,
               bool fixed_kernels)
    : Engine(cpus, home, max_qlen, active_isa(),
             fixed_kernels ? fixed(active_kernels()) : active_kernels()) {}

Engine::Engine(const std::vector<int>& cpus, const std::vector<int>& home, int max_qlen, Isa isa,
               const KernelTable& kernels)
    : isa_(isa),
      kernels_(kernels),
      num_threads_(static_cast<int>(cpus.size())),
      max_qlen_(check_max_qlen(max_qlen)),
      caller_cpu_(cpus.empty() ? -1 : cpus.front()),
      home_(home),
      parts_(count_parts(home, cpus.size())),
      process_(getpid()),
      scratch_(num_threads_) {
  pool_.emplace(cpus);
}

bool Engine::closed() const {
  if (forked()) return true;
  const auto held = lock();
  return !pool_.has_value();
}

std::size_t Engine::workspace_bytes() const {
  const auto held = lock();
  return scratch_.bytes();
}

double Engine::run_probe(const ReadProbe& probe) { return probe.run(lease().pool()); }

void Engine::close() {
  if (forked()) return;
  const auto held = lock();
  pool_.reset();
  scratch_.release();
  for (const CloseHandler* handler : close_handlers_) handler->release();
  close_handlers_.clear();
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

Engine::Lease Engine::lease() {
  auto held = lock();
  if (!pool_.has_value()) throw std::runtime_error("the engine is closed");
  return {*this, std::move(held)};
}

Engine::CloseHandler::CloseHandler(Engine& engine, const Lease&, std::function<void()> release)
    : engine_(engine), release_(std::move(release)) {
  engine_.close_handlers_.insert(this);
}

Engine::CloseHandler::~CloseHandler() {
  if (engine_.forked()) return;
  const auto held = engine_.lock();
  engine_.close_handlers_.erase(this);
}

}  // namespace ktrt
