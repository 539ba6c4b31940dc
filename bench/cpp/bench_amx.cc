// AMX from the registers outwards: the peak of tile multiplications that never touch memory, strips
// of a GEMM on one core and on all at once, the LoRA shrink, and whole layers of DeepSeek-V2-Lite's
// shape on all threads. Prints tables; fractions are of the tile peak.
//
//   bench_amx [peak] [strip] [at_once] [few] [shrink] [layer] [emulated] [format …] [name=value …]
//
// Without a name of a part, all of them; without one of a format, all formats. Without AMX it says
// so and stops, but for `emulated`, which shows that it works, not how fast. Values: threads,
// experts, layers, seconds (per line), from and to (the fewest and most tokens of a layer's
// forward), rank and bits (of the weights): only those.
//
// `few` prints what the constants of kernels/select.cc need: per format and number of rows the
// times of both kernels, and from which number on tiles win.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "amx_layers.h"
#include "cpu/topology.h"
#include "kernels/select.h"

namespace ktrt {
namespace {

struct Options {
  std::set<std::string> parts;
  std::set<std::string> formats;
  std::map<std::string, int> values = {{"threads", 0}, {"experts", 64}, {"layers", 3}, {"from", 1},
                                       {"to", 16384},  {"rank", -1},    {"bits", -1}};
  double seconds = 0.25;
  bool wants(const char* part) const { return parts.empty() || parts.count(part) > 0; }
  // -1: any.
  bool wants_value(const char* name, int value) const {
    return values.at(name) == -1 || values.at(name) == value;
  }
  bool wants_format(WeightFormat format) const {
    return (formats.empty() || formats.count(name_of(format)) > 0) &&
           wants_value("bits", traits_of(format).bits);
  }
  int value(const char* name) const { return values.at(name); }
};

bool is_format(const std::string& name) {
  return std::any_of(std::begin(kWeightFormats), std::end(kWeightFormats),
                     [&](WeightFormat format) { return name == name_of(format); });
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const std::size_t equals = arg.find('=');
    if (equals == std::string::npos) {
      (is_format(arg) ? options.formats : options.parts).insert(arg);
      continue;
    }
    const std::string name = arg.substr(0, equals);
    const std::string value = arg.substr(equals + 1);
    if (name == "--benchmark_min_time") {  // of Google Benchmark: once, briefly
      options.parts = {"peak", "shrink"};
      continue;
    }
    if (name == "seconds") {
      options.seconds = std::atof(value.c_str());
    } else if (options.values.count(name) > 0) {
      options.values[name] = std::atoi(value.c_str());
    } else {
      std::printf("unknown: %s\n", name.c_str());
      std::exit(2);
    }
  }
  return options;
}

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

// ---- peak

#define TDP4(name)                                                                               \
  name " %tmm6, %tmm4, %tmm0\n" name " %tmm7, %tmm4, %tmm1\n" name " %tmm6, %tmm5, %tmm2\n" name \
       " %tmm7, %tmm5, %tmm3\n"

// Normally distributed: BF16, or INT8 codes whose largest is about 127; from 1 MB on again the
// same.
void fill_operands(bool int8, unsigned char* operands, std::size_t bytes) {
  constexpr std::size_t kPeriod = (std::size_t{1} << 20) + 62;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, int8 ? 36.0f : 0.02f);
  for (std::size_t i = kPeriod; i < bytes; i += kPeriod) {
    if (i == kPeriod) fill_operands(int8, operands, kPeriod);
    std::memcpy(operands + i, operands, std::min(kPeriod, bytes - i));
  }
  if (bytes > kPeriod) return;
  for (std::size_t i = 0; i < bytes; i += int8 ? 1 : 2) {
    const float value = normal(random);
    if (int8) {
      operands[i] = static_cast<unsigned char>(std::lround(std::clamp(value, -127.0f, 127.0f)));
    } else {
      const bf16_t rounded = f32_to_bf16(value);
      std::memcpy(operands + i, &rounded, 2);
    }
  }
}

// FLOP/s over `seconds` from `start` on, so that threads on one core share it. The operands are
// numbers as layers have them: with zeros in the tiles an Emerald Rapids core runs 20 to 30 %
// faster.
double tile_peak(bool int8, double start, double seconds) {
  alignas(64) unsigned char config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = 64;
    config[48 + i] = 16;
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
  alignas(64) unsigned char operands[4][1024];
  fill_operands(int8, operands[0], sizeof(operands));
  asm volatile("tileloadd (%0,%1,1), %%tmm4" : : "r"(operands[0]), "r"(64L) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm5" : : "r"(operands[1]), "r"(64L) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm6" : : "r"(operands[2]), "r"(64L) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm7" : : "r"(operands[3]), "r"(64L) : "memory");
  constexpr int kRounds = 5000;
  double done = 0;
  double end = 0;
  while (now() < start) {
  }
  do {
    for (int r = 0; r < kRounds; ++r) {
      if (int8) {
        asm volatile(TDP4("tdpbssd"));
      } else {
        asm volatile(TDP4("tdpbf16ps"));
      }
    }
    done += kRounds;
    end = now();
  } while (end < start + seconds);
  asm volatile("tilerelease");
  return done * 4.0 * 2 * 16 * 16 * (int8 ? 64 : 32) / (end - start);
}

// All of `cpus` at once.
double tile_peak_of(const std::vector<int>& cpus, bool int8, double seconds) {
  std::vector<double> each(cpus.size());
  std::vector<std::thread> threads;
  const double start = now() + 0.003;
  for (std::size_t i = 0; i < cpus.size(); ++i) {
    threads.emplace_back([&, i] {
      pin(cpus[i]);
      each[i] = tile_peak(int8, start, seconds);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::accumulate(each.begin(), each.end(), 0.0);
}

Peaks measure_peaks(const std::vector<int>& cpus) {
  Peaks peaks;
  if (!cpu_features().amx) return peaks;
  for (const int int8 : {0, 1}) {
    peaks.one[int8] = tile_peak_of({cpus.front()}, int8 != 0, 0.1);
    const double all = tile_peak_of(cpus, int8 != 0, 0.1);
    std::printf("tile peak %s: one core %.0f, %zu threads %.0f GFLOP/s\n",
                int8 != 0 ? "integers" : "bf16", peaks.one[int8] / 1e9, cpus.size(), all / 1e9);
  }
  peaks.all_now = [&cpus](bool int8) { return tile_peak_of(cpus, int8, 0.01); };
  return peaks;
}

// ---- strips on one core

struct StripCase {
  StripCase(WeightFormat format, int rows_, int matrices_)
      : rows(rows_),
        matrices(matrices_),
        layout(format, kIntermediate, kHidden),
        stride(layout.padded_k() * (quantizes_rows(format) ? 1 : 2) + 64),
        w(layout.code_bytes() * static_cast<std::size_t>(matrices_)),
        a(static_cast<std::size_t>(stride) * static_cast<std::size_t>(rows_ + 64)),
        c(static_cast<std::size_t>(rows_ + 64) * 128 * kMaxSideStrips),
        sums(kIntermediate),
        scales(static_cast<std::size_t>(std::max(rows_, kHidden)), 1.0f),
        lora_b(64 * 64, 0x3c00),
        t(static_cast<std::size_t>(rows_ + 64) * 96, 0x3c00) {
    // Codes of coded formats may be anything, but for scales, which follow them.
    const bool coded = is_coded(format);
    if (coded) std::memset(w.as<char>(), 0x3c, w.bytes());
    if (!coded) fill_operands(quantizes_rows(format), w.as<unsigned char>(), w.bytes() & ~1ul);
    fill_operands(quantizes_rows(format), a.as<unsigned char>(), a.bytes() & ~1ul);
  }

  GemmArgs args(const GemmKernel& kernel, int matrix, int strip, int rank) const {
    GemmArgs g{};
    g.a = a.as<std::uint8_t>();
    g.tile_rows = kernel.tile_rows(rows);
    g.a_stride = stride * g.tile_rows;
    g.a_scale = scales.data();
    g.rows = rows;
    const std::uint8_t* codes =
        w.as<std::uint8_t>() + layout.code_bytes() * static_cast<std::size_t>(matrix);
    g.w_block = codes + layout.block_offset(strip);
    g.block_rows = layout.block_rows(strip);
    g.row_in_block = layout.row_in_block(strip);
    g.k = layout.padded_k();
    g.w_scale = scales.data();
    g.w_sum = sums.data();
    if (strip + 1 < layout.strips()) g.next = codes + layout.tile_offset(strip + 1, 0);
    if (rank > 0) {
      g.lora_b = lora_b.data();
      g.rank_pairs = rank / 2;
      g.t = t.data();
      g.t_stride = 96;
    }
    g.c = c.as<float>();
    return g;
  }

  void run(const GemmKernel& kernel, int matrix, int first, int strips, int rank) {
    GemmArgs side[kMaxSideStrips];
    const bool beside = kernel.side_by_side != nullptr && rows <= kernel.side_rows;
    const int most = beside ? side_strips(rows) : 1;
    for (int s = first; s < first + strips; s += most) {
      const int count = std::min(most, first + strips - s);
      for (int i = 0; i < count; ++i) {
        side[i] = args(kernel, matrix, s + i, rank);
        side[i].c += i * rows * 32;
      }
      if (beside) {
        kernel.side_by_side(side, count);
      } else {
        kernel.strip(side[0]);
      }
    }
  }

  double flops(int strips) const { return 2.0 * rows * kHidden * 32 * strips; }

  int rows;
  int matrices;
  PackedLayout layout;
  std::int64_t stride;
  AlignedBuffer w;
  AlignedBuffer a;
  AlignedBuffer c;
  std::vector<std::int32_t> sums;
  std::vector<float> scales;
  std::vector<std::uint16_t> lora_b;
  std::vector<std::uint16_t> t;
};

double best_rate(double flops, int most, const std::function<void()>& run) {
  double best = 1e9;
  const double end = now() + 0.04;
  for (int i = 0; i < most && (i < 3 || now() < end); ++i) {
    const double start = now();
    run();
    best = std::min(best, now() - start);
  }
  return flops / best;
}

GemmChoice gemm_of(WeightFormat format) {
  const KernelTable table = select_kernels(active_isa(), cpu_features());
  if (table.gemm(format).many->tile_order) return table.gemm(format);
  return {table.gemm(format).few, &emulated_amx_gemm(format), 0};
}

// From L2: 4 strips again and again. From memory: one matrix after the other.
double l2_rate(StripCase& test, const GemmKernel& gemm, int rank) {
  return best_rate(test.flops(4), 1000, [&] { test.run(gemm, 0, 0, 4, rank); });
}
double memory_rate(StripCase& test, const GemmKernel& gemm) {
  int matrix = 0;
  return best_rate(test.flops(44), 20, [&] { test.run(gemm, matrix++ % test.matrices, 0, 44, 0); });
}

// Both kernels where few rows leave a choice.
void strips(const Options& options) {
  const bool amx = cpu_features().amx;
  std::printf(
      "\nstrips on one core (k 2048); L2 r8: with LoRA; memory: weights never in a cache\n");
  for (const WeightFormat format : kWeightFormats) {
    if (!options.wants_format(format)) continue;
    const GemmChoice gemm = gemm_of(format);
    for (const int rows : {1, 2, 4, 6, 8, 12, 16, 32, 48, 64, 96, 128, 192, 256}) {
      if (!amx && rows > 48) continue;
      StripCase test(format, rows, amx ? 64 : 1);
      for (const GemmKernel* kernel : {gemm.few, gemm.many}) {
        if (kernel == gemm.few && rows > 16) continue;
        const double peak = amx ? tile_peak(quantizes_rows(format), now(), 0.005) : 1e12;
        const double base = l2_rate(test, *kernel, 0);
        const double memory = memory_rate(test, *kernel);
        std::printf("%s rows %3d %-16s: L2 %6.0f GFLOP/s %3.0f %%, L2 r8 %6.0f, memory %6.0f\n",
                    name_of(format), rows, kernel->name, base / 1e9, 100 * base / peak,
                    l2_rate(test, *kernel, 8) / 1e9, memory / 1e9);
      }
      std::fflush(stdout);
    }
  }
}

// Every thread its own strips, all at the same time: what a layer can reach at most.
void strips_at_once(const Options& options, const std::vector<int>& cpus, const Peaks& peaks) {
  constexpr double kSeconds = 0.05;
  std::printf("\nstrips on %zu threads at once, 256 rows, k 2048\n", cpus.size());
  for (const WeightFormat format : kWeightFormats) {
    if (!options.wants_format(format)) continue;
    for (const bool from_memory : {false, true}) {
      std::atomic<int> ready{0};
      std::vector<double> rates(cpus.size());
      const auto run = [&](std::size_t thread) {
        pin(cpus[thread]);
        StripCase test(format, 256, from_memory ? 16 : 1);
        const GemmKernel& kernel = *gemm_of(format).many;
        const int strips = from_memory ? 44 : 4;
        int matrix = 0;
        test.run(kernel, 0, 0, strips, 0);
        for (++ready; ready < static_cast<int>(cpus.size());) std::this_thread::yield();
        const double start = now();
        double done = 0;
        while (now() < start + kSeconds) {
          test.run(kernel, matrix++ % test.matrices, 0, strips, 0);
          done += test.flops(strips);
        }
        rates[thread] = done / (now() - start);
      };
      std::vector<std::thread> threads;
      for (std::size_t i = 0; i < cpus.size(); ++i) threads.emplace_back(run, i);
      for (std::thread& thread : threads) thread.join();
      const double rate = std::accumulate(rates.begin(), rates.end(), 0.0);
      std::printf("%s from %s: %6.0f GFLOP/s, %3.0f %%\n", name_of(format),
                  from_memory ? "memory" : "L2", rate / 1e9,
                  100 * rate / peaks.all_now(quantizes_rows(format)));
      std::fflush(stdout);
    }
  }
}

// From which number of rows on tiles win. Strips are taken side by side where layers do.
void few_rows(const Options& options) {
  constexpr int kStrips = 8;
  std::printf("\nfew rows on one core, 8 strips of k 2048 from L2: µs of AVX-512, of tiles\n");
  for (const WeightFormat format : kWeightFormats) {
    if (!options.wants_format(format)) continue;
    const GemmChoice gemm = gemm_of(format);
    int from = 0;
    for (int rows = 1; rows <= 16; ++rows) {
      StripCase test(format, rows, 1);
      const auto time = [&](const GemmKernel& kernel) {
        return 1.0 / best_rate(1.0, 1000, [&] { test.run(kernel, 0, 0, kStrips, 0); });
      };
      const double few = time(*gemm.few);
      const double tiles = time(*gemm.many);
      if (tiles > few) {
        from = 0;
      } else if (from == 0) {
        from = rows;
      }
      std::printf("%s rows %2d: %7.2f %7.2f\n", name_of(format), rows, few * 1e6, tiles * 1e6);
    }
    const std::string found = from == 0 ? "more than 16" : std::to_string(from);
    std::printf("%s: tiles from %s rows on (select.cc: %d)\n", name_of(format), found.c_str(),
                gemm.many_from);
    std::fflush(stdout);
  }
}

// ---- shrink on one core

void shrinks() {
  const KernelTable table = select_kernels(active_isa(), cpu_features());
  const ShrinkKernel* tiles =
      table.lora_shrink_tiles != nullptr ? table.lora_shrink_tiles : &emulated_amx_shrink();
  std::printf("\nLoRA shrink on one core, k 2048, GFLOP/s\n");
  for (const int ranks : {16, 128}) {
    for (const int rows : {1, 2, 4, 8, 16, 64, 256}) {
      const int rows_in_tile = gemm_of(WeightFormat::kBf16).many->tile_rows(rows);
      std::vector<std::uint16_t> x(static_cast<std::size_t>(rows + 16) * (kHidden + 32), 0x3c00);
      std::vector<std::uint16_t> a(static_cast<std::size_t>(ranks) * kHidden, 0x3c00);
      std::vector<std::uint16_t> t(static_cast<std::size_t>(rows + 16) * 160);
      std::printf("ranks %3d rows %3d:", ranks, rows);
      for (const ShrinkKernel* kernel : {table.lora_shrink, tiles}) {
        const int tile_rows = kernel == tiles ? rows_in_tile : 1;
        const double rate = best_rate(2.0 * rows * kHidden * ranks, 1000, [&] {
          kernel->run({x.data(), tile_rows * (kHidden + 32), tile_rows, 0, rows, a.data(),
                       ranks / 16, kHidden, t.data(), 160});
        });
        std::printf("  %s %.0f", kernel->name, rate / 1e9);
      }
      std::printf("\n");
    }
  }
}

void run(const Options& options) {
  const CpuFeatures& features = cpu_features();
  std::vector<int> cpus = read_topology(allowed_cpus()).cpu_ids();
  const int threads = options.value("threads");
  if (threads > 0) cpus.resize(static_cast<std::size_t>(threads));
  std::printf("isa %s, amx %d, %zu cpus\n", name_of(active_isa()), features.amx, cpus.size());
  const Peaks peaks = measure_peaks(cpus);
  if (options.wants("strip") || options.wants("few") || options.wants("shrink")) {
    std::thread one([&] {
      pin(cpus.back());
      if (options.wants("strip")) strips(options);
      if (options.wants("few")) few_rows(options);
      if (options.wants("shrink")) shrinks();
    });
    one.join();
  }
  if (options.wants("at_once") && features.amx) strips_at_once(options, cpus, peaks);
  if (!options.wants("layer")) return;
  for (const WeightFormat format : kWeightFormats) {
    if (!options.wants_format(format)) continue;
    Layers layers(format, cpus, options.value("experts"), options.value("layers"), options.seconds);
    layers.print_probe();
    for (const int rank : {0, 8, 64}) {
      if (!options.wants_value("rank", rank)) continue;
      layers.set_lora(rank);
      for (const int qlen : {1, 4, 16, 64, 256, 1024, 2731, 4096, 5461, 10923, 16384}) {
        if (qlen >= options.value("from") && qlen <= options.value("to"))
          layers.measure(qlen, rank, peaks);
      }
    }
  }
}

}  // namespace
}  // namespace ktrt

int main(int argc, char** argv) {
  const ktrt::Options options = ktrt::parse(argc, argv);
  if (!ktrt::cpu_features().amx && options.parts.count("emulated") == 0) {
    std::printf("this machine has no AMX\n");
    return 0;
  }
  ktrt::run(options);
  return 0;
}
