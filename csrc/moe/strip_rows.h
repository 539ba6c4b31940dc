// What is done with C of a strip, row by row: intermediate activations and weighted sums. At once
// after the GEMM, or, for kernels in tile order, in pieces beside the next one.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernel_table.h"
#include "layout/packed_layout.h"
#include "moe/dispatch_plan.h"

namespace ktrt {

// Adds the biases of gate and up and makes their activations: into the rows of a job, which are in
// tile order for a BF16 kernel that asks for it.
struct ActivateRows {
  const ElementwiseKernels* kernels;
  const Activation* activation;  // null: silu(gate) · up
  float* gate;                   // [rows][32]; null: experts without gate
  float* up;
  const float* gate_bias;  // [32]; null: none
  const float* up_bias;
  int count;
  std::uint16_t* out;  // the strip's place in the job's first row
  std::int64_t row_stride;
  int tile_rows;
  std::int64_t tile_stride;

  void run(int first, int last) const {
    while (first < last) {
      if (tile_rows == 1) return run_rows(first, last - first, out + first * row_stride);
      const int in_tile = first % tile_rows;
      const int rows = std::min(tile_rows - in_tile, last - first);
      run_rows(first, rows, out + first / tile_rows * tile_stride + in_tile * row_stride);
      first += rows;
    }
  }

 private:
  void run_rows(int first, int rows, std::uint16_t* to) const {
    float* const u = up + first * kStripRows;
    float* const g = gate == nullptr ? nullptr : gate + first * kStripRows;
    if (gate_bias != nullptr) kernels->add_bias(gate_bias, rows, g);
    if (up_bias != nullptr) kernels->add_bias(up_bias, rows, u);
    if (activation == nullptr) {
      kernels->silu_mul(g, u, rows, to, row_stride);
    } else {
      kernels->activate(*activation, g, u, rows, to, row_stride);
    }
  }
};

// Adds the bias of down and makes weighted sums.
struct SumRows {
  const ElementwiseKernels* kernels;
  float* c;           // [rows][32]
  const float* bias;  // [32]; null: none
  const PlanRow* rows;
  int count;
  float* out;  // the strip's place in the first token's sums
  std::int64_t columns;

  void run(int first, int last) const {
    constexpr int kAhead = 6;
    if (bias != nullptr) kernels->add_bias(bias, last - first, c + first * kStripRows);
    for (int r = first; r < last; ++r) {
      if (r + kAhead < count) {
        const float* coming = out + rows[r + kAhead].token * columns;
        __builtin_prefetch(coming, 1, 3);
        __builtin_prefetch(coming + 16, 1, 3);
      }
      kernels->weighted_add(c + r * kStripRows, rows[r].weight, out + rows[r].token * columns);
    }
  }
};

// An aside does two rows at a time: the vector units have work for about as long as one tile of W
// takes to multiply.
inline constexpr int kRowsPerPiece = 2;

template <class Rows>
void run_piece(void* self, int index) {
  const Rows& rows = *static_cast<const Rows*>(self);
  const int first = index * kRowsPerPiece;
  rows.run(first, std::min(first + kRowsPerPiece, rows.count));
}

inline int pieces_of(int rows) { return round_up(rows, kRowsPerPiece) / kRowsPerPiece; }

}  // namespace ktrt
