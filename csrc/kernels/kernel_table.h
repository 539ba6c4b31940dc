// The watershed: below it are single-threaded kernels compiled once per instruction set, above it
// plain code that calls them through these pointers. The kernels' own files include this header, so
// it holds nothing but plain data.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/activation.h"

namespace ktrt {

// C [rows][32] = A [rows][k] · Wᵀ for one strip of 32 rows of a packed W (layout/packed_layout.h),
// then += T [rows][rank] · Lᵀ, the LoRA expand, while C is in registers.
struct GemmArgs {
  // Activations: BF16 [rows][k], or INT8 codes plus the kernel's activation_offset. k is padded as
  // in the layout; A's padding may hold anything finite, since W's is zero.
  const uint8_t* a;
  int64_t a_stride;      // bytes
  const float* a_scale;  // [rows]; null for BF16
  int rows;

  const uint8_t* w_block;  // the n-block that holds the strip
  int block_rows;          // rows of that n-block
  int row_in_block;        // first row of the strip in it
  int k;                   // padded
  const float* w_scale;    // [32] of this strip; null for BF16
  const int32_t* w_sum;  // [32] of this strip: Σ_k of its codes (INT4: of 16 · code); null for BF16
  const uint8_t* next;  // what is read after this strip, to prefetch; may be null

  // BF16 [rank_pairs][2 halves][16 rows][2]; null without LoRA.
  const uint16_t* lora_b;
  const uint16_t* t;  // BF16 [rows][2·rank_pairs]
  int64_t t_stride;   // elements
  int rank_pairs;

  float* c;  // [rows][32]
};

struct GemmKernel {
  const char* name;
  void (*strip)(const GemmArgs& args);
  uint8_t activation_offset;  // what quantize_rows adds to each code: 128 where A is unsigned
};

// T [rows][16·blocks] = X [rows][k] · Aᵀ, rounded to BF16: the LoRA shrink. A is packed in blocks
// of 16 ranks, BF16 [blocks][k/2][16][2].
struct ShrinkArgs {
  const uint16_t* x;
  int64_t x_stride;  // elements
  int rows;
  const uint16_t* a;
  int blocks;
  int k;  // a multiple of 32
  uint16_t* t;
  int64_t t_stride;  // elements
};

struct ShrinkKernel {
  const char* name;
  void (*run)(const ShrinkArgs& args);
};

// BF16 row to INT8 codes as kt_kernel does it: scale = max|x| · float32(1/127), code =
// round_half_even(x / scale) + offset. `count` values are read, `padded` codes written (padding =
// offset). Returns the scale.
struct ElementwiseKernels {
  const char* name;
  float (*quantize_row)(const uint16_t* x, int count, int padded, uint8_t offset, uint8_t* codes);
  // float32 → BF16, round to nearest even.
  void (*f32_to_bf16)(const float* in, int count, uint16_t* out);
  // out[r][0..31] = bf16(silu(gate[r]) · up[r]); gate, up [rows][32], out_stride in elements.
  void (*silu_mul)(const float* gate, const float* up, int rows, uint16_t* out, int64_t out_stride);
  // acc[0..31] += weight · c[0..31].
  void (*weighted_add)(const float* c, float weight, float* acc);
  // silu_mul with any activation; gate null: experts without gate.
  void (*activate)(const Activation& activation, const float* gate, const float* up, int rows,
                   uint16_t* out, int64_t out_stride);
  // c[r][0..31] += bias[0..31]; c [rows][32].
  void (*add_bias)(const float* bias, int rows, float* c);
};

// AMX tiles pay off from some number of rows on; below it, and without AMX, `few` runs.
struct GemmChoice {
  const GemmKernel* few;
  const GemmKernel* many;  // the same kernel without AMX
  int many_from;           // rows

  const GemmKernel& for_rows(int rows) const { return rows < many_from ? *few : *many; }
};

// What runs for each kernel family.
struct KernelTable {
  GemmChoice gemm_bf16;
  GemmChoice gemm_int8;
  GemmChoice gemm_int4;
  const ShrinkKernel* lora_shrink;
  const ElementwiseKernels* elementwise;
};

}  // namespace ktrt
