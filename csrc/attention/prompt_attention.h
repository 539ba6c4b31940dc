// Causal attention of a prompt's tokens over BF16 keys and values, on the engine's threads.
//
// Threads claim blocks of queries: some positions, all heads of a group. The keys go through in
// blocks of 64 that begin at multiples of 64 positions: scores, their exponentials against the
// largest so far, weighted sum of values. A row's sums are one chain over its blocks, so its bits
// depend neither on the number of threads nor on where a prompt is cut.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/head_array.h"
#include "attention/span_attention.h"
#include "engine/engine.h"
#include "kernels/prompt_attention_args.h"

namespace ktrt {

struct PromptArrays {
  HeadArray query;   // BF16 [heads, tokens, key_size]
  HeadArray keys;    // BF16 [groups, keys, key_size]
  HeadArray values;  // BF16 [groups, keys, value_size]
  HeadArray out;     // BF16 [heads, tokens, value_size]
};

// Queries of positions [start, start + tokens); the arrays' keys begin at position `first`.
struct PromptSpan {
  std::int64_t start = 0;
  std::int64_t tokens = 0;
  std::int64_t first = 0;
  std::int64_t window = 0;  // positions that a query sees, its own included; 0: all before it

  // The first position that the query at `position` sees.
  std::int64_t seen_from(std::int64_t position) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
};

// `sinks`: [heads]. The engine has the kernel, and the arrays fit.
void attend_prompt(const SpanAttention::Form& form, const std::vector<float>& sinks,
                   const PromptArrays& arrays, const PromptSpan& span, const Engine::Lease& lease,
                   const PromptAttentionKernel& kernel);

}  // namespace ktrt
