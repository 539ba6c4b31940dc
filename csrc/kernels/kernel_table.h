// The watershed: below it are single-threaded kernels compiled once per instruction set, above it
// plain code that calls them through these pointers. The kernels' own files include this header, so
// it holds nothing but plain data.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/activation.h"
#include "kernels/attention_args.h"
#include "layout/weight_format.h"

namespace ktrt {

// Rows of one AMX tile, at most.
constexpr int kMaxTileRows = 16;

// C [rows][32] += T [rows][rank] · Lᵀ for one strip of a LoRA's B.
struct ExpandArgs {
  int rows;
  // BF16 [rank_pairs][2 halves][16 rows][2]; in GemmArgs null without LoRA.
  const uint16_t* lora_b;
  // BF16 [rows][2·rank_pairs]. Kernels in tile order read pieces of 32 values, in GemmArgs of whole
  // tiles of rows: the values after a row's ranks must be finite.
  const uint16_t* t;
  int64_t t_stride;  // elements
  int rank_pairs;
  float* c;  // [rows][32]
};

// C [rows][32] = A [rows][k] · Wᵀ for one strip of 32 rows of a packed W (layout/packed_layout.h),
// then += T [rows][rank] · Lᵀ, the LoRA expand, while C is in registers.
struct GemmArgs : ExpandArgs {
  // Activations: BF16 [rows][k], or INT8 codes plus the kernel's activation_offset. k is padded as
  // in the layout; A's padding may hold anything finite, since W's is zero.
  //
  // Row-major, or in tile order where the kernel asks for it: 64 bytes of each of the first
  // tile_rows rows, the next 64 bytes of each of them, and so on; a_stride bytes later the next
  // tile_rows rows. Memory of A and C then holds whole tiles; A's missing rows are not
  // seen, C's are overwritten.
  const uint8_t* a;
  int64_t a_stride;      // bytes of a row, or of tile_rows rows
  int tile_rows;         // GemmKernel::tile_rows(rows); 1 is row-major
  const float* a_scale;  // [rows]; null for BF16 rows

  // The n-block that holds the strip; of coded formats (layout/coded.h) the strip's first tile.
  const uint8_t* w_block;
  int block_rows;    // rows of that n-block
  int row_in_block;  // first row of the strip in it
  int k;             // padded
  // [32] of this strip; FP8 in blocks: one for 128 columns each. Null for none outside of the
  // tiles.
  const float* w_scale;
  const int32_t* w_sum;  // [32] of this strip: Σ_k of its codes (INT4: of 16 · code); null for BF16
  const uint8_t* next;  // read after this strip: to be prefetched; may be null
  bool cold_rows;       // A may come from memory: worth prefetching
};

// How many strips of `rows` rows each GemmKernel::side_by_side takes: their sums are registers.
constexpr int side_strips(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
constexpr int kMaxSideStrips = 8;
constexpr int kMaxSideRows = 5;
constexpr int kMaxSideSums = 12;  // rows of C: of four strips of three

struct GemmKernel {
  const char* name;
  void (*strip)(const GemmArgs& args);
  // The LoRA expand by itself, for rows whose C is in the L1 cache. strip() without LoRA and then
  // this give the bits of strip() with it, but for tiles that are not `fixed`.
  void (*expand)(const ExpandArgs& args);
  uint8_t activation_offset;  // added to each code by quantize_row: 128 where A is unsigned
  bool tile_order = false;    // of A
  // The same bits for `count` strips of as many rows each, all of one k, read side by side: a core
  // gets more out of the memory from several streams than from one. Null: strip by strip.
  void (*side_by_side)(const GemmArgs* strips, int count) = nullptr;
  int side_rows = 0;  // it takes strips of up to this many rows
  // For tiles: the variant of KernelTable::fixed.
  const GemmKernel* fixed = nullptr;

  // As few tiles as possible, evenly filled: a tile of r rows takes r cycles.
  int tile_rows(int rows) const {
    if (!tile_order) return 1;
    const int tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
    return (rows + tiles - 1) / tiles;
  }
};

// T [rows][16·blocks] = X [rows][k] · Aᵀ, rounded to BF16: the LoRA shrink. A is packed in blocks
// of 16 ranks, BF16 [blocks][k/2][16][2].
struct ShrinkArgs {
  const uint16_t* x;
  int64_t x_stride;  // elements, of a row or of tile_rows rows
  int tile_rows;     // as in GemmArgs; 1, row-major, for kernels without tiles
  // Elements from 32 values of a row to its next 32, for some rows of one tile; 0: 32 · tile_rows.
  int64_t x_step;
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

// One row's RMSNorm: x · r · (weight + offset), r = 1 / √(mean of x² + eps).
struct RmsNormArgs {
  const uint16_t* x;  // BF16
  int size;
  const uint16_t* weight_bf16;  // one of the two
  const float* weight_f32;
  float offset;
  float eps;
  bool rounds_twice;  // x · r is rounded to BF16 before it is multiplied with the weight
  uint16_t* out;      // BF16; may be x
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
  // Tile order: out[i][r][64] = bytes 64·i … 64·i + 63 of rows[r], for r < count and `tile_rows`
  // rows in out; zeros after `bytes`, up to `padded`, a multiple of 64.
  void (*to_tile)(const uint8_t* const* rows, int count, int tile_rows, int bytes, int padded,
                  uint8_t* out);
  void (*rms_norm)(const RmsNormArgs& args);
};

// C [rows][columns] = X [rows][k] · Wᵀ for some rows of a matrix W, row-major as torch holds it; X
// and W are both BF16 or both float32. Every C element is one chain of vectors along k whose lanes
// are added in one order, so its bits do not depend on its neighbours.
template <class Value>
struct DotArgs {
  const Value* x;
  int64_t x_stride;  // elements
  int rows;          // at most the kernel's block_rows
  const Value* w;
  int64_t w_stride;  // elements
  int columns;
  int k;
  // A part of k, a multiple of kDenseStep except for the last: partial sums of kDenseSumBytes for
  // every C element are taken from `sums` if `resume`, and left there unless `last`.
  uint8_t* sums;
  bool resume;
  bool last;
  bool cold;            // W comes from memory, and k is whole
  const uint8_t* next;  // to be prefetched meanwhile into the L2 cache; kernels that read several
  int64_t next_bytes;   // streams do not if `cold`. May be 0
  float* c;
  int64_t c_stride;
};
// For a call whose W, contiguous, is in memory yet: has it prefetched as the call goes.
template <class Value>
inline void prefetch_own(DotArgs<Value>& dot) {
  dot.cold = true;
  constexpr int64_t kAheadBytes = 8192;
  const int64_t bytes = dot.columns * dot.w_stride * static_cast<int64_t>(sizeof(Value));
  const int64_t ahead = bytes < kAheadBytes ? bytes : kAheadBytes;
  dot.next = reinterpret_cast<const uint8_t*>(dot.w) + ahead;
  dot.next_bytes = bytes - ahead;
}
using DenseDotArgs = DotArgs<uint16_t>;
using DenseF32DotArgs = DotArgs<float>;
constexpr int kDenseStep = 32;
constexpr int kDenseSumBytes = 64;

// One LoRA's B for the expand: BF16 [rank_pairs][outputs][2].
struct DenseLoraB {
  const uint16_t* b;
  int rank_pairs;
};

// out [rows][columns] = bf16(C + bias + T · Bᵀ + …): the LoRA expand and the one rounding.
struct DenseFinishArgs {
  const float* c;
  int64_t c_stride;
  int rows;
  int columns;
  const float* bias;  // [columns]; may be null
  // [loras] of all rows; a row of T has their ranks one after the other, each padded to even.
  const DenseLoraB* lora_b;
  int loras;  // 0: T is not read
  int64_t outputs;
  int64_t first_output;  // the first column's place in B
  const uint16_t* t;     // BF16 [rows]
  int64_t t_stride;
  uint16_t* out;
  int64_t out_stride;
};

struct DenseKernel {
  const char* name;
  int block_rows;
  void (*dot)(const DenseDotArgs& args);
  void (*finish)(const DenseFinishArgs& args);
};

struct DenseF32Kernel {
  const char* name;
  int block_rows;
  void (*dot)(const DenseF32DotArgs& args);
};

// AMX tiles pay off from some number of rows on; below it, and without AMX, `few` runs.
struct GemmChoice {
  const GemmKernel* few;
  const GemmKernel* many;  // the same kernel without AMX
  int many_from;           // rows

  const GemmKernel& for_rows(int rows) const { return rows < many_from ? *few : *many; }
};

// The kernel that runs, by family.
struct KernelTable {
  GemmChoice gemms[kNumWeightFormats];
  const ShrinkKernel* lora_shrink;
  const ShrinkKernel* lora_shrink_tiles;  // for a GEMM in tile order; null without AMX
  const ElementwiseKernels* elementwise;
  const DenseKernel* dense_bf16;
  // For many rows of a BF16 W that is row-major as torch holds it: w_block is a strip's first row,
  // block_rows how many it has, and k a multiple of 32. Null without AMX.
  const GemmKernel* dense_tiles;
  int dense_tiles_from;  // rows
  const DenseF32Kernel* dense_f32;
  const AttentionKernel* attention;
  // A row's bits do not depend on the number of rows, on AMX either. There BF16 has the tiles'
  // kernel for any number of rows; INT8 and INT4, whose sums are exact on tiles and off them, keep
  // both kernels, and LoRA is the same for both.
  bool fixed;

  const GemmChoice& gemm(WeightFormat format) const { return gemms[static_cast<int>(format)]; }
  GemmChoice& gemm(WeightFormat format) { return gemms[static_cast<int>(format)]; }
  // The shrink that reads what `gemm` reads.
  const ShrinkKernel& shrink_for(const GemmKernel& gemm) const {
    return gemm.tile_order ? *lora_shrink_tiles : *lora_shrink;
  }
};

}  // namespace ktrt
