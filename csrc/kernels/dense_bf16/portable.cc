// Dense BF16 in plain C++: four sums for every dot product, which any machine adds side by side.
#include "kernels/dense_bf16/body.h"
#include "kernels/scalar_bf16.h"

namespace ktrt {
namespace {

constexpr int kLanes = 4;

struct Vector {
  using Value = uint16_t;
  struct Values {
    float at[kLanes];
  };
  using Sum = Values;
  using Outputs = float;
  static constexpr int kWidth = kLanes;
  static constexpr int kBlockRows = 2;
  static constexpr int kStreams = 1;
  static constexpr int kOutputs = 1;

  static Sum zero() { return {}; }
  static Values load(const uint16_t* p) { return load_tail(p, kWidth); }
  static Values load_tail(const uint16_t* p, int count) {
    Values values{};
    for (int i = 0; i < count; ++i) values.at[i] = bf16_value(p[i]);
    return values;
  }
  static Sum add(Sum sum, const Values& w, const Values& x) {
    for (int i = 0; i < kLanes; ++i) sum.at[i] += w.at[i] * x.at[i];
    return sum;
  }
  static float total(const Sum& sum) { return (sum.at[0] + sum.at[2]) + (sum.at[1] + sum.at[3]); }
  static void store_totals(const Sum& a, const Sum& b, const Sum& c, const Sum& d, float* out) {
    out[0] = total(a);
    out[1] = total(b);
    out[2] = total(c);
    out[3] = total(d);
  }

  static float load_floats(const float* p, int) { return *p; }
  static float add_floats(float a, float b) { return a + b; }
  static float expand(float sum, const uint16_t* b, const uint16_t* t, int) {
    sum += bf16_value(b[0]) * bf16_value(t[0]);
    return sum + bf16_value(b[1]) * bf16_value(t[1]);
  }
  static void store_bf16(float sum, uint16_t* out, int) { *out = bf16_bits(sum); }
};

}  // namespace

extern const DenseKernel dense_bf16_portable;
const DenseKernel dense_bf16_portable = {"portable", Vector::kBlockRows, dot<Vector>,
                                         finish<Vector>};

}  // namespace ktrt
