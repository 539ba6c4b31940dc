// Which variant of each kernel family runs at an ISA level.
#pragma once

#include "cpu/isa.h"
#include "kernels/kernel_table.h"
#include "kernels/linear_attention_args.h"
#include "kernels/prompt_attention_args.h"

namespace ktrt {

// The best variant of every family that `features` can run at `level` or below. `bf16`: what
// multiplies BF16 where the processor has both, except in GEMMs at the level of AMX, whose few rows
// are bound by the memory.
KernelTable select_kernels(Isa level, const CpuFeatures& features,
                           Bf16Arithmetic bf16 = Bf16Arithmetic::kDot);
// For this machine and the user's settings.
KernelTable active_kernels();
// The same with kernels that give a row its bits in any company, see KernelTable::fixed.
KernelTable fixed(KernelTable table);
// The best variant for layers with a state, whose operators alone need it.
const LinearAttentionKernel& select_linear_attention(Isa level, const CpuFeatures& features);
// The kernel for prompts' attention; null where torch's is as fast.
const PromptAttentionKernel* select_prompt_attention(Isa level, const CpuFeatures& features,
                                                     Bf16Arithmetic bf16);

// The AMX bodies on emulated tiles, for tests and benchmarks on machines without AMX; around the
// tiles is AVX-512 code. Never selected.
const GemmKernel& emulated_amx_gemm(WeightFormat format);
const ShrinkKernel& emulated_amx_shrink();
const GemmKernel& emulated_amx_dense();

}  // namespace ktrt
