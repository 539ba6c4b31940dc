// A GEMM of coded weights with its exact result, from codes and scales by the formats'
// descriptions: OCP 8-bit floating point specification 1.0 (E4M3), OCP microscaling formats 1.0
// (E2M1, E8M0).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/bf16.h"
#include "helpers/aligned_vector.h"
#include "helpers/packed.h"
#include "helpers/random.h"
#include "helpers/views.h"
#include "kernels/kernel_table.h"
#include "layout/coded.h"

namespace ktrt::testing {

// A format by its description.
struct CodedReference {
  int bits;          // of a code
  int group;         // columns of one scale; 0: all
  int rows;          // outputs of one scale
  DType scale_type;  // kUint8: E8M0
};

constexpr CodedReference coded_reference(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFp8:  // the engine's input has a scale per strip, a part of 128 rows
      return {8, 128, 32, DType::kFloat32};
    case WeightFormat::kFp8Channel:
      return {8, 0, 1, DType::kFloat32};
    case WeightFormat::kInt4G32:
      return {4, 32, 1, DType::kBfloat16};
    case WeightFormat::kInt4G64:
      return {4, 64, 1, DType::kBfloat16};
    case WeightFormat::kInt4G128:
      return {4, 128, 1, DType::kBfloat16};
    default:
      return {4, 32, 1, DType::kUint8};
  }
}

// [sign][exponent][mantissa] of a small float: exponent 0 has no hidden one.
inline double small_float(int code, int exponent_bits, int mantissa_bits, int bias) {
  const int mantissa = code & ((1 << mantissa_bits) - 1);
  const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int hidden = exponent == 0 ? 0 : 1 << mantissa_bits;
  const double value = std::ldexp(hidden + mantissa, std::max(exponent, 1) - bias - mantissa_bits);
  return (code >> (exponent_bits + mantissa_bits) & 1) != 0 ? -value : value;
}

inline double code_value(WeightFormat format, int code) {
  if (coded_reference(format).bits == 8) return small_float(code, 4, 3, 7);
  if (format == WeightFormat::kMxfp4) return small_float(code, 2, 1, 1);
  return code < 8 ? code : code - 16;
}

inline bool is_nan_code(WeightFormat format, int code) {
  return coded_reference(format).bits == 8 && (code & 0x7f) == 0x7f;
}

// C [rows][n] = A Wᵀ + T Bᵀ.
class CodedCase {
 public:
  CodedCase(WeightFormat format, int n, int k, int rows, std::uint64_t seed = 1)
      : format_(format), n_(n), k_(k), rows_(rows), random_(seed) {
    codes_.resize(size(n * k));
    for (std::uint8_t& code : codes_) {
      do {
        code = static_cast<std::uint8_t>(random_.integer(0, (1 << reference().bits) - 1));
      } while (is_nan_code(format, code));
    }
    set_scales(0.01, 0.1);
    a_ = random_.normals(size(rows * k));
    for (float& value : a_) value = round_to_bf16(value);
  }

  // Scales have either sign, but for E8M0, which has powers of two.
  void set_scales(double low, double high) {
    scales_.resize(size(scale_rows() * groups()));
    for (float& scale : scales_) {
      const auto value = static_cast<float>(random_.uniform(low, high));
      const float sign = random_.integer(0, 1) == 0 ? 1.0f : -1.0f;
      scale = reference().scale_type == DType::kUint8      ? std::exp2(std::floor(std::log2(value)))
              : reference().scale_type == DType::kBfloat16 ? sign * round_to_bf16(value)
                                                           : sign * value;
    }
    packed_ = {};
  }
  template <class Value>
  void set_codes(Value value) {
    for (int row = 0; row < n_; ++row) {
      for (int k = 0; k < k_; ++k) {
        codes_[at(row, k_, k)] = static_cast<std::uint8_t>(value(row, k));
      }
    }
    packed_ = {};
  }
  template <class Value>
  void set_activations(Value value) {
    for (int row = 0; row < rows_; ++row) {
      for (int k = 0; k < k_; ++k) a_[at(row, k_, k)] = static_cast<float>(value(row, k));
    }
  }
  // The value of A between k and the padded k.
  void set_padding(float value) { padding_ = value; }

  void add_lora(int rank) {
    rank_ = rank;
    t_ = random_.normals(size(rows_ * rank), 0.5f);
    b_ = random_.normals(size(n_ * rank), 0.1f);
    for (float& value : t_) value = round_to_bf16(value);
    for (float& value : b_) value = round_to_bf16(value);
  }

  int n() const { return n_; }
  int k() const { return k_; }
  int rows() const { return rows_; }
  int code(int n, int k) const { return codes_[at(n, k_, k)]; }
  float scale(int n, int k) const {
    const int group = reference().group == 0 ? 0 : k / reference().group;
    return scales_[at(n / reference().rows, groups(), group)];
  }

  // Tiles have the weights rounded to BF16, whose subnormal numbers they take for zero; but with
  // one scale per output they have the codes.
  bool rounds_weights(const GemmKernel& kernel) const {
    return kernel.tile_order && format_ != WeightFormat::kFp8Channel;
  }
  double weight(int n, int k, bool rounded) const {
    const double value = code_value(format_, code(n, k)) * double{scale(n, k)};
    if (!rounded) return value;
    return std::fabs(value) < 0x1p-126 ? 0.0 : double{round_to_bf16(static_cast<float>(value))};
  }

  struct Exact {
    double value;
    double tolerance;
  };
  // As GemmCase::exact(): twice √m · 2^-24 · Σ|terms|, the terms of a scale's group once more.
  Exact exact(int row, int n, const GemmKernel& kernel) const {
    double sum = 0.0;
    double magnitude = 0.0;
    const auto add = [&](double product) {
      sum += product;
      magnitude += std::fabs(product);
    };
    for (int k = 0; k < k_; ++k) {
      add(double{a_[at(row, k_, k)]} * weight(n, k, rounds_weights(kernel)));
    }
    for (int r = 0; r < rank_; ++r) add(double{t_[at(row, rank_, r)]} * b_[at(n, rank_, r)]);
    return {sum, 2.0 * std::sqrt(k_ + groups() + rank_) * 0x1p-24 * magnitude};
  }

  // Rows [first, first + count) of C, [count][n]; `apart`: LoRA by GemmKernel::expand.
  std::vector<float> run(const GemmKernel& kernel, int first, int count, bool apart = false) {
    std::vector<float> c(size(count * n_));
    const AlignedVector<std::uint8_t> a = activations(kernel, first, count);
    const AlignedVector<std::uint16_t> t = shrunk(kernel, first, count);
    constexpr float kGuard = 12345.0f;
    for (int strip = 0; strip < packed().layout.strips(); ++strip) {
      const AlignedVector<std::uint16_t> b = expand(strip);
      const int whole = round_up(count, kernel.tile_rows(count));
      AlignedVector<float> block(size((whole + 1) * kStripRows),
                                 std::numeric_limits<float>::quiet_NaN());
      std::fill(block.end() - kStripRows, block.end(), kGuard);
      GemmArgs args = weights(strip);
      args.a = a.data();
      args.tile_rows = kernel.tile_rows(count);
      args.a_stride = args.tile_rows * a_row_bytes();
      args.rows = count;
      args.c = block.data();
      if (!apart) use_lora(args, b, t);
      kernel.strip(args);
      if (apart) {
        use_lora(args, b, t);
        kernel.expand(args);
      }
      for (int column = 0; column < kStripRows; ++column) {
        EXPECT_EQ(block[at(whole, kStripRows, column)], kGuard) << "row " << whole << " written";
        const int n = strip * kStripRows + column;
        for (int row = 0; row < count; ++row) {
          const float value = block[at(row, kStripRows, column)];
          if (n < n_) {
            c[at(row, n_, n)] = value;
          } else {
            EXPECT_EQ(value, 0.0f) << "padding row " << n;
          }
        }
      }
    }
    return c;
  }
  std::vector<float> run(const GemmKernel& kernel) { return run(kernel, 0, rows_); }

  // C of `strips` strips, [strips][count][32], by GemmKernel::side_by_side: strip i is that of W's
  // strips, taken in turn, and so are its first row of A's.
  std::vector<float> run_side_by_side(const GemmKernel& kernel, int strips, int count) {
    std::vector<AlignedVector<std::uint8_t>> a;
    std::vector<AlignedVector<std::uint16_t>> t, b;
    std::vector<GemmArgs> all;
    const int sums = count * kStripRows;
    std::vector<float> c(size(strips * sums), std::numeric_limits<float>::quiet_NaN());
    for (int i = 0; i < strips; ++i) {
      const int row = i % (rows_ - count + 1);
      const int strip = i % packed().layout.strips();
      a.push_back(activations(kernel, row, count));
      t.push_back(shrunk(kernel, row, count));
      b.push_back(expand(strip));
      GemmArgs args = weights(strip);
      args.a = a.back().data();
      args.tile_rows = 1;
      args.a_stride = a_row_bytes();
      args.rows = count;
      use_lora(args, b.back(), t.back());
      args.c = c.data() + i * sums;
      all.push_back(args);
    }
    kernel.side_by_side(all.data(), strips);
    return c;
  }

 private:
  static std::size_t size(int value) { return static_cast<std::size_t>(value); }
  static std::size_t at(int row, int width, int column) {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(width) +
           static_cast<std::size_t>(column);
  }
  CodedReference reference() const { return coded_reference(format_); }
  int groups() const {
    return reference().group == 0 ? 1 : (k_ + reference().group - 1) / reference().group;
  }
  int scale_rows() const { return (n_ + reference().rows - 1) / reference().rows; }
  int pairs() const { return (rank_ + 1) / 2; }
  int t_stride() const { return 2 * pairs() + 6; }
  int a_row_bytes() { return packed().layout.padded_k() * 2; }

  OwnedMatrix& packed() {
    if (packed_.codes.empty()) pack();
    return packed_;
  }
  void pack() {
    const int row_bytes = (k_ * reference().bits + 7) / 8;
    std::vector<std::uint8_t> codes(size(n_ * row_bytes));
    for (int row = 0; row < n_; ++row) {
      for (int k = 0; k < k_; ++k) {
        std::uint8_t& byte = codes[at(row, row_bytes, k * reference().bits / 8)];
        const int shift = reference().bits == 8 ? 0 : k % 2 * 4;
        byte = static_cast<std::uint8_t>(byte | code(row, k) << shift);
      }
    }
    std::vector<std::byte> scales;
    if (reference().scale_type == DType::kUint8) {
      for (const float scale : scales_) scales.push_back(std::byte(std::ilogb(scale) + 127));
    } else {
      scales = encode(scales_, reference().scale_type);
    }
    const TensorView code_view = view_of(codes.data(), DType::kUint8, {n_, row_bytes}, "codes");
    TensorView scale_view =
        view_of(scales.data(), reference().scale_type, {scale_rows(), groups()}, "scales");
    if (reference().group == 0) {
      scale_view = view_of(scales.data(), reference().scale_type, {scale_rows()}, "scales");
    }
    const CodedSource source{code_view, scale_view};
    check_coded(source, format_, n_, k_);
    packed_ = allocate(format_, n_, k_);
    for (int strip = 0; strip < packed_.layout.strips(); ++strip) {
      EXPECT_TRUE(pack_coded_strip(source, 0, packed_.view(), strip));
    }
  }

  GemmArgs weights(int strip) {
    const PackedMatrix w = packed().view();
    GemmArgs args{};
    args.w_block = w.codes + w.layout.tile_offset(strip, 0);
    args.block_rows = kStripRows;
    args.k = w.layout.padded_k();
    if (w.scales != nullptr) args.w_scale = w.scales + strip * w.layout.strip_scales();
    if (strip + 1 < w.layout.strips()) args.next = w.codes + w.layout.tile_offset(strip + 1, 0);
    return args;
  }

  void use_lora(GemmArgs& args, const AlignedVector<std::uint16_t>& b,
                const AlignedVector<std::uint16_t>& t) const {
    if (rank_ == 0) return;
    args.lora_b = b.data();
    args.t = t.data();
    args.t_stride = t_stride();
    args.rank_pairs = pairs();
  }

  AlignedVector<std::uint8_t> activations(const GemmKernel& kernel, int first, int count) {
    const int tile_rows = kernel.tile_rows(count);
    const int row_bytes = a_row_bytes();
    // Missing rows of the last tile hold NaN.
    AlignedVector<std::uint8_t> bytes(size(round_up(count, tile_rows) * row_bytes), 0xff);
    for (int row = 0; row < count; ++row) {
      for (int k = 0; k < row_bytes / 2; ++k) {
        const bf16_t bits = f32_to_bf16(k < k_ ? a_[at(first + row, k_, k)] : padding_);
        std::memcpy(&bytes[at(row / tile_rows, tile_rows * row_bytes,
                              2 * k / 64 * 64 * tile_rows + row % tile_rows * 64 + 2 * k % 64)],
                    &bits, 2);
      }
    }
    return bytes;
  }
  AlignedVector<std::uint16_t> shrunk(const GemmKernel& kernel, int first, int count) const {
    const int rows = round_up(count, kernel.tile_rows(count));
    AlignedVector<std::uint16_t> t(size(rows * t_stride() + 32), f32_to_bf16(1e30f));
    for (int row = 0; row < count; ++row) {
      for (int r = 0; r < rank_; ++r) {
        t[at(row, t_stride(), r)] = f32_to_bf16(t_[at(first + row, rank_, r)]);
      }
    }
    return t;
  }
  AlignedVector<std::uint16_t> expand(int strip) const {
    AlignedVector<std::uint16_t> b(size(pairs() * 2 * kStripRows), 0);
    for (int column = 0; column < kStripRows && strip * kStripRows + column < n_; ++column) {
      for (int r = 0; r < rank_; ++r) {
        b[size(r / 2 * 64 + column / 16 * 32 + column % 16 * 2 + r % 2)] =
            f32_to_bf16(b_[at(strip * kStripRows + column, rank_, r)]);
      }
    }
    return b;
  }

  const WeightFormat format_;
  const int n_;
  const int k_;
  const int rows_;
  int rank_ = 0;
  float padding_ = 0.0f;
  Random random_;
  std::vector<std::uint8_t> codes_;  // [n][k], one each
  std::vector<float> scales_;        // [scale rows][groups]
  OwnedMatrix packed_;               // made when first needed
  std::vector<float> a_, t_, b_;
};

}  // namespace ktrt::testing
