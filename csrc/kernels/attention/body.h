// Attention of one token, over a vector type V. Included by the ISA files only.
//
// BF16 pairs are widened to two vectors, the values of even and of odd index: a shift and a mask,
// where the natural order would take a permutation. Packed rows (queries, sums of values) are in
// that order, V::kWidth = 2 · V::kLanes values at a time.
//
// Scores: a register block is some tokens × some heads, one chain along a key for each; a key is
// widened once for all heads of the block. Sums of values: some heads × some pairs of vectors, one
// chain over the tokens of a block. So every number is one chain in one order.
#pragma once

#include <math.h>
#include <stdint.h>

#include "kernels/attention_args.h"
#include "kernels/scalar_bf16.h"
#include "kernels/scalar_math.h"
#include "kernels/unrolled.h"

namespace ktrt {
namespace {

// Shares of what is read next, in a pass over all values.
constexpr int kShares = 8;

// Asks for share `done` of `total` of the rows that are read next, in the order of their addresses:
// four places in turn, or every second line, took 2 to 25 % longer.
inline void ask_for(const AttentionComing& coming, int done, int total) {
  const int end = coming.tokens * (done + 1) / total;
  for (int t = coming.tokens * done / total; t < end; ++t) {
    const uint16_t* row = coming.rows + t * coming.stride;
    for (int i = 0; i < coming.size; i += 32) __builtin_prefetch(row + i, 0, 2);
  }
}

template <class V>
void pack(const uint16_t* bf16, const float* f32, int size, float* out) {
  for (int first = 0; first < size; first += V::kWidth, out += V::kWidth) {
    float values[V::kWidth] = {};
    const int count = size - first < V::kWidth ? size - first : V::kWidth;
    for (int i = 0; i < count; ++i) {
      values[i] = bf16 != nullptr ? bf16_value(bf16[first + i]) : f32[first + i];
    }
    for (int i = 0; i < V::kLanes; ++i) {
      out[i] = values[2 * i];
      out[V::kLanes + i] = values[2 * i + 1];
    }
  }
}

#define KTRT_UNROLLED(...) [&](auto __VA_ARGS__) __attribute__((always_inline))

// kTokens tokens from `token` on × kHeads heads from `head` on. kDots: of BF16 queries.
template <class V, bool kDots, int kHeads, int kTokens>
KTRT_INLINE void score_block(const AttentionScoreArgs& a, int head, int token) {
  using Floats = typename V::Floats;
  constexpr int kSums = kHeads * kTokens;  // [kHeads][kTokens]
  Floats sums[kSums];
  unrolled<kSums>(KTRT_UNROLLED(i) { sums[i] = V::zero(); });
  const uint16_t* const keys = a.keys + token * a.key_stride;
  const auto step = [&](int i, auto load) __attribute__((always_inline)) {
    typename V::Pairs pairs[kTokens];
    unrolled<kTokens>(KTRT_UNROLLED(t) { pairs[t] = load(keys + t * a.key_stride + i); });
    if constexpr (kDots) {
      unrolled<kHeads>(KTRT_UNROLLED(h) {
        const typename V::Pairs query = V::load(a.q_bf16 + (head + h) * a.q_stride + i);
        unrolled<kTokens>(KTRT_UNROLLED(t) {
          sums[h * kTokens + t] = V::add_products(query, pairs[t], sums[h * kTokens + t]);
        });
      });
      return;
    }
    const float* const q = a.q + head * a.q_stride;
    Floats widened[kTokens];
    const auto multiply = [&](const float* from) __attribute__((always_inline)) {
      unrolled<kHeads>(KTRT_UNROLLED(h) {
        const Floats query = V::load_floats(from + h * a.q_stride);
        unrolled<kTokens>(KTRT_UNROLLED(t) {
          sums[h * kTokens + t] = V::multiply_add(query, widened[t], sums[h * kTokens + t]);
        });
      });
    };
    unrolled<kTokens>(KTRT_UNROLLED(t) { widened[t] = V::even(pairs[t]); });
    multiply(q + i);
    unrolled<kTokens>(KTRT_UNROLLED(t) { widened[t] = V::odd(pairs[t]); });
    multiply(q + i + V::kLanes);
  };
  const int whole = a.size - a.size % V::kWidth;
  for (int i = 0; i < whole; i += V::kWidth) {
    step(i, [](const uint16_t* p) { return V::load(p); });
  }
  if (whole < a.size) {
    const int count = a.size - whole;
    step(whole, [count](const uint16_t* p) { return V::load_tail(p, count); });
  }
  float totals[kSums];
  constexpr int kMany = V::kTotals == 4 ? 0 : kSums / V::kTotals * V::kTotals;
  constexpr int kFours = (kSums - kMany) / 4;
  if constexpr (kMany > 0) V::store_many_totals(sums, totals);
  unrolled<kFours>(KTRT_UNROLLED(n) {
    constexpr int i = kMany + 4 * decltype(n)::value;
    V::store_totals(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], totals + i);
  });
  unrolled<kSums, kMany + 4 * kFours>(KTRT_UNROLLED(i) { totals[i] = V::total(sums[i]); });
  for (int h = 0; h < kHeads; ++h) {
    float* scores = a.scores + (head + h) * kAttentionBlock + token;
    for (int t = 0; t < kTokens; ++t) {
      scores[t] = a.add ? scores[t] + totals[h * kTokens + t] : totals[h * kTokens + t];
    }
  }
}

template <class V, bool kDots, int kHeads>
void score_heads(const AttentionScoreArgs& a, int head) {
  constexpr int kTokens = V::tokens_beside(kHeads);
  const int steps = a.tokens / kTokens;
  int token = 0;
  for (; token + kTokens <= a.tokens; token += kTokens) {
    if (head == 0) ask_for(a.coming, token / kTokens, steps);
    score_block<V, kDots, kHeads, kTokens>(a, head, token);
  }
  for (; token < a.tokens; ++token) {
    if (head == 0 && a.tokens < kTokens) ask_for(a.coming, token, a.tokens);
    score_block<V, kDots, kHeads, 1>(a, head, token);
  }
}

// kPairs pairs of vectors from number `first` on of the sums of kHeads heads.
template <class V, int kHeads, int kPairs, class Load>
KTRT_INLINE void value_block(const AttentionValueArgs& a, int head, int first, Load load) {
  using Floats = typename V::Floats;
  constexpr int kVectors = 2 * kPairs;
  Floats sums[kHeads * kVectors];  // [kHeads][kVectors]
  float* const kept = a.sums + head * a.sum_stride + first;
  const auto each_sum = [&](auto f) __attribute__((always_inline)) {
    unrolled<kHeads>(KTRT_UNROLLED(h) {
      unrolled<kVectors>(KTRT_UNROLLED(i) {
        f(h, sums[h * kVectors + i], kept + h * a.sum_stride + i * V::kLanes);
      });
    });
  };
  if (a.carry == nullptr) {
    each_sum([](int, Floats& sum, const float*) { sum = V::zero(); });
  } else {
    each_sum([&](int h, Floats& sum, const float* from) {
      sum = V::multiply(V::broadcast(a.carry + head + h), V::load_floats(from));
    });
  }
  const float* const weights = a.weights + head * kAttentionBlock;
  const int width = kPairs * V::kWidth;
  const int steps = (a.size + width - 1) / width * kShares;
  int share = head > 0 ? steps : first / width * kShares;
  for (int t = 0; t < a.tokens; ++t) {
    if (t % (kAttentionBlock / kShares) == 0 && share < steps) ask_for(a.coming, share++, steps);
    const uint16_t* const value = a.values + t * a.value_stride + first;
    Floats widened[kVectors];
    unrolled<kPairs>(KTRT_UNROLLED(i) {
      const typename V::Pairs pairs = load(value + i * V::kWidth);
      widened[2 * i] = V::even(pairs);
      widened[2 * i + 1] = V::odd(pairs);
    });
    unrolled<kHeads>(KTRT_UNROLLED(h) {
      const Floats weight = V::broadcast(weights + h * kAttentionBlock + t);
      unrolled<kVectors>(KTRT_UNROLLED(i) {
        sums[h * kVectors + i] = V::multiply_add(weight, widened[i], sums[h * kVectors + i]);
      });
    });
  }
  each_sum([](int, const Floats& sum, float* to) { V::store_floats(to, sum); });
}

template <class V, int kHeads>
void value_heads(const AttentionValueArgs& a, int head) {
  constexpr int kPairs = V::pairs_beside(kHeads);
  const auto load = [](const uint16_t* p) { return V::load(p); };
  int i = 0;
  for (; i + kPairs * V::kWidth <= a.size; i += kPairs * V::kWidth) {
    value_block<V, kHeads, kPairs>(a, head, i, load);
  }
  for (; i + V::kWidth <= a.size; i += V::kWidth) value_block<V, kHeads, 1>(a, head, i, load);
  if (i < a.size) {
    const int count = a.size - i;
    value_block<V, kHeads, 1>(a, head, i,
                              [count](const uint16_t* p) { return V::load_tail(p, count); });
  }
}

template <class V, bool kDots, int kHeads>
inline void score_some(const AttentionScoreArgs& a, int heads, int head) {
  if (heads == kHeads) {
    score_heads<V, kDots, kHeads>(a, head);
  } else if constexpr (kHeads > 1) {
    score_some<V, kDots, kHeads - 1>(a, heads, head);
  }
}

template <class V, int kHeads>
inline void value_some(const AttentionValueArgs& a, int heads, int head) {
  if (heads == kHeads) {
    value_heads<V, kHeads>(a, head);
  } else if constexpr (kHeads > 1) {
    value_some<V, kHeads - 1>(a, heads, head);
  }
}

// As few groups of heads as possible, evenly filled.
template <class V, bool kDots = false>
void scores(const AttentionScoreArgs& a) {
  const int chunks = (a.heads + V::kHeads - 1) / V::kHeads;
  for (int i = 0; i < chunks; ++i) {
    const int head = a.heads * i / chunks;
    score_some<V, kDots, V::kHeads>(a, a.heads * (i + 1) / chunks - head, head);
  }
}

template <class V>
void values(const AttentionValueArgs& a) {
  const int chunks = (a.heads + V::kHeads - 1) / V::kHeads;
  for (int i = 0; i < chunks; ++i) {
    const int head = a.heads * i / chunks;
    value_some<V, V::kHeads>(a, a.heads * (i + 1) / chunks - head, head);
  }
}

// e^x for x ≤ 0; 0 where a float's would be below e^-87, so that the cut tail counts nothing.
inline float weight_of(float x) { return choose(x < -87.0f, 0.0f, exp_of_negative(x)); }

// The same of vectors, by the same polynomial.
template <class V>
KTRT_INLINE typename V::Floats weights_of(typename V::Floats x) {
  using Floats = typename V::Floats;
  const Floats least = V::value(-87.0f);
  const Floats clamped = V::larger(least, x);
  const Floats n = V::rounded(V::multiply(clamped, V::value(1.44269504088896341f)));
  Floats f = V::multiply_add(n, V::value(-0.693359375f), clamped);
  f = V::multiply_add(n, V::value(2.12194440e-4f), f);
  const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                         5.0000001201e-1f};
  Floats p = V::value(1.9875691500e-4f);
  unrolled<5>(KTRT_UNROLLED(i) { p = V::multiply_add(p, f, V::value(terms[i])); });
  p = V::multiply_add(p, V::multiply(f, f), V::add(f, V::value(1.0f)));
  return V::zero_below(x, least, V::times_power(p, n));
}

// scaling, cap and mask of a head, -infinity after the tokens.
inline void finish_scores(const AttentionSoftmaxArgs& a, float* s) {
  // Locals, which the stores below cannot change: otherwise nothing is vectorised.
  const float scaling = a.scaling;
  const float softcap = a.softcap;
  for (int t = 0; t < kAttentionBlock; ++t) s[t] *= scaling;
  if (softcap != 0.0f) {
    for (int t = 0; t < kAttentionBlock; ++t) s[t] = softcap * soft(s[t] / softcap);
  }
  if (a.mask != nullptr) {
    for (int t = 0; t < a.tokens; ++t) s[t] += a.mask[t];
  }
  for (int t = a.tokens; t < kAttentionBlock; ++t) s[t] = -INFINITY;
}

// Folds v[0 … 2 · kHalf - 1] into v[0], always in the same order.
template <int kHalf, class Floats, class Combine>
KTRT_INLINE void fold(Floats* v, Combine combine) {
  unrolled<kHalf>(KTRT_UNROLLED(i) { v[i] = combine(v[i], v[i + kHalf]); });
  if constexpr (kHalf > 1) fold<kHalf / 2>(v, combine);
}

template <class V>
void softmax_head(const AttentionSoftmaxArgs& a, int head) {
  using Floats = typename V::Floats;
  constexpr int kVectors = kAttentionBlock / V::kLanes;
  float* const s = a.scores + head * kAttentionBlock;
  float scaling = a.scaling;
  if (a.tokens < kAttentionBlock || a.softcap != 0.0f || a.mask != nullptr) {
    finish_scores(a, s);
    scaling = 1.0f;
  }
  Floats v[kVectors], folded[kVectors];
  unrolled<kVectors>(KTRT_UNROLLED(i) {
    v[i] = folded[i] = V::multiply(V::load_floats(s + i * V::kLanes), V::value(scaling));
  });
  fold<kVectors / 2>(folded, [](Floats x, Floats y) { return V::larger(x, y); });
  const float before = a.max[head];
  const float most = V::largest(folded[0]);
  const float max = most > before ? most : before;
  // Nothing seen yet: all weights are e^-infinity.
  const float shift = max == -INFINITY ? 0.0f : max;
  unrolled<kVectors>(KTRT_UNROLLED(i) {
    v[i] = folded[i] = weights_of<V>(V::subtract(v[i], V::value(shift)));
    V::store_floats(s + i * V::kLanes, v[i]);
  });
  fold<kVectors / 2>(folded, [](Floats x, Floats y) { return V::add(x, y); });
  const float carry = weight_of(before - shift);
  a.carry[head] = carry;
  a.max[head] = max;
  a.sum[head] = a.sum[head] * carry + V::total(folded[0]);
}

template <class V>
void softmax(const AttentionSoftmaxArgs& a) {
  for (int head = 0; head < a.heads; ++head) softmax_head<V>(a, head);
}

template <class V>
void merge(const AttentionMergeArgs& a) {
  float max = a.sink;
  for (int p = 0; p < a.parts; ++p) {
    const float each = a.max[p * a.stat_stride];
    max = each > max ? each : max;
  }
  const float shift = max == -INFINITY ? 0.0f : max;
  const int padded = (a.size + V::kWidth - 1) / V::kWidth * V::kWidth;
  for (int i = 0; i < padded; ++i) a.scratch[i] = 0.0f;
  float sum = weight_of(a.sink - shift);
  for (int p = 0; p < a.parts; ++p) {
    const float weight = weight_of(a.max[p * a.stat_stride] - shift);
    const float* sums = a.sums + p * a.part_stride;
    sum += weight * a.sum[p * a.stat_stride];
    for (int i = 0; i < padded; ++i) a.scratch[i] += weight * sums[i];
  }
  const float inverse = 1.0f / sum;
  for (int first = 0; first < a.size; first += V::kWidth) {
    float out[V::kWidth];
    for (int i = 0; i < V::kLanes; ++i) {
      out[2 * i] = a.scratch[first + i] * inverse;
      out[2 * i + 1] = a.scratch[first + V::kLanes + i] * inverse;
    }
    const int count = a.size - first < V::kWidth ? a.size - first : V::kWidth;
    for (int i = 0; i < count; ++i) {
      if (a.out_f32 != nullptr) {
        a.out_f32[first + i] = out[i];
      } else {
        a.out_bf16[first + i] = bf16_bits(out[i]);
      }
    }
  }
}

}  // namespace
}  // namespace ktrt
