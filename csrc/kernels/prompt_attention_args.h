// Arguments of the kernels of prompts' attention: many rows over blocks of keys. A row is one query
// of one head. Plain data, read by the kernels' ISA files.
#pragma once

#include <stdint.h>

namespace ktrt {

// Keys of a block, which begins at a multiple of it.
constexpr int kPromptKeys = 64;
// Columns of a product come in groups of this many.
constexpr int kPromptColumns = 64;

// Tokens [begin, end) of a block, zeros for the others.
struct PromptPackArgs {
  const uint16_t* rows;  // BF16, token 0 of the block
  int64_t stride;        // elements, of a token
  int begin;
  int end;
  int size;       // numbers of a token
  uint16_t* out;  // see PromptAttentionKernel
};

// c [rows][columns] = a [rows][2 · pairs] · w, or carry[row] · c + that.
struct PromptProductArgs {
  const uint16_t* a;  // BF16
  int64_t a_stride;   // elements, of a row
  int rows;
  const uint16_t* w;  // BF16 [pairs][columns][2]
  int pairs;
  int columns;         // a multiple of kPromptColumns
  const float* carry;  // [rows], or null
  float* c;            // [rows][columns]
};

// Rows `first_row` and on of a block of queries; rows of a position lie next to each other, one
// for each head. Row 0 sees the block's keys before `end`, the next position one more.
struct PromptSoftmaxArgs {
  float* scores;  // [rows][kPromptKeys], may be overwritten
  int rows;
  int first_row;
  int heads;
  int64_t end;
  int64_t window;  // keys that a row sees; 0: all before its end
  float scaling;
  float softcap;      // 0: none
  float* max;         // [rows]; -infinity before the first block
  float* sum;         // [rows]; 0 before the first block
  float* carry;       // [rows], written: e^(max before - max now)
  uint16_t* weights;  // BF16 [rows][kPromptKeys], written: e^(score - max)
};

struct PromptFinishArgs {
  const float* sums;
  float max;
  float sum;
  float sink;  // a score without a value; -infinity: none
  int size;
  uint16_t* out;  // BF16
};

struct PromptAttentionKernel {
  const char* name;
  // out [size / 2][kPromptKeys][2], size rounded up to a multiple of 32.
  void (*pack_keys)(const PromptPackArgs& args);
  // out [kPromptKeys / 2][size][2], size rounded up to a multiple of kPromptColumns.
  void (*pack_values)(const PromptPackArgs& args);
  void (*multiply)(const PromptProductArgs& args);
  void (*softmax)(const PromptSoftmaxArgs& args);
  void (*finish)(const PromptFinishArgs& args);
};

}  // namespace ktrt
