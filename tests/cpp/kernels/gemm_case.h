// A GEMM with its exact result, and how to run a kernel on it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "base/bf16.h"
#include "helpers/aligned_vector.h"
#include "helpers/format_reference.h"
#include "helpers/packed.h"
#include "helpers/random.h"
#include "kernels/kernel_table.h"

namespace ktrt::testing {

// C [rows][n] = scales · A Wᵀ + T Bᵀ. A and W hold BF16 values; or integers in [-127, 127], of
// which an INT4 W holds the multiples of 16.
class GemmCase {
 public:
  GemmCase(WeightFormat format, int n, int k, int rows, std::uint64_t seed = 1)
      : format_(format), n_(n), k_(k), rows_(rows), random_(seed) {
    w_ = random_values(n * k, largest_w());
    a_ = random_values(rows * k, 127);
    if (const auto step = static_cast<float>(reference_of(format).step); step > 1.0f) {
      for (float& value : w_) value = step * std::trunc(value / step);
    }
    // A row with the largest value has scale 1, so that its integers are its codes.
    if (quantized()) {
      for (int row = 0; row < n; ++row) w_[at(row, k, 0)] = static_cast<float>(largest_w());
    }
    a_scale_.assign(size(rows), 1.0f);
    pack_weights();
    if (quantized()) {
      for (float& scale : a_scale_) scale = static_cast<float>(random_.uniform(0.01, 0.1));
      for (float& scale : packed_.scales) scale = static_cast<float>(random_.uniform(0.001, 0.01));
    }
  }

  // Integer results: all scales 1.
  void use_unit_scales() {
    a_scale_.assign(a_scale_.size(), 1.0f);
    packed_.scales.assign(packed_.scales.size(), 1.0f);
  }

  // Every |a| and |w| is as large as can be: the largest sums, of alternating sign.
  void use_extreme_codes() {
    for (int row = 0; row < n_; ++row) {
      const auto value = static_cast<float>(row % 2 == 0 ? largest_w() : -largest_w());
      for (int k = 0; k < k_; ++k) w_[at(row, k_, k)] = value;
    }
    for (int row = 0; row < rows_; ++row) {
      for (int k = 0; k < k_; ++k) a_[at(row, k_, k)] = row % 3 == 0 ? -127.0f : 127.0f;
    }
    pack_weights();
    use_unit_scales();
  }

  void add_lora(int rank) {
    rank_ = rank;
    t_ = random_.normals(size(rows_ * rank), 0.5f);
    b_ = random_.normals(size(n_ * rank), 0.1f);
    for (float& value : t_) value = round_to_bf16(value);
    for (float& value : b_) value = round_to_bf16(value);
  }
  void clear_b() { b_.assign(b_.size(), 0.0f); }

  // Adds ranks whose B is zero and whose T is not.
  void pad_rank(int rank) {
    std::vector<float> t = random_.normals(size(rows_ * rank));
    std::vector<float> b(size(n_ * rank), 0.0f);
    for (float& value : t) value = round_to_bf16(value);
    for (int r = 0; r < rank_; ++r) {
      for (int row = 0; row < rows_; ++row) t[at(row, rank, r)] = t_[at(row, rank_, r)];
      for (int row = 0; row < n_; ++row) b[at(row, rank, r)] = b_[at(row, rank_, r)];
    }
    t_ = t;
    b_ = b;
    rank_ = rank;
  }

  // The value of A between k and the padded k: a BF16 value or an INT8 code.
  void set_padding(float value) { padding_ = value; }

  int n() const { return n_; }
  int k() const { return k_; }
  int rows() const { return rows_; }
  bool quantized() const { return quantizes_rows(format_); }

  // Rows [first, first + count) of C, [count][n].
  // `apart`: LoRA by GemmKernel::expand.
  std::vector<float> run(const GemmKernel& kernel, int first, int count, bool apart = false) {
    std::vector<float> c(size(count * n_));
    const AlignedVector<std::uint8_t> a = activations(kernel, first, count);
    const AlignedVector<std::uint16_t> t = shrunk(kernel, first, count);
    constexpr float kGuard = 12345.0f;
    for (int strip = 0; strip < packed_.layout.strips(); ++strip) {
      const AlignedVector<std::uint16_t> b = expand(strip);
      const int whole = round_up(count, kernel.tile_rows(count));
      AlignedVector<float> block(size((whole + 1) * kStripRows),
                                 std::numeric_limits<float>::quiet_NaN());
      std::fill(block.end() - kStripRows, block.end(), kGuard);
      GemmArgs args = weights(strip);
      args.a = a.data();
      args.tile_rows = kernel.tile_rows(count);
      args.a_stride = args.tile_rows * a_row_bytes();
      args.a_scale = quantized() ? a_scale_.data() + first : nullptr;
      args.rows = count;
      args.c = block.data();
      if (!apart) use_lora(args, b, t);
      kernel.strip(args);
      if (apart) expand_runs(kernel, args, b, t);
      for (int column = 0; column < kStripRows; ++column) {
        EXPECT_EQ(block[at(whole, kStripRows, column)], kGuard) << "row " << whole << " written";
        const int n = strip * kStripRows + column;
        for (int row = 0; row < count && n < n_; ++row) {
          c[at(row, n_, n)] = block[at(row, kStripRows, column)];
        }
      }
    }
    return c;
  }
  std::vector<float> run(const GemmKernel& kernel) { return run(kernel, 0, rows_); }

  // C of `strips` strips, [strips][count][32], by GemmKernel::side_by_side in a single call: strip
  // i is that of W's strips, taken in turn, and so are its first row of A's.
  std::vector<float> run_side_by_side(const GemmKernel& kernel, int strips, int count) {
    std::vector<AlignedVector<std::uint8_t>> a;
    std::vector<AlignedVector<std::uint16_t>> t, b;
    std::vector<GemmArgs> all;
    const int sums = count * kStripRows;
    std::vector<float> c(size(strips * sums), std::numeric_limits<float>::quiet_NaN());
    for (int i = 0; i < strips; ++i) {
      const int row = i % (rows_ - count + 1);
      const int strip = i % packed_.layout.strips();
      a.push_back(activations(kernel, row, count));
      t.push_back(shrunk(kernel, row, count));
      b.push_back(expand(strip));
      GemmArgs args = weights(strip);
      args.a = a.back().data();
      args.tile_rows = 1;
      args.a_stride = a_row_bytes();
      args.a_scale = quantized() ? a_scale_.data() + row : nullptr;
      args.rows = count;
      use_lora(args, b.back(), t.back());
      args.c = c.data() + i * sums;
      all.push_back(args);
    }
    kernel.side_by_side(all.data(), strips);
    return c;
  }

  struct Exact {
    double value;
    double tolerance;
  };

  // The error of a float32 sum of m terms in any order grows like √m · 2^-24 · Σ|terms| (Higham and
  // Mary 2019); twice that is allowed. Integer sums are exact and count as one term with three
  // roundings.
  Exact exact(int row, int n) const {
    constexpr double kUnit = 0x1p-24;
    double sum = 0.0;
    double magnitude = 0.0;
    for (int k = 0; k < k_; ++k) {
      const double product = double{a_[at(row, k_, k)]} * w_[at(n, k_, k)];
      sum += product;
      magnitude += std::fabs(product);
    }
    double terms = k_;
    if (quantized()) {
      sum *= double{a_scale_[size(row)]} * packed_.scales[size(n)];
      magnitude = std::fabs(sum);
      terms = 3;
    }
    for (int r = 0; r < rank_; ++r) {
      const double product = double{t_[at(row, rank_, r)]} * b_[at(n, rank_, r)];
      sum += product;
      magnitude += std::fabs(product);
    }
    return {sum, 2.0 * std::sqrt(terms + rank_) * kUnit * magnitude};
  }

 private:
  // Rows in three runs, as rows of three LoRAs are; C beyond them stays.
  void expand_runs(const GemmKernel& kernel, GemmArgs args, const AlignedVector<std::uint16_t>& b,
                   const AlignedVector<std::uint16_t>& t) const {
    use_lora(args, b, t);
    const int ends[] = {args.rows / 3, args.rows - args.rows / 2, args.rows};
    int first = 0;
    for (const int end : ends) {
      ExpandArgs run = args;
      run.rows = end - first;
      run.t = args.t + first * args.t_stride;
      run.c = args.c + first * kStripRows;
      const std::vector<float> after(run.c + run.rows * kStripRows,
                                     args.c + args.rows * kStripRows);
      if (run.rows > 0) kernel.expand(run);
      EXPECT_TRUE(std::equal(after.begin(), after.end(), run.c + run.rows * kStripRows));
      first = end;
    }
  }

  static std::size_t size(int value) { return static_cast<std::size_t>(value); }
  static std::size_t at(int row, int width, int column) {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(width) +
           static_cast<std::size_t>(column);
  }
  int pairs() const { return (rank_ + 1) / 2; }
  int t_stride() const { return 2 * pairs() + 6; }

  int largest_w() const { return reference_of(format_).largest; }
  int a_row_bytes() const { return packed_.layout.padded_k() * (quantized() ? 1 : 2); }

  // Normal BF16 values, or integers in [-largest, largest].
  std::vector<float> random_values(int count, int largest) {
    std::vector<float> values(size(count));
    for (float& value : values) {
      value = quantized() ? static_cast<float>(random_.integer(-largest, largest))
                          : round_to_bf16(random_.normal());
    }
    return values;
  }

  void pack_weights() { packed_ = pack(format_, n_, k_, w_); }

  AlignedVector<std::uint8_t> activations(const GemmKernel& kernel, int first, int count) const {
    const int padded = packed_.layout.padded_k();
    const int row_bytes = a_row_bytes();
    const int tile_rows = kernel.tile_rows(count);
    // Missing rows of the last tile hold what would show anywhere: NaN, or -1.
    AlignedVector<std::uint8_t> bytes(size(round_up(count, tile_rows) * row_bytes), 0xff);
    for (int row = 0; row < count; ++row) {
      for (int k = 0; k < padded; ++k) {
        const float value = k < k_ ? a_[at(first + row, k_, k)] : padding_;
        const int byte = quantized() ? k : 2 * k;
        std::uint8_t* out =
            &bytes[at(row / tile_rows, tile_rows * row_bytes,
                      byte / 64 * 64 * tile_rows + row % tile_rows * 64 + byte % 64)];
        if (quantized()) {
          *out = static_cast<std::uint8_t>(static_cast<int>(value) + kernel.activation_offset);
        } else {
          const bf16_t bits = f32_to_bf16(value);
          std::memcpy(out, &bits, 2);
        }
      }
    }
    return bytes;
  }

  void use_lora(GemmArgs& args, const AlignedVector<std::uint16_t>& b,
                const AlignedVector<std::uint16_t>& t) const {
    if (rank_ == 0) return;
    args.lora_b = b.data();
    args.t = t.data();
    args.t_stride = t_stride();
    args.rank_pairs = pairs();
  }

  GemmArgs weights(int strip) {
    const PackedMatrix w = packed_.view();
    GemmArgs args{};
    args.w_block = w.codes + w.layout.block_offset(strip);
    args.block_rows = w.layout.block_rows(strip);
    args.row_in_block = w.layout.row_in_block(strip);
    args.k = w.layout.padded_k();
    if (quantized()) {
      args.w_scale = w.scales + strip * kStripRows;
      args.w_sum = w.sums + strip * kStripRows;
    }
    if (strip + 1 < w.layout.strips()) args.next = w.codes + w.layout.tile_offset(strip + 1, 0);
    return args;
  }

  // Odd ranks are padded by a zero in B; the T that it meets may be anything finite.
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
  OwnedMatrix packed_;
  std::vector<float> w_, a_, a_scale_, t_, b_;
};

}  // namespace ktrt::testing
