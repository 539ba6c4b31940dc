// Every weight format as its description says, independent of the code under test: where kt_kernel
// 0.7.2's packed buffer has an element, and how a weight becomes a code. A new format adds its row
// and, where it needs them, cases here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "layout/format_traits.h"

namespace ktrt::testing {

// One of each kind, for tests of layers: kt_kernel's, and coded formats with their scales outside
// and inside of the tiles.
inline constexpr WeightFormat kFormatKinds[] = {WeightFormat::kBf16, WeightFormat::kInt8,
                                                WeightFormat::kInt4, WeightFormat::kFp8,
                                                WeightFormat::kInt4G32};

// The relative error of a layer's output that the format costs, of normally distributed weights.
constexpr double cost_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return 0.006;
    case WeightFormat::kInt8:
      return 0.03;
    case WeightFormat::kInt4:
      return 0.3;
    case WeightFormat::kFp8:
    case WeightFormat::kFp8Channel:
      return 0.06;
    default:
      return 0.22;
  }
}

// Sizes in elements; V values of consecutive k fill 4 bytes.
struct FormatReference {
  int NB, KB, KT, V, bits;
  int largest;      // magnitude of the integers that kernels multiply
  int step;         // they are multiples of it
  float max_error;  // of a weight, in scales
};

constexpr FormatReference reference_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return {256, 1792, 32, 2, 16, 127, 1, 0.0f};
    case WeightFormat::kInt8:
      return {64, 3584, 64, 4, 8, 127, 1, 0.5f};
    case WeightFormat::kInt4:  // half an INT8 step, and half of 16
      return {128, 3584, 128, 4, 4, 112, 16, 8.5f};
    default:
      break;
  }
  return {};
}

// A row's scale; `largest` is its largest magnitude. kt_kernel's products: float32 for INT8, double
// for INT4.
inline float scale_of(float largest, WeightFormat format) {
  return format == WeightFormat::kInt4 ? static_cast<float>(double{largest} * (1.0 / 112.0))
                                       : largest * (1.0f / 127.0f);
}

// The integer that kernels multiply for a weight: rounded half to even, then to a multiple of the
// format's step, halves away from zero.
inline int code_of(float weight, float scale, WeightFormat format) {
  if (scale == 0.0f) return 0;
  const auto code = std::lrint(weight * (1.0f / scale));
  const int step = reference_of(format).step;
  return static_cast<int>(std::lround(static_cast<double>(code) / step)) * step;
}

// Element index of W[n][k] of a matrix N × K that fills whole tiles; BF16 and INT8.
inline std::size_t packed_index(WeightFormat format, int N, int K, int n, int k) {
  const auto [NB, KB, KT, V, bits, largest, step, error] = reference_of(format);
  const int nb = n / NB * NB;
  const int kb = k / KB * KB;
  const int nbs = std::min(NB, N - nb);
  const int kbs = std::min(KB, K - kb);
  const int n1 = n - nb;
  const int k1 = k - kb;
  return static_cast<std::size_t>(nb * K + kb * nbs + n1 / 32 * 32 * kbs + k1 / KT * KT * 32 +
                                  n1 % 32 / 16 * 16 * KT + k1 % KT / V * 16 * V + n1 % 16 * V +
                                  k1 % KT % V);
}

// Where an INT4 code lies: the nibble of a byte.
struct Nibble {
  std::size_t byte;
  bool high;
};

// The same for INT4, whose tile keeps its first 64 columns in the low nibbles.
inline Nibble packed_nibble(int N, int K, int n, int k) {
  const auto [NB, KB, KT, V, bits, largest, step, error] = reference_of(WeightFormat::kInt4);
  const int nb = n / NB * NB;
  const int kb = k / KB * KB;
  const int nbs = std::min(NB, N - nb);
  const int kbs = std::min(KB, K - kb);
  const int n1 = n - nb;
  const int c = (k - kb) % KT;
  const int kk = c % 64;
  const int tile = (nb * K + kb * nbs + n1 / 32 * 32 * kbs + (k - kb) / KT * KT * 32) / 2;
  const int byte = tile + n1 % 32 / 16 * 1024 + kk / V * 64 + n1 % 16 * V + kk % V;
  return {static_cast<std::size_t>(byte), c >= 64};
}

// The byte that holds W[n][k].
inline std::size_t packed_byte(WeightFormat format, int N, int K, int n, int k) {
  if (format == WeightFormat::kInt4) return packed_nibble(N, K, n, k).byte;
  return packed_index(format, N, K, n, k) * static_cast<std::size_t>(reference_of(format).bits / 8);
}

// The integer that kernels multiply for W[n][k], from packed codes; not for BF16.
inline int packed_code(const std::uint8_t* codes, WeightFormat format, int N, int K, int n, int k) {
  if (reference_of(format).bits == 8) {
    return static_cast<std::int8_t>(codes[packed_index(format, N, K, n, k)]);
  }
  const auto [byte, high] = packed_nibble(N, K, n, k);
  const int nibble = high ? codes[byte] >> 4 : codes[byte] & 15;
  return (nibble < 8 ? nibble : nibble - 16) * 16;
}

// The next size that fills whole tiles.
inline int padded_rows(int n) { return (n + 31) / 32 * 32; }
inline int padded_columns(WeightFormat format, int k) {
  const int KT = reference_of(format).KT;
  return (k + KT - 1) / KT * KT;
}

}  // namespace ktrt::testing
