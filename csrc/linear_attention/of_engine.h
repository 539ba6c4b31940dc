// The engine of this folder's operators: its kernels.
#pragma once

#include "base/check.h"
#include "cpu/isa.h"
#include "engine/engine.h"
#include "kernels/select.h"

namespace ktrt {

// The kernels of an engine's instruction set. Throws std::invalid_argument without an engine.
inline const LinearAttentionKernel& kernel_of(const Engine* engine) {
  KTRT_CHECK(engine != nullptr, "engine is missing");
  return select_linear_attention(engine->isa(), cpu_features());
}

}  // namespace ktrt
