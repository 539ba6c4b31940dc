// The LoRA expands of jobs: what a GEMM adds itself, and what is added to its C run by run.
#pragma once

#include <cstdint>

#include "moe/job_rows.h"

namespace ktrt {

// `t`: the shrunk rows of the job.
class Expands {
 public:
  Expands(const ForwardTask& task, const JobRows& rows) : task_(task), rows_(rows) {}

  // Lets the GEMM of one strip add the first LoRA of a job whose rows all have the same.
  void fuse(GemmArgs& args, const Job& job, Projection projection, int strip,
            const std::uint16_t* t) const;
  // Before the GEMM: B of a strip lies in as many places as there are LoRAs.
  void prefetch(const Job& job, Projection projection, int strip) const;
  // After it: adds the LoRAs that fuse() has left, while C is in the L1 cache.
  void add(const Job& job, Projection projection, int strip, const std::uint16_t* t,
           float* c) const;

 private:
  template <class Visit>
  void for_each_left(const Job& job, Projection projection, const Visit& visit) const;
  std::int64_t t_stride(Projection projection) const;

  const ForwardTask& task_;
  const JobRows& rows_;
};

}  // namespace ktrt
