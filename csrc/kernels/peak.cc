#include "kernels/peak.h"

#include <chrono>

namespace ktrt {

// One constant table per ISA file.
extern const PeakLoop peak_avx2;
extern const PeakLoop peak_avx_vnni;
extern const PeakLoop peak_avx_vnni_evex;
extern const PeakLoop peak_avx512;
extern const PeakLoop peak_avx512_vnni;
extern const PeakLoop peak_avx512_bf16;
extern const PeakLoop peak_amx[2];

std::vector<const PeakLoop*> peak_loops(Isa level, const CpuFeatures& f) {
  std::vector<const PeakLoop*> found;
  const auto add = [&](const PeakLoop& loop, Isa needs, bool runs) {
    if (runs && needs <= level) found.push_back(&loop);
  };
  add(peak_avx2, Isa::kAvx2, f.avx2);
  add(peak_avx_vnni, Isa::kAvxVnni, f.avx_vnni);
  add(peak_avx_vnni_evex, Isa::kAvxVnni, f.avx512_vnni && !f.avx_vnni);
  add(peak_avx512, Isa::kAvx512, f.avx512);
  add(peak_avx512_bf16, Isa::kAvx512, f.avx512_bf16);
  add(peak_avx512_vnni, Isa::kAvx512, f.avx512_vnni);
  add(peak_amx[0], Isa::kAmx, f.amx);
  add(peak_amx[1], Isa::kAmx, f.amx);
  return found;
}

double measure_peak(const PeakLoop& loop, double seconds) {
  using Clock = std::chrono::steady_clock;
  // Some ten microseconds: reading the clock is negligible.
  constexpr long kIterations = 2000;
  loop.run(kIterations);
  double iterations = 0;
  double elapsed = 0;
  const auto start = Clock::now();
  do {
    loop.run(kIterations);
    iterations += static_cast<double>(kIterations);
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return 2.0 * iterations * static_cast<double>(loop.multiply_adds) / elapsed;
}

}  // namespace ktrt
