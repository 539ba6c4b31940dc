// Which of two instructions AVX-512 multiplies BF16 with: both have a GEMM, and their last bits
// differ. On an Emerald Rapids VDPBF16PS does 82 GFLOP/s a thread and float32 multiply-adds 167, on
// a Zen 4 it is the other way round.
#pragma once

#include "cpu/isa.h"

namespace ktrt {

// The faster one on this machine: measured at the first call, in half a millisecond.
Bf16Arithmetic faster_bf16_arithmetic();

// The same, or what KTRT_BF16 asks for.
Bf16Arithmetic active_bf16_arithmetic();

}  // namespace ktrt
