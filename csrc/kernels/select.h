// Which variant of each kernel family runs at an ISA level.
#pragma once

#include "cpu/isa.h"
#include "kernels/kernel_table.h"

namespace ktrt {

// The best variant of every family that `features` can run at `level` or below.
KernelTable select_kernels(Isa level, const CpuFeatures& features);

}  // namespace ktrt
