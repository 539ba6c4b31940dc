// AMX from the registers outwards: the peak of tile multiplications that never touch memory, strips
// of a GEMM on one core, the LoRA shrink, and whole layers of DeepSeek-V2-Lite's shape on all
// threads, with what is still tunable varied. Prints tables; fractions are of the tile peak.
//
//   bench_amx [peak] [strip] [shrink] [layer] [toggles] [emulated] [name=value …]
//
// Without a name of a part, all of them. Without AMX it says so and stops, but for `emulated`,
// which shows that it works, not how fast. Values: threads, experts, layers, seconds (per line),
// and the fields of AmxTuning.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/bf16.h"
#include "cpu/read_probe.h"
#include "cpu/topology.h"
#include "kernels/amx/tuning.h"
#include "kernels/select.h"
#include "moe/moe_layer.h"

namespace ktrt {
extern const GemmKernel gemm_bf16_amx_emulated;
extern const GemmKernel gemm_int8_amx_emulated;
extern const ShrinkKernel lora_shrink_amx_emulated;

namespace {

constexpr int kHidden = 2048;
constexpr int kIntermediate = 1408;
constexpr int kTopK = 6;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

const char* name_of_format(bool int8) { return int8 ? "int8" : "bf16"; }

struct Options {
  std::set<std::string> parts;
  std::map<std::string, int> values = {{"threads", 0}, {"experts", 64}, {"layers", 3}};
  double seconds = 0.25;
  bool wants(const char* part) const { return parts.empty() || parts.count(part) > 0; }
  int value(const char* name) const { return values.at(name); }
};

std::map<std::string, int*> tuning_fields(AmxTuning& t) {
  return {{"k_block", &t.k_block},      {"a_ahead", &t.a_ahead},
          {"stream_a", &t.stream_a},    {"job_rows", &t.job_rows},
          {"overlap", &t.overlap},      {"wide_down", &t.wide_down},
          {"next_a", &t.next_a},        {"quantize_once", &t.quantize_once},
          {"whole_jobs", &t.whole_jobs}};
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const std::size_t equals = arg.find('=');
    if (equals == std::string::npos) {
      options.parts.insert(arg);
      continue;
    }
    const std::string name = arg.substr(0, equals);
    const std::string value = arg.substr(equals + 1);
    if (name == "--benchmark_min_time") {  // of Google Benchmark: once, briefly
      options.parts = {"peak", "shrink"};
      continue;
    }
    auto fields = tuning_fields(amx_tuning);
    if (name == "seconds") {
      options.seconds = std::atof(value.c_str());
    } else if (fields.count(name) > 0) {
      *fields[name] = std::atoi(value.c_str());
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

double tile_peak(bool int8) {
  alignas(64) unsigned char config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = 64;
    config[48 + i] = 16;
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
  constexpr int kRounds = 5000;
  double best = 1e9;
  for (int i = 0; i < 200; ++i) {
    const double start = now();
    for (int r = 0; r < kRounds; ++r) {
      if (int8) {
        asm volatile(TDP4("tdpbssd"));
      } else {
        asm volatile(TDP4("tdpbf16ps"));
      }
    }
    best = std::min(best, now() - start);
  }
  asm volatile("tilerelease");
  return kRounds * 4.0 * 2 * 16 * 16 * (int8 ? 64 : 32) / best;
}

struct Peaks {
  double one[2] = {1e12, 1e12};    // bf16, int8: FLOP/s of one core
  double all[2] = {16e12, 16e12};  // of all threads together
};

Peaks measure_peaks(const std::vector<int>& cpus) {
  Peaks peaks;
  if (!cpu_features().amx) return peaks;
  for (const int int8 : {0, 1}) {
    peaks.one[int8] = tile_peak(int8 != 0);
    std::vector<double> each(cpus.size());
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < cpus.size(); ++i) {
      threads.emplace_back([&, i] {
        pin(cpus[i]);
        each[i] = tile_peak(int8 != 0);
      });
    }
    for (std::thread& thread : threads) thread.join();
    peaks.all[int8] = 0;
    for (const double rate : each) peaks.all[int8] += rate;
    std::printf("tile peak %s: one core %.0f, %zu threads %.0f GFLOP/s\n",
                name_of_format(int8 != 0), peaks.one[int8] / 1e9, cpus.size(),
                peaks.all[int8] / 1e9);
  }
  return peaks;
}

// ---- strips on one core

struct StripCase {
  StripCase(bool int8_, int rows_, int matrices_)
      : int8(int8_),
        rows(rows_),
        matrices(matrices_),
        layout(int8_ ? WeightFormat::kInt8 : WeightFormat::kBf16, kIntermediate, kHidden),
        stride(layout.row_bytes() + 64),
        w(layout.code_bytes() * static_cast<std::size_t>(matrices_)),
        a(static_cast<std::size_t>(stride) * static_cast<std::size_t>(rows_ + 64)),
        c(static_cast<std::size_t>(rows_ + 64) * 128),
        scales(static_cast<std::size_t>(std::max(rows_, kIntermediate)), 1.0f),
        lora_b(64 * 64, 0x3c00),
        t(static_cast<std::size_t>(rows_ + 64) * 96, 0x3c00) {
    std::memset(w.as<char>(), 0x3c, w.bytes());
    std::memset(a.as<char>(), 0x3c, a.bytes());
  }

  void run(const GemmKernel& kernel, int matrix, int first, int strips, int rank) {
    for (int s = first; s < first + strips; ++s) {
      GemmArgs g{};
      g.a = a.as<std::uint8_t>();
      g.tile_rows = kernel.tile_rows(rows);
      g.a_stride = stride * g.tile_rows;
      g.a_scale = scales.data();
      g.rows = rows;
      const std::uint8_t* codes =
          w.as<std::uint8_t>() + layout.code_bytes() * static_cast<std::size_t>(matrix);
      g.w_block = codes + layout.block_offset(s);
      g.block_rows = layout.block_rows(s);
      g.row_in_block = layout.row_in_block(s);
      g.k = layout.padded_k();
      g.w_scale = scales.data();
      if (s + 1 < layout.strips()) g.next = codes + layout.tile_offset(s + 1, 0);
      if (rank > 0) {
        g.lora_b = lora_b.data();
        g.rank_pairs = rank / 2;
        g.t = t.data();
        g.t_stride = 96;
      }
      g.c = c.as<float>();
      kernel.strip(g);
    }
  }

  double flops(int strips) const { return 2.0 * rows * kHidden * 32 * strips; }

  bool int8;
  int rows;
  int matrices;
  PackedLayout layout;
  std::int64_t stride;
  AlignedBuffer w;
  AlignedBuffer a;
  AlignedBuffer c;
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

const GemmKernel& gemm_of(bool int8) {
  const KernelTable table = select_kernels(active_isa(), cpu_features());
  if (table.gemm_bf16.many->tile_order) {
    return int8 ? *table.gemm_int8.many : *table.gemm_bf16.many;
  }
  return int8 ? gemm_int8_amx_emulated : gemm_bf16_amx_emulated;
}

// From L2: 4 strips again and again. From memory: one matrix after the other.
double l2_rate(StripCase& test, int rank) {
  return best_rate(test.flops(4), 1000, [&] { test.run(gemm_of(test.int8), 0, 0, 4, rank); });
}
double memory_rate(StripCase& test) {
  int matrix = 0;
  return best_rate(test.flops(44), 20,
                   [&] { test.run(gemm_of(test.int8), matrix++ % test.matrices, 0, 44, 0); });
}

void strips(const Peaks& peaks) {
  const bool amx = cpu_features().amx;
  const AmxTuning before = amx_tuning;
  std::printf(
      "\nstrips on one core (k 2048); L2 r8: with LoRA; memory: weights never in a cache\n");
  for (const bool int8 : {false, true}) {
    const double peak = peaks.one[int8];
    for (const int rows : {16, 32, 48, 64, 96, 128, 192, 256, 384, 512}) {
      if (!amx && rows > 48) continue;
      StripCase test(int8, rows, amx ? 64 : 1);
      const double base = l2_rate(test, 0);
      std::printf("%s rows %3d: L2 %6.0f GFLOP/s %3.0f %%, L2 r8 %6.0f, memory %6.0f %3.0f %%\n",
                  name_of_format(int8), rows, base / 1e9, 100 * base / peak, l2_rate(test, 8) / 1e9,
                  memory_rate(test) / 1e9, 100 * memory_rate(test) / peak);
    }
  }
  std::printf("\nstrips, variants: %% of peak from L2 | memory\n");
  for (const bool int8 : {false, true}) {
    for (const int rows : {64, 256}) {
      if (!amx && rows > 64) continue;
      StripCase test(int8, rows, amx ? 64 : 1);
      for (const int stream : {0, 1}) {
        for (const int k_block : {4, 8, 12, 16, 28, 1000}) {
          std::printf("%s rows %3d stream_a %d k_block %4d:", name_of_format(int8), rows, stream,
                      k_block);
          for (const int ahead : {0, 1, 2, 4}) {
            amx_tuning.k_block = k_block;
            amx_tuning.stream_a = stream;
            amx_tuning.a_ahead = ahead;
            std::printf("  ahead %d: %3.0f | %3.0f", ahead,
                        100 * l2_rate(test, 0) / peaks.one[int8],
                        100 * memory_rate(test) / peaks.one[int8]);
          }
          std::printf("\n");
          std::fflush(stdout);
        }
      }
    }
  }
  amx_tuning = before;
}

// ---- shrink on one core

void shrinks() {
  const KernelTable table = select_kernels(active_isa(), cpu_features());
  const ShrinkKernel* tiles =
      table.lora_shrink_tiles != nullptr ? table.lora_shrink_tiles : &lora_shrink_amx_emulated;
  std::printf("\nLoRA shrink on one core, k 2048, GFLOP/s\n");
  for (const int ranks : {16, 128}) {
    for (const int rows : {1, 2, 4, 8, 16, 64, 256}) {
      const int rows_in_tile = gemm_of(false).tile_rows(rows);
      std::vector<std::uint16_t> x(static_cast<std::size_t>(rows + 16) * (kHidden + 32), 0x3c00);
      std::vector<std::uint16_t> a(static_cast<std::size_t>(ranks) * kHidden, 0x3c00);
      std::vector<std::uint16_t> t(static_cast<std::size_t>(rows + 16) * 160);
      std::printf("ranks %3d rows %3d:", ranks, rows);
      for (const ShrinkKernel* kernel : {table.lora_shrink, tiles}) {
        const int tile_rows = kernel == tiles ? rows_in_tile : 1;
        const double rate = best_rate(2.0 * rows * kHidden * ranks, 1000, [&] {
          kernel->run({x.data(), tile_rows * (kHidden + 32), tile_rows, rows, a.data(), ranks / 16,
                       kHidden, t.data(), 160});
        });
        std::printf("  %s %.0f", kernel->name, rate / 1e9);
      }
      std::printf("\n");
    }
  }
}

// ---- whole layers

TensorView view(const void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView result;
  result.name = "array";
  result.data = const_cast<void*>(data);
  result.dtype = dtype;
  result.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), result.shape.begin());
  std::int64_t stride = 1;
  for (int d = result.ndim - 1; d >= 0; --d) {
    result.stride[static_cast<std::size_t>(d)] = stride;
    stride *= result.shape[static_cast<std::size_t>(d)];
  }
  return result;
}

class Layers {
 public:
  Layers(bool int8, const std::vector<int>& cpus, const Options& options)
      : int8_(int8), experts_(options.value("experts")), seconds_(options.seconds) {
    const int job_rows = amx_tuning.job_rows;
    amx_tuning.job_rows = 512;  // what the workspace has room for
    engine_ = std::make_shared<Engine>(cpus, 16384);
    amx_tuning.job_rows = job_rows;
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<bf16_t> w(std::size_t{kHidden} * kIntermediate);
    for (bf16_t& value : w) value = f32_to_bf16(normal(random_));
    const double start = now();
    for (int l = 0; l < options.value("layers"); ++l) {
      layers_.push_back(
          std::make_unique<MoeLayer>(engine_, MoeShape{experts_, kTopK, kHidden, kIntermediate},
                                     int8 ? WeightFormat::kInt8 : WeightFormat::kBf16));
      for (int e = 0; e < experts_; ++e) {
        const TensorView rows = view(w.data(), DType::kBfloat16, {kIntermediate, kHidden});
        layers_.back()->load_expert(e, rows, rows,
                                    view(w.data(), DType::kBfloat16, {kHidden, kIntermediate}));
      }
    }
    std::printf("\nlayers %s: %d threads, %zu layers of %d experts, loaded in %.1f s\n",
                name_of_format(int8), engine_->num_threads(), layers_.size(), experts_,
                now() - start);
    x_.resize(std::size_t{16384} * kHidden);
    for (std::size_t i = 0; i < x_.size(); ++i) {
      x_[i] = i < w.size() ? w[i] : x_[i - w.size() + 7];
    }
    out_.resize(x_.size());
  }

  void set_lora(int rank) {
    for (auto& layer : layers_) {
      if (rank == 0) {
        layer->clear_lora();
        continue;
      }
      const std::vector<float> values(
          static_cast<std::size_t>(experts_) * kHidden * static_cast<std::size_t>(rank), 0.01f);
      const auto pair = [&](int in, int out) {
        return LoraPair{view(values.data(), DType::kFloat32, {experts_, rank, in}),
                        view(values.data(), DType::kFloat32, {experts_, out, rank})};
      };
      layer->set_lora(pair(kHidden, kIntermediate), pair(kHidden, kIntermediate),
                      pair(kIntermediate, kHidden));
    }
  }

  // Prints one line; the layers in turn, each forward with routing of its own.
  void measure(const char* label, int qlen, int rank, const Peaks& peaks) {
    const std::vector<float> weights(static_cast<std::size_t>(qlen) * kTopK, 1.0f / kTopK);
    std::vector<double> times;
    double phases[3] = {};
    const double end = now() + seconds_;
    double distinct = 0;
    while (times.size() < 5 || (now() < end && times.size() < 1000)) {
      const std::vector<std::int64_t> ids = random_ids(qlen, distinct);
      double phase[3] = {};
      amx_tuning.phase_seconds = phase;
      const double start = now();
      layers_[times.size() % layers_.size()]->forward(
          view(x_.data(), DType::kBfloat16, {qlen, kHidden}),
          view(ids.data(), DType::kInt64, {qlen, kTopK}),
          view(weights.data(), DType::kFloat32, {qlen, kTopK}),
          view(out_.data(), DType::kBfloat16, {qlen, kHidden}));
      times.push_back(now() - start);
      for (int p = 0; p < 3; ++p) phases[p] += phase[p];
    }
    amx_tuning.phase_seconds = nullptr;
    const double n = static_cast<double>(times.size());
    const double flops =
        2.0 * qlen * kTopK * 3 * (1.0 * kHidden * kIntermediate + rank * (kHidden + kIntermediate));
    const double bytes =
        distinct / n *
        (3.0 * kHidden * kIntermediate * (int8_ ? 1 : 2) + rank * 6.0 * (kHidden + kIntermediate));
    const double time = median(times);
    const double least = *std::min_element(times.begin(), times.end());
    std::printf(
        "%-18s %s r%-2d q%-5d %5.0f rows/expert  %8.3f ms (min %8.3f)  %6.0f GFLOP/s %3.0f %% of "
        "peak (best %3.0f %%)  %4.0f GB/s  phases %.2f %.2f %.2f ms\n",
        label, name_of_format(int8_), rank, qlen, qlen * kTopK / (distinct / n), time * 1e3,
        least * 1e3, flops / time / 1e9, 100 * flops / time / peaks.all[int8_],
        100 * flops / least / peaks.all[int8_], bytes / time / 1e9, phases[0] / n * 1e3,
        phases[1] / n * 1e3, phases[2] / n * 1e3);
    std::fflush(stdout);
  }

  void print_probe() {
    const ReadProbe probe(std::size_t{512} << 20);
    std::vector<double> rates;
    for (int i = 0; i < 7; ++i) {
      rates.push_back(static_cast<double>(probe.bytes()) / engine_->run_probe(probe) / 1e9);
    }
    std::printf("read probe %.0f GB/s\n", median(rates));
  }

 private:
  std::vector<std::int64_t> random_ids(int qlen, double& distinct) {
    std::vector<char> seen(static_cast<std::size_t>(experts_), 0);
    std::vector<std::int64_t> ids;
    for (int token = 0; token < qlen; ++token) {
      std::int64_t chosen[kTopK];
      for (int slot = 0; slot < kTopK; ++slot) {
        do {
          chosen[slot] = static_cast<std::int64_t>(random_() % static_cast<unsigned>(experts_));
        } while (std::find(chosen, chosen + slot, chosen[slot]) != chosen + slot);
        ids.push_back(chosen[slot]);
        seen[static_cast<std::size_t>(chosen[slot])] = 1;
      }
    }
    for (const char c : seen) distinct += c;
    return ids;
  }

  const bool int8_;
  const int experts_;
  const double seconds_;
  std::mt19937 random_{1};
  std::shared_ptr<Engine> engine_;
  std::vector<std::unique_ptr<MoeLayer>> layers_;
  std::vector<bf16_t> x_;
  std::vector<bf16_t> out_;
};

void toggles(Layers& layers, const Peaks& peaks) {
  struct Toggle {
    const char* name;
    int value;
  };
  const Toggle all[] = {
      {"k_block", 8},   {"k_block", 28},   {"k_block", 1000},    {"a_ahead", 0},    {"a_ahead", 4},
      {"stream_a", 1},  {"job_rows", 128}, {"job_rows", 384},    {"job_rows", 512}, {"overlap", 0},
      {"wide_down", 0}, {"next_a", 0},     {"quantize_once", 0}, {"whole_jobs", 0}};
  for (const int qlen : {1024, 4096}) {
    layers.measure("default", qlen, 0, peaks);
    for (const Toggle& toggle : all) {
      const AmxTuning before = amx_tuning;
      *tuning_fields(amx_tuning)[toggle.name] = toggle.value;
      const std::string label = std::string(toggle.name) + "=" + std::to_string(toggle.value);
      layers.measure(label.c_str(), qlen, 0, peaks);
      amx_tuning = before;
    }
    layers.measure("default again", qlen, 0, peaks);
  }
}

void run(const Options& options) {
  const CpuFeatures& features = cpu_features();
  std::vector<int> cpus = read_topology(allowed_cpus()).cpu_ids();
  const int threads = options.value("threads");
  if (threads > 0) cpus.resize(static_cast<std::size_t>(threads));
  std::printf("isa %s, amx %d, %zu cpus\n", name_of(active_isa()), features.amx, cpus.size());
  const Peaks peaks = measure_peaks(cpus);
  if (options.wants("strip") || options.wants("shrink")) {
    std::thread one([&] {
      pin(cpus.back());
      if (options.wants("strip")) strips(peaks);
      if (options.wants("shrink")) shrinks();
    });
    one.join();
  }
  for (const bool int8 : {false, true}) {
    if (!options.wants("layer") && !options.wants("toggles")) break;
    Layers layers(int8, cpus, options);
    layers.print_probe();
    if (options.wants("layer")) {
      for (const int rank : {0, 8, 64}) {
        layers.set_lora(rank);
        for (const int qlen : {1, 4, 16, 64, 256, 1024, 2731, 4096, 16384}) {
          layers.measure("", qlen, rank, peaks);
        }
      }
      layers.set_lora(0);
    }
    if (options.wants("toggles")) toggles(layers, peaks);
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
