#include "cuda/slot_server.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace ktrt {
namespace {

using namespace std::chrono_literals;
using std::chrono::steady_clock;

constexpr auto kPatience = 20s;  // for what must happen at all

// Slots whose words lie in ordinary memory, and the stream's side of them.
class SlotServerTest : public ::testing::Test {
 protected:
  struct Line {
    alignas(64) std::uint32_t word = 0;
  };

  Slot& add(std::function<void()> forward) {
    lines_.push_back(std::make_unique<Line>());
    const std::string name = "slot " + std::to_string(slots_.size());
    slots_.push_back(
        std::make_unique<Slot>(Slot{name, std::move(forward), SlotWord(&lines_.back()->word)}));
    server().add(*slots_.back());
    return *slots_.back();
  }
  SlotServer& server() {
    if (!server_) server_ = std::make_unique<SlotServer>(-1, timeout_, announce_all_);
    return *server_;
  }
  void expect(std::vector<Slot*> slots) { server().expect(slots); }

  static void start(Slot& slot) { slot.word.set(SlotState::kStarted); }
  static bool done(const Slot& slot, std::chrono::nanoseconds patience = kPatience) {
    const auto deadline = steady_clock::now() + patience;
    while (slot.word.state() != SlotState::kDone) {
      if (steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  std::string failure() {
    try {
      server().throw_failure();
    } catch (const HandoffTimeout& error) {
      return std::string("timeout: ") + error.what();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }
  // Once there is one.
  std::string awaited_failure() {
    const auto deadline = steady_clock::now() + kPatience;
    while (failure().empty() && steady_clock::now() < deadline) std::this_thread::yield();
    return failure();
  }

  std::chrono::nanoseconds timeout_ = 30s;
  bool announce_all_ = false;
  std::vector<std::unique_ptr<Line>> lines_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::unique_ptr<SlotServer> server_;  // stops first
};

TEST_F(SlotServerTest, RunsWhatStartsInOrder) {
  std::vector<int> ran;  // ordered by the words alone
  std::vector<Slot*> slots;
  for (int i = 0; i < 3; ++i) slots.push_back(&add([&ran, i] { ran.push_back(i); }));
  for (int round = 0; round < 500; ++round) {
    expect(slots);
    for (int i = 0; i < 3; ++i) {
      start(*slots[static_cast<std::size_t>(i)]);
      ASSERT_TRUE(done(*slots[static_cast<std::size_t>(i)]));
      ASSERT_EQ(ran.size(), static_cast<std::size_t>(3 * round + i + 1));
      ASSERT_EQ(ran.back(), i);
    }
  }
  const auto progress = server().wait(kPatience);
  EXPECT_FALSE(progress.pending);
  EXPECT_EQ(progress.steps, 3000u);
  EXPECT_EQ(failure(), "");
}

TEST_F(SlotServerTest, SeveralRoundsMayBeExpectedAtOnce) {
  int ran = 0;
  Slot& slot = add([&] { ++ran; });
  expect({&slot, &slot});
  expect({&slot});
  for (int i = 1; i <= 3; ++i) {
    start(slot);
    ASSERT_TRUE(done(slot));
    ASSERT_EQ(ran, i);
  }
}

TEST_F(SlotServerTest, AfterAFailureStartsAreAnsweredWithoutAForward) {
  std::atomic<int> ran{0};
  bool broken = true;
  Slot& first = add([&] {
    if (broken) throw std::invalid_argument("expert 3 has not been loaded");
    ++ran;
  });
  Slot& second = add([&] { ++ran; });
  for (int round = 0; round < 5; ++round) {
    expect({&first, &second});
    for (Slot* slot : {&first, &second}) {
      start(*slot);
      ASSERT_TRUE(done(*slot));
    }
    EXPECT_EQ(ran, 0);
    const auto progress = server().wait(0s);
    EXPECT_FALSE(progress.pending);
    EXPECT_FALSE(progress.running);
    EXPECT_EQ(failure(), "slot 0: expert 3 has not been loaded");
    EXPECT_THROW(expect({&second}), std::runtime_error);
    server().forget_failure();
    EXPECT_EQ(failure(), "");
  }
  broken = false;
  expect({&first, &second});
  for (Slot* slot : {&first, &second}) {
    start(*slot);
    ASSERT_TRUE(done(*slot));
  }
  EXPECT_EQ(ran, 2);
}

TEST_F(SlotServerTest, AnythingMayBeThrown) {
  Slot& slot = add([] { throw 7; });
  expect({&slot});
  start(slot);
  ASSERT_TRUE(done(slot));
  EXPECT_EQ(failure(), "slot 0: unknown exception");
}

TEST_F(SlotServerTest, AForwardThatTakesTooLongIsGivenUp) {
  timeout_ = 100ms;
  std::promise<void> gate;
  std::shared_future<void> opened = gate.get_future().share();
  std::atomic<int> ran{0};
  Slot& slow = add([&] {
    opened.wait();
    ++ran;
    throw std::runtime_error("too late to matter");
  });
  Slot& next = add([&] { ++ran; });
  expect({&slow, &next});
  start(slow);
  ASSERT_TRUE(done(slow));
  start(next);
  ASSERT_TRUE(done(next));
  EXPECT_EQ(failure(), "timeout: slot 0: the forward has not ended after 0.1 s");
  server().forget_failure();
  EXPECT_FALSE(server().wait(0s).pending);
  EXPECT_THROW(expect({&next}), HandoffTimeout) << "its arrays may still be in use";
  EXPECT_EQ(ran, 0);
  gate.set_value();
  expect({&next});
  start(next);
  ASSERT_TRUE(done(next));
  EXPECT_EQ(ran, 2);
  EXPECT_EQ(failure(), "");
}

TEST_F(SlotServerTest, TheLateEndOfAForwardDoesNotAnswerANewStart) {
  timeout_ = 100ms;
  std::promise<void> gate;
  std::shared_future<void> opened = gate.get_future().share();
  Slot& slot = add([&] { opened.wait(); });
  expect({&slot});
  start(slot);
  ASSERT_TRUE(done(slot));
  ASSERT_TRUE(failure().starts_with("timeout"));
  server().forget_failure();
  // The same slot again, although nothing expects it: the forward that ends must leave it alone.
  start(slot);
  gate.set_value();
  ASSERT_TRUE(done(slot));
  EXPECT_EQ(awaited_failure(), "slot 0 started, but nothing was expected");
}

TEST_F(SlotServerTest, AStartThatNothingExpectsIsAnswered) {
  std::atomic<int> ran{0};
  Slot& first = add([&] { ++ran; });
  Slot& second = add([&] { ++ran; });
  start(second);
  ASSERT_TRUE(done(second));
  EXPECT_EQ(failure(), "slot 1 started, but nothing was expected");
  server().forget_failure();
  expect({&first, &second});
  start(second);
  ASSERT_TRUE(done(second));
  EXPECT_EQ(failure(), "slot 1 started, but slot 0 was expected");
  EXPECT_EQ(ran, 0);
}

TEST_F(SlotServerTest, WhatIsExpectedMustStart) {
  Slot& slot = add([] {});
  server().fail_if_not_started();
  EXPECT_EQ(failure(), "");
  expect({&slot});
  server().fail_if_not_started();
  EXPECT_EQ(failure(), "slot 0 was expected, but nothing on the stream started it");
  server().forget_failure();
  expect({&slot});
  server().retract();
  server().fail_if_not_started();
  EXPECT_EQ(failure(), "");
}

TEST_F(SlotServerTest, AFailureThatIsDeclaredReleasesAForwardThatRuns) {
  std::promise<void> gate;
  std::promise<void> running;
  Slot& slot = add([&] {
    running.set_value();
    gate.get_future().wait();
  });
  expect({&slot});
  start(slot);
  running.get_future().wait();
  EXPECT_TRUE(server().wait(0s).pending);
  server().fail("Ctrl-C");
  server().fail("the first one counts");
  EXPECT_EQ(slot.word.state(), SlotState::kDone);
  EXPECT_EQ(failure(), "Ctrl-C");
  gate.set_value();
}

TEST_F(SlotServerTest, FailuresAtAnyMomentLeaveNobodyWaiting) {
  std::atomic<int> ran{0};
  std::vector<Slot*> slots;
  for (int i = 0; i < 3; ++i) slots.push_back(&add([&] { ++ran; }));
  std::atomic<bool> stop{false};
  std::thread saboteur([&] {
    while (!stop) {
      std::this_thread::sleep_for(50us);
      server().fail("sabotage");
    }
  });
  for (int round = 0; round < 300; ++round) {
    try {
      expect(slots);
    } catch (const std::runtime_error&) {
      server().forget_failure();
    }
    for (Slot* slot : slots) {
      start(*slot);
      ASSERT_TRUE(done(*slot)) << round;
    }
  }
  stop = true;
  saboteur.join();
}

TEST_F(SlotServerTest, StopsWithWorkLeft) {
  std::atomic<int> ran{0};
  Slot& slot = add([&] {
    std::this_thread::sleep_for(5ms);
    ++ran;
  });
  expect({&slot, &slot});
  start(slot);
  while (slot.word.state() == SlotState::kStarted) std::this_thread::yield();
  server().stop();
  server().stop();
  EXPECT_EQ(ran, 1);
  server().fail("afterwards");
  EXPECT_FALSE(server().wait(0s).pending);
}

TEST_F(SlotServerTest, WaitDoneReturnsWhenTheForwardHasEndedOrFailed) {
  announce_all_ = true;
  std::atomic<int> ran{0};
  Slot& slow = add([&] {
    std::this_thread::sleep_for(3ms);
    ++ran;
  });
  Slot& broken = add([] { throw std::runtime_error("broken"); });
  expect({&slow, &slow, &broken, &slow});
  for (int i = 1; i <= 2; ++i) {
    start(slow);
    server().wait_done(slow);
    EXPECT_EQ(ran, i);
  }
  for (Slot* slot : {&broken, &slow}) {
    start(*slot);
    server().wait_done(*slot);
  }
  EXPECT_EQ(ran, 2);
}

double processor_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

TEST_F(SlotServerTest, LeavesTheProcessorAloneWhileNothingHappens) {
  int ran = 0;
  Slot& slot = add([&] { ++ran; });
  const auto share_of = [](std::chrono::milliseconds time) {
    const double before = processor_seconds();
    std::this_thread::sleep_for(time);
    return (processor_seconds() - before) / std::chrono::duration<double>(time).count();
  };
  EXPECT_LT(share_of(300ms), 0.1) << "nothing is expected";
  expect({&slot});
  share_of(100ms);
  EXPECT_LT(share_of(300ms), 0.5) << "what is expected does not start";
  start(slot);
  EXPECT_TRUE(done(slot));
  EXPECT_EQ(ran, 1);
}

}  // namespace
}  // namespace ktrt
