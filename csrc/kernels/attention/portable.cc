// Attention of one token in plain C++: vectors of four, which any machine adds side by side.
#include "kernels/attention/body.h"

namespace ktrt {
namespace {

struct Vector {
  static constexpr int kLanes = 4;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kHeads = 2;
  static constexpr int kTotals = 4;
  static constexpr int tokens_beside(int) { return 2; }
  static constexpr int pairs_beside(int) { return 1; }
  struct Floats {
    float at[kLanes];
  };
  struct Pairs {
    uint16_t at[kWidth];
  };

  static Floats zero() { return {}; }
  static Floats load_floats(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store_floats(float* p, const Floats& v) { memcpy(p, &v, sizeof v); }
  static Floats broadcast(const float* p) { return {{*p, *p, *p, *p}}; }
  static Floats value(float v) { return {{v, v, v, v}}; }
  static Floats add(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Floats subtract(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] -= b.at[i];
    return a;
  }
  // b if either is NaN.
  static Floats larger(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return a;
  }
  static float largest(const Floats& v) {
    float most = v.at[0];
    for (const float each : v.at) most = most > each ? most : each;
    return most;
  }
  static Floats rounded(Floats v) {
    for (float& each : v.at) each = static_cast<float>(round_to_int(each));
    return v;
  }
  static Floats times_power(Floats v, const Floats& n) {
    for (int i = 0; i < kLanes; ++i) {
      v.at[i] *= as_float(static_cast<uint32_t>(round_to_int(n.at[i]) + 127) << 23);
    }
    return v;
  }
  static Floats zero_below(const Floats& x, const Floats& least, Floats v) {
    for (int i = 0; i < kLanes; ++i) v.at[i] = choose(x.at[i] < least.at[i], 0.0f, v.at[i]);
    return v;
  }
  static Floats multiply(Floats a, const Floats& b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] *= b.at[i];
    return a;
  }
  static Floats multiply_add(const Floats& a, const Floats& b, Floats c) {
    for (int i = 0; i < kLanes; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
  }
  static Pairs load(const uint16_t* p) { return load_tail(p, kWidth); }
  static Pairs load_tail(const uint16_t* p, int count) {
    Pairs pairs{};
    memcpy(pairs.at, p, sizeof(uint16_t) * static_cast<size_t>(count));
    return pairs;
  }
  static Floats even(const Pairs& pairs) { return every_other(pairs.at); }
  static Floats odd(const Pairs& pairs) { return every_other(pairs.at + 1); }
  static Floats every_other(const uint16_t* p) {
    return {{bf16_value(p[0]), bf16_value(p[2]), bf16_value(p[4]), bf16_value(p[6])}};
  }
  static float total(const Floats& v) { return (v.at[0] + v.at[2]) + (v.at[1] + v.at[3]); }
  static void store_totals(const Floats& a, const Floats& b, const Floats& c, const Floats& d,
                           float* out) {
    out[0] = total(a);
    out[1] = total(b);
    out[2] = total(c);
    out[3] = total(d);
  }
};

}  // namespace

extern const AttentionKernel attention_portable;
const AttentionKernel attention_portable = {"portable",     Vector::kWidth,  pack<Vector>,
                                            scores<Vector>, softmax<Vector>, values<Vector>,
                                            merge<Vector>,  nullptr};

}  // namespace ktrt
