// Costs of a dispatch and of a barrier of the thread pool, with spinning and with sleeping workers.

#include <benchmark/benchmark.h>

#include <chrono>
#include <thread>

#include "cpu/thread_pool.h"
#include "cpu/topology.h"

namespace ktrt {
namespace {

std::vector<int> cpus_for(int64_t threads) {
  std::vector<int> cpus = read_topology(allowed_cpus()).cpu_ids();
  if (static_cast<size_t>(threads) < cpus.size()) cpus.resize(static_cast<size_t>(threads));
  return cpus;
}

// 1, 2, 4 … and all allowed CPUs.
void thread_counts(benchmark::internal::Benchmark* bench) {
  const auto all = static_cast<int64_t>(allowed_cpus().size());
  for (int64_t threads = 1; threads < all; threads *= 2) bench->Arg(threads);
  bench->Arg(all)->ArgName("threads");
}

void dispatch(benchmark::State& state) {
  ThreadPool pool(cpus_for(state.range(0)));
  for (auto _ : state) pool.run([](int) {});
}
BENCHMARK(dispatch)->Apply(thread_counts)->UseRealTime();

// A layer's shape: one dispatch with one barrier inside.
void dispatch_and_barrier(benchmark::State& state) {
  ThreadPool pool(cpus_for(state.range(0)));
  for (auto _ : state) pool.run([&](int) { pool.barrier(); });
}
BENCHMARK(dispatch_and_barrier)->Apply(thread_counts)->UseRealTime();

// The first dispatch after a pause in which the workers went to sleep.
void dispatch_to_sleepers(benchmark::State& state) {
  ThreadPool pool(cpus_for(state.range(0)));
  for (auto _ : state) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const auto start = std::chrono::steady_clock::now();
    pool.run([](int) {});
    state.SetIterationTime(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
}
BENCHMARK(dispatch_to_sleepers)->Apply(thread_counts)->UseManualTime()->Iterations(200);

}  // namespace
}  // namespace ktrt
