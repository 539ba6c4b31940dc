// Arguments of the attention kernels: one token's heads over some tokens of a cache. Plain data,
// read by the kernels' ISA files.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ktrt {

// Tokens whose scores are made before their values are added: 32 KB of keys and values of 128
// numbers, which stay in the L1 and L2 caches meanwhile.
constexpr int kAttentionBlock = 64;

// Rows that are read next, to be prefetched meanwhile; null: none.
struct AttentionComing {
  const uint16_t* rows = nullptr;
  int64_t stride = 0;  // elements
  int tokens = 0;
  int size = 0;
};

// scores[h][t] = q[h] · keys[t], or adds it.
struct AttentionScoreArgs {
  const float* q;          // as AttentionKernel::pack makes it
  const uint16_t* q_bf16;  // bf16_scores': zeros after a row, up to AttentionKernel::width
  int64_t q_stride;        // elements, of a head
  int heads;
  const uint16_t* keys;  // BF16
  int64_t key_stride;    // elements, of a token
  int tokens;            // at most kAttentionBlock
  int size;
  bool add;
  AttentionComing coming;
  float* scores;  // [heads][kAttentionBlock]
};

// s = cap(scaling · score) + mask, and e^(s - max) in its place, 0 after `tokens`; max and sum
// cover all blocks so far.
struct AttentionSoftmaxArgs {
  float* scores;  // [heads][kAttentionBlock]
  int heads;
  int tokens;
  float scaling;
  float softcap;      // 0: none
  const float* mask;  // [tokens]; may be null
  float* max;         // [heads]; -infinity before the first block
  float* sum;         // [heads]; 0 before the first block
  float* carry;       // [heads], written: e^(max before - max now)
};

// sums[h] = carry[h] · sums[h] + Σ_t weights[h][t] · values[t].
struct AttentionValueArgs {
  const float* weights;  // [heads][kAttentionBlock]
  int heads;
  const uint16_t* values;  // BF16
  int64_t value_stride;    // elements, of a token
  int tokens;
  int size;
  const float* carry;  // null before the first block: sums hold nothing
  AttentionComing coming;
  float* sums;         // in the order of AttentionKernel::pack
  int64_t sum_stride;  // of a head
};

// One head's output from what different blocks of tokens gave it.
struct AttentionMergeArgs {
  const float* sums;
  int64_t part_stride;  // floats, between the parts' sums
  const float* max;
  const float* sum;
  int64_t stat_stride;  // floats, between the parts' max and sum
  int parts;
  float sink;      // a score without a value; -infinity: none
  int size;        // of a value
  float* scratch;  // as many floats as packed sums
  float* out_f32;  // one of the two
  uint16_t* out_bf16;
};

using AttentionScores = void (*)(const AttentionScoreArgs& args);

struct AttentionKernel {
  const char* name;
  int width;  // packed rows are multiples of it
  // A row of a query: BF16 or float32, the other null. `out` is [size rounded up to width], in the
  // kernel's own order, zeros after it.
  void (*pack)(const uint16_t* bf16, const float* f32, int size, float* out);
  AttentionScores scores;
  void (*softmax)(const AttentionSoftmaxArgs& args);
  void (*values)(const AttentionValueArgs& args);
  void (*merge)(const AttentionMergeArgs& args);
  // scores of queries in BF16; null where that is not faster.
  AttentionScores bf16_scores;
};

}  // namespace ktrt
