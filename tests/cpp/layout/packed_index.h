// The position of an element in kt_kernel 0.7.2's packed buffer, by the formula that describes the
// format, independent of the code under test.
#pragma once

#include <algorithm>
#include <cstddef>

#include "layout/packed_layout.h"

namespace ktrt::testing {

// Sizes in elements; V values of consecutive k fill 4 bytes.
struct FormatNumbers {
  int NB, KB, KT, V, bits;
};

constexpr FormatNumbers numbers_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return {256, 1792, 32, 2, 16};
    case WeightFormat::kInt8:
      return {64, 3584, 64, 4, 8};
    case WeightFormat::kInt4:
      return {128, 3584, 128, 4, 4};
  }
  return {};
}

// Element index of W[n][k] of a matrix N × K that fills whole tiles; BF16 and INT8.
inline std::size_t packed_index(WeightFormat format, int N, int K, int n, int k) {
  const auto [NB, KB, KT, V, bits] = numbers_of(format);
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
  const auto [NB, KB, KT, V, bits] = numbers_of(WeightFormat::kInt4);
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

// The next size that fills whole tiles.
inline int padded_rows(int n) { return (n + 31) / 32 * 32; }
inline int padded_columns(WeightFormat format, int k) {
  const int KT = numbers_of(format).KT;
  return (k + KT - 1) / KT * KT;
}

}  // namespace ktrt::testing
