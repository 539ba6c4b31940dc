// Scratch memory of a forward, sized before the first one and shared by the layers of an engine.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "moe/expert_weights.h"

namespace ktrt {

// Token rows of one job. 128 rows of hidden size 2048 in BF16 are 0.5 MB, which stays in an L2
// cache of 1 MB beside the strips of gate and up that are multiplied with it.
inline constexpr int kMaxJobRows = 128;
// The same for AMX, whose tiles want more rows for every byte of weights and whose machines have L2
// caches of 2 MB: about 256, and what chance adds to that, or half of all jobs would be cut in two.
inline constexpr int kMaxTileJobRows = 320;
// Rows of jobs with few rows whose shrunk inputs are shared by all threads in one forward.
inline constexpr int kSharedInputRows = 1024;
// Values after a shrunk row's ranks, which kernels in tile order read and which are finite.
inline constexpr int kShrunkPadding = 32;
// float32 sums of one thread's output columns in the down phase.
inline constexpr std::size_t kOutputBlockBytes = std::size_t{4} << 20;

// Bytes of a scratch row of `bytes`: a multiple of 64 that is not a multiple of 4096, or the rows
// of a register block would share one set of the L1 cache.
constexpr std::size_t scratch_stride(std::size_t bytes) {
  const std::size_t aligned = round_up(bytes, kCacheLine);
  return aligned % 4096 == 0 ? aligned + kCacheLine : aligned;
}

class Workspace {
 public:
  // Private to one thread, for one job at a time.
  struct Thread {
    std::uint16_t* x = nullptr;          // gathered rows, BF16
    std::uint8_t* codes = nullptr;       // the same, INT8
    float* scales = nullptr;             // [rows] of codes
    std::uint16_t* t = nullptr;          // shrunk rows for gate and up
    float* c = nullptr;                  // [rows][32]
    float* c_up = nullptr;               // [rows][32]
    std::uint16_t* tile_x = nullptr;     // [16] rows on their way into tile order, BF16
    std::uint8_t* tile_codes = nullptr;  // the same, INT8
    float* out = nullptr;                // [qlen][columns of a strip group]
  };

  // Shared by all threads: one row per plan row.
  struct Shared {
    std::uint16_t* act = nullptr;  // BF16 intermediate activations
    std::uint8_t* codes = nullptr;
    float* scales = nullptr;           // [slices of down][rows] of codes
    std::uint16_t* t = nullptr;        // shrunk rows for down
    std::uint16_t* t_input = nullptr;  // [kSharedInputRows] for gate and up
  };

  Workspace(int num_threads, int max_qlen, int max_job_rows = kMaxJobRows);

  // Grows the scratch memory to what a layer of this shape needs.
  void reserve(const MoeShape& shape);
  void release();

  int max_qlen() const { return max_qlen_; }
  int max_job_rows() const { return max_job_rows_; }
  std::size_t bytes() const;
  const Thread& thread(int index) const { return threads_[static_cast<std::size_t>(index)]; }
  const Shared& shared() const { return shared_; }

  // `count` zeroed counters.
  std::atomic<int>* job_counters(std::size_t count);

 private:
  const int max_qlen_;
  const int max_job_rows_;
  std::size_t x_row_ = 0;    // bytes of the largest hidden row
  std::size_t act_row_ = 0;  // bytes of the largest intermediate row
  std::size_t plan_rows_ = 0;
  std::vector<Thread> threads_;
  Shared shared_;
  std::vector<AlignedBuffer> thread_memory_;
  AlignedBuffer shared_memory_;
  std::unique_ptr<std::atomic<int>[]> counters_;
  std::size_t counter_capacity_ = 0;
};

}  // namespace ktrt
