// Prompts' attention by VDPBF16PS. Register block of the products: 6 rows × 64 columns (24
// accumulators, 4 vectors of W, 1 broadcast pair of A), one chain for each output, so a row's bits
// do not depend on the rows around it.
#include <immintrin.h>
#include <string.h>

#include "kernels/attention/avx512_common.h"
#include "kernels/prompt_attention_args.h"

namespace ktrt {
namespace {

constexpr int kRows = 6;
constexpr int kColumnVectors = kPromptColumns / 16;

inline __m512i row_part(const PromptPackArgs& a, int token, int from) {
  const int left = a.size - from;
  if (token < a.begin || token >= a.end || left <= 0) return _mm512_setzero_si512();
  const uint16_t* p = a.rows + token * a.stride + from;
  return left >= 32 ? Avx512::load(p) : Avx512::load_tail(p, left);
}

// Transposes 16 × 16 pairs.
inline void transpose(const __m512i (&in)[16], __m512i (&out)[16]) {
  __m512i two[16], four[16];
  for (int i = 0; i < 8; ++i) {
    two[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    two[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    four[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
    four[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
    four[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
    four[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
  }
  // four[4 i + j] has columns j, 4 + j, 8 + j and 12 + j of rows 4 i to 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xdd);
    out[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    out[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    out[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    out[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

void pack_keys(const PromptPackArgs& a) {
  for (int from = 0; from < a.size; from += 32) {
    for (int token = 0; token < kPromptKeys; token += 16) {
      __m512i rows[16], columns[16];
      for (int i = 0; i < 16; ++i) rows[i] = row_part(a, token + i, from);
      transpose(rows, columns);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(a.out + ((from / 2 + i) * kPromptKeys + token) * 2, columns[i]);
      }
    }
  }
}

void pack_values(const PromptPackArgs& a) {
  const int columns = (a.size + kPromptColumns - 1) / kPromptColumns * kPromptColumns;
  for (int token = 0; token < kPromptKeys; token += 2) {
    for (int from = 0; from < columns; from += 32) {
      const __m512i first = row_part(a, token, from);
      const __m512i second = row_part(a, token + 1, from);
      // Each holds 4 of every 8 columns.
      const __m512i low = _mm512_unpacklo_epi16(first, second);
      const __m512i high = _mm512_unpackhi_epi16(first, second);
      const __m512i left = _mm512_shuffle_i32x4(low, high, 0x44);
      const __m512i right = _mm512_shuffle_i32x4(low, high, 0xee);
      uint16_t* const to = a.out + (static_cast<int64_t>(token / 2) * columns + from) * 2;
      _mm512_storeu_si512(to, _mm512_shuffle_i32x4(left, left, 0xd8));
      _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(right, right, 0xd8));
    }
  }
}

template <int kCount>
void row_block(const PromptProductArgs& g, int row, int column) {
  constexpr int kSums = kCount * kColumnVectors;  // [kCount][kColumnVectors]
  __m512 sums[kSums];
  float* const c = g.c + static_cast<int64_t>(row) * g.columns + column;
  const auto each = [&](auto f) __attribute__((always_inline)) {
    unrolled<kCount>(KTRT_UNROLLED(r) {
      unrolled<kColumnVectors>(
          KTRT_UNROLLED(v) { f(r, sums[r * kColumnVectors + v], c + r * g.columns + v * 16); });
    });
  };
  if (g.carry == nullptr) {
    each([](int, __m512& sum, const float*) { sum = _mm512_setzero_ps(); });
  } else {
    each([&](int r, __m512& sum, const float* from) {
      sum = _mm512_mul_ps(_mm512_set1_ps(g.carry[row + r]), _mm512_loadu_ps(from));
    });
  }
  const uint16_t* a = g.a + row * g.a_stride;
  const uint16_t* w = g.w + 2 * column;
  for (int pair = 0; pair < g.pairs; ++pair, a += 2, w += 2 * g.columns) {
    __m512bh columns[kColumnVectors];
    unrolled<kColumnVectors>(KTRT_UNROLLED(v) {
      columns[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + v * 32));
    });
    unrolled<kCount>(KTRT_UNROLLED(r) {
      int both;
      memcpy(&both, a + r * g.a_stride, 4);
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
      unrolled<kColumnVectors>(KTRT_UNROLLED(v) {
        sums[r * kColumnVectors + v] =
            _mm512_dpbf16_ps(sums[r * kColumnVectors + v], columns[v], x);
      });
    });
  }
  each([](int, const __m512& sum, float* to) { _mm512_storeu_ps(to, sum); });
}

using RowBlock = void (*)(const PromptProductArgs&, int, int);
constexpr RowBlock kRowBlocks[kRows + 1] = {nullptr,      row_block<1>, row_block<2>, row_block<3>,
                                            row_block<4>, row_block<5>, row_block<6>};

void multiply(const PromptProductArgs& g) {
  for (int row = 0; row < g.rows; row += kRows) {
    const RowBlock block = kRowBlocks[g.rows - row < kRows ? g.rows - row : kRows];
    for (int column = 0; column < g.columns; column += kPromptColumns) block(g, row, column);
  }
}

inline int within(int64_t keys) {
  return keys < 0 ? 0 : keys > kPromptKeys ? kPromptKeys : static_cast<int>(keys);
}

inline void softmax_row(const PromptSoftmaxArgs& a, int row, int begin, int end) {
  constexpr int kVectors = kPromptKeys / 16;
  float* const s = a.scores + row * kPromptKeys;
  float scaling = a.scaling;
  if (a.softcap != 0.0f) {
    const float softcap = a.softcap;
    for (int t = 0; t < kPromptKeys; ++t) s[t] = softcap * soft(s[t] * scaling / softcap);
    scaling = 1.0f;
  }
  const uint64_t seen = (~uint64_t{0} >> (kPromptKeys - end)) & (~uint64_t{0} << begin);
  const __m512 nothing = _mm512_set1_ps(-INFINITY);
  __m512 v[kVectors], folded[kVectors];
  unrolled<kVectors>(KTRT_UNROLLED(i) {
    v[i] = folded[i] = _mm512_mask_mul_ps(nothing, static_cast<__mmask16>(seen >> (16 * i)),
                                          _mm512_loadu_ps(s + 16 * i), _mm512_set1_ps(scaling));
  });
  fold<kVectors / 2>(folded, [](__m512 x, __m512 y) { return Avx512::larger(x, y); });
  const float before = a.max[row];
  const float most = Avx512::largest(folded[0]);
  const float max = most > before ? most : before;
  const float shift = max == -INFINITY ? 0.0f : max;
  uint16_t* const weights = a.weights + row * kPromptKeys;
  unrolled<kVectors>(KTRT_UNROLLED(i) {
    folded[i] = weights_of<Avx512>(_mm512_sub_ps(v[i], _mm512_set1_ps(shift)));
    const auto bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(folded[i]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + 16 * i), bits);
  });
  fold<kVectors / 2>(folded, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
  const float carry = weight_of(before - shift);
  a.carry[row] = carry;
  a.max[row] = max;
  a.sum[row] = a.sum[row] * carry + Avx512::total(folded[0]);
}

void softmax(const PromptSoftmaxArgs& a) {
  for (int row = 0; row < a.rows; ++row) {
    const int64_t keys = a.end + (a.first_row + row) / a.heads;
    const int end = within(keys);
    const int begin = a.window > 0 ? within(keys - a.window) : 0;
    if (begin < end) {
      softmax_row(a, row, begin, end);
    } else {
      a.carry[row] = 1.0f;
      memset(a.weights + row * kPromptKeys, 0, sizeof(uint16_t) * kPromptKeys);
    }
  }
}

void finish(const PromptFinishArgs& a) {
  const float max = a.sink > a.max ? a.sink : a.max;
  const float shift = max == -INFINITY ? 0.0f : max;
  const float weight = weight_of(a.max - shift);
  const float factor = weight / (weight * a.sum + weight_of(a.sink - shift));
  for (int i = 0; i < a.size; ++i) a.out[i] = bf16_bits(a.sums[i] * factor);
}

}  // namespace

extern const PromptAttentionKernel prompt_attention_avx512_bf16;
const PromptAttentionKernel prompt_attention_avx512_bf16 = {"avx512_bf16", pack_keys, pack_values,
                                                            multiply,      softmax,   finish};

}  // namespace ktrt
