// How fast the machine's memory can be read: the limit that decoding is compared with.
#pragma once

#include <cstddef>

#include "base/aligned_buffer.h"
#include "cpu/thread_pool.h"

namespace ktrt {

class ReadProbe {
 public:
  // Reserves `bytes`; the first run fills them. Throws std::bad_alloc, std::invalid_argument for 0
  // bytes.
  explicit ReadProbe(std::size_t bytes);

  std::size_t bytes() const { return memory_.bytes(); }

  // Reads everything once, each thread a contiguous part; returns seconds, without the filling.
  double run(ThreadPool& pool) const;

 private:
  AlignedBuffer memory_;
};

}  // namespace ktrt
