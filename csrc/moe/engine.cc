#include "moe/engine.h"

#include <stdexcept>

#include "kernels/select.h"
#include "moe/moe_layer.h"

namespace ktrt {

Engine::Engine(const std::vector<int>& cpus, int max_qlen)
    : isa_(active_isa()),
      kernels_(select_kernels(isa_, cpu_features())),
      num_threads_(static_cast<int>(cpus.size())),
      workspace_(num_threads_, max_qlen) {
  pool_.emplace(cpus);
}

bool Engine::closed() const {
  const std::lock_guard lock(mutex_);
  return !pool_.has_value();
}

double Engine::run_probe(const ReadProbe& probe) {
  const auto lock = lock_open();
  return probe.run(*pool_);
}

void Engine::close() {
  const std::lock_guard lock(mutex_);
  pool_.reset();
  workspace_.release();
  for (MoeLayer* layer : layers_) layer->release();
}

std::unique_lock<std::mutex> Engine::lock_open() {
  std::unique_lock lock(mutex_);
  if (!pool_.has_value()) throw std::runtime_error("the engine is closed");
  return lock;
}

}  // namespace ktrt
