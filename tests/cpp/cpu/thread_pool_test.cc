#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "cpu/topology.h"

namespace ktrt {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kManyDispatches = 10'000;
#else
constexpr int kManyDispatches = 100'000;
#endif

// `count` threads on the allowed CPUs in turn.
std::vector<int> cpus_for(int count) {
  const std::vector<int> allowed = allowed_cpus();
  std::vector<int> cpus;
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    cpus.push_back(allowed[i % allowed.size()]);
  }
  return cpus;
}

struct alignas(64) Slot {
  int64_t value = 0;  // not atomic: the pool itself must order the accesses
};

class ThreadPoolTest : public ::testing::TestWithParam<int> {
 protected:
  const int size_ = GetParam();
  // With more threads than CPUs every dispatch goes through the scheduler, at some 50 µs.
  const int dispatches_ = size_ > static_cast<int>(allowed_cpus().size()) ? kManyDispatches / 10
                                                                          : kManyDispatches;
  ThreadPool pool_{cpus_for(size_)};
  std::vector<Slot> slots_ = std::vector<Slot>(static_cast<size_t>(size_));

  int64_t& slot(int index) { return slots_[static_cast<size_t>(index)].value; }
};

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, ::testing::Values(1, 2, 3),
                         ::testing::PrintToStringParamName());

TEST_P(ThreadPoolTest, EveryDispatchRunsOnEveryThreadOnce) {
  EXPECT_EQ(pool_.size(), size_);
  for (int round = 1; round <= dispatches_; ++round) {
    pool_.run([&](int index) { ++slot(index); });
    // Read by the caller without any other synchronisation, and written again by the workers.
    for (int i = 0; i < size_; ++i) ASSERT_EQ(slot(i), round) << "thread " << i;
  }
}

TEST_P(ThreadPoolTest, ThreadZeroIsTheCaller) {
  std::vector<std::thread::id> ids(static_cast<size_t>(size_));
  pool_.run([&](int index) { ids[static_cast<size_t>(index)] = std::this_thread::get_id(); });
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  for (size_t i = 1; i < ids.size(); ++i) EXPECT_NE(ids[i], ids[i - 1]);
}

TEST_P(ThreadPoolTest, BarrierShowsWhatTheOthersWrote) {
  constexpr int kRounds = 200;
  std::vector<int> errors(static_cast<size_t>(size_), 0);
  for (int dispatch = 0; dispatch < dispatches_ / kRounds; ++dispatch) {
    pool_.run([&](int index) {
      for (int round = 0; round < kRounds; ++round) {
        slot(index) = round;
        pool_.barrier();
        for (int i = 0; i < size_; ++i) errors[static_cast<size_t>(index)] += slot(i) != round;
        pool_.barrier();
      }
    });
  }
  for (const int count : errors) EXPECT_EQ(count, 0);
}

TEST_P(ThreadPoolTest, WaitersSleepAndWakeUp) {
  for (int late = 0; late < size_; ++late) {
    pool_.run([&](int index) {
      // Far longer than anyone spins.
      if (index == late) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      slot(index) = late;
      pool_.barrier();
      if (index == late) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    });
    for (int i = 0; i < size_; ++i) EXPECT_EQ(slot(i), late);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the workers park
  }
}

TEST_P(ThreadPoolTest, RunsFromDifferentCallersInTurn) {
  for (int round = 1; round <= 20; ++round) {
    std::thread([&] { pool_.run([&](int index) { ++slot(index); }); }).join();
    for (int i = 0; i < size_; ++i) ASSERT_EQ(slot(i), round);
  }
}

TEST(ThreadPool, MoreThreadsThanCpus) {
  const int size = 4 * static_cast<int>(allowed_cpus().size()) + 1;
  ThreadPool pool(cpus_for(size));
  std::vector<Slot> slots(static_cast<size_t>(size));
  for (int round = 1; round <= 200; ++round) {
    pool.run([&](int index) {
      ++slots[static_cast<size_t>(index)].value;
      pool.barrier();
      ++slots[static_cast<size_t>(index)].value;
    });
    for (const Slot& slot : slots) ASSERT_EQ(slot.value, 2 * round);
  }
}

TEST(ThreadPool, ASleepingPeerCostsNoCpuTime) {
  ThreadPool pool(cpus_for(2));
  const auto cpu_time = [] {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  };
  const auto before = cpu_time();
  pool.run([&](int index) {
    if (index == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    pool.barrier();
  });
  EXPECT_LT(cpu_time() - before, std::chrono::milliseconds(30));
}

TEST(ThreadPool, DestroyedAtAnyMoment) {
  for (int round = 0; round < 300; ++round) {
    ThreadPool pool(cpus_for(3));
    if (round % 3 > 0) pool.run([](int) {});
    // Unused, still spinning, and (now and then) parked.
    if (round % 30 == 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(ThreadPool, WorkersAreNamedPinnedAndDeafToSignals) {
  const std::vector<int> allowed = allowed_cpus();
  const int cpu = allowed.back();
  ThreadPool pool({allowed.front(), cpu});
  std::string name;
  std::vector<int> pinned_to;
  sigset_t blocked;
  pool.run([&](int index) {
    if (index != 1) return;
    char buffer[16];
    pthread_getname_np(pthread_self(), buffer, sizeof buffer);
    name = buffer;
    pinned_to = allowed_cpus();
    pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
  });
  EXPECT_EQ(name, "ktrt-1");
  EXPECT_EQ(pinned_to, std::vector<int>{cpu});
  EXPECT_EQ(sigismember(&blocked, SIGINT), 1);
  EXPECT_EQ(sigismember(&blocked, SIGTERM), 1);
  EXPECT_EQ(allowed_cpus(), allowed) << "the caller must keep its affinity";
  sigset_t of_caller;
  pthread_sigmask(SIG_BLOCK, nullptr, &of_caller);
  EXPECT_EQ(sigismember(&of_caller, SIGINT), 0) << "the caller must keep its signal mask";
}

TEST(ThreadPool, AnUnavailableCpuIsNoError) {
  ThreadPool pool({-1, -1, 1 << 16});
  std::atomic<int> calls{0};
  pool.run([&](int) { ++calls; });
  EXPECT_EQ(calls, 3);
}

TEST(ThreadPool, NeedsACpu) { EXPECT_THROW(ThreadPool(std::vector<int>{}), std::invalid_argument); }

#ifndef __SANITIZE_THREAD__  // which does not follow a fork of a threaded process
TEST(ThreadPool, DestructionInAForkedChildReturns) {
  auto* pool = new ThreadPool(cpus_for(3));
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    delete pool;
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  delete pool;
}
#endif

}  // namespace
}  // namespace ktrt
