// Scores of BF16 queries by VDPBF16PS: twice as many products an instruction as float32 has, and
// keys need no widening.
#include "kernels/attention/avx512_common.h"

namespace ktrt {
namespace {

struct Dots : Avx512 {
  static constexpr int kHeads = 4;
  static Floats add_products(Pairs a, Pairs b, Floats c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

extern const AttentionScores attention_bf16_scores_avx512;
const AttentionScores attention_bf16_scores_avx512 = scores<Dots, true>;

}  // namespace ktrt
