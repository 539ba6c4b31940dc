// Checks at API edges. KTRT_CHECK is always on and throws std::invalid_argument (Python:
// ValueError).
#pragma once

#include <sstream>
#include <stdexcept>

// KTRT_CHECK(qlen <= max_qlen, "qlen is " << qlen << ", at most " << max_qlen << " expected");
#define KTRT_CHECK(condition, message)                      \
  do {                                                      \
    if (!(condition)) [[unlikely]] {                        \
      std::ostringstream ktrt_check_stream;                 \
      ktrt_check_stream << message;                         \
      throw std::invalid_argument(ktrt_check_stream.str()); \
    }                                                       \
  } while (false)
