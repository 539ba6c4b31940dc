#include "moe/expands.h"

#include <utility>

namespace ktrt {

namespace {

// Where the shrunk ranks of a part start in a row.
int first_rank(const RowMixes::Part& part, Projection projection) {
  return (projection == Projection::kDown ? part.down_first : part.input_first) +
         part.lora->expand(projection).t_offset;
}

}  // namespace

std::int64_t Expands::t_stride(Projection projection) const {
  return projection == Projection::kDown ? rows_.strides().t_down : rows_.strides().t_input;
}

void Expands::fuse(GemmArgs& args, const Job& job, Projection projection, int strip,
                   const std::uint16_t* t) const {
  if (job.runs > 1) return;
  for (const RowMixes::Part& part : task_.mixes.mix(task_.plan.runs(job)[0].mix).parts) {
    const ExpertLora::Expand& expand = part.lora->expand(projection);
    if (expand.rank_pairs == 0) continue;
    args.lora_b = expand.of(job.expert, strip);
    args.rank_pairs = expand.rank_pairs;
    args.t = t + first_rank(part, projection);
    args.t_stride = t_stride(projection);
    return;
  }
}

// Calls visit(run, part) for the expands that fuse() leaves.
template <class Visit>
void Expands::for_each_left(const Job& job, Projection projection, const Visit& visit) const {
  bool fused = job.runs == 1;
  for (const MixRun& run : task_.plan.runs(job)) {
    for (const RowMixes::Part& part : task_.mixes.mix(run.mix).parts) {
      if (part.lora->expand(projection).rank_pairs == 0) continue;
      if (!std::exchange(fused, false)) visit(run, part);
    }
  }
}

void Expands::prefetch(const Job& job, Projection projection, int strip) const {
  for_each_left(job, projection, [&](const MixRun&, const RowMixes::Part& part) {
    const ExpertLora::Expand& expand = part.lora->expand(projection);
    const auto* b = reinterpret_cast<const std::byte*>(expand.of(job.expert, strip));
    for (int pair = 0; pair < 2 * expand.rank_pairs; ++pair) {
      __builtin_prefetch(b + pair * 64, 0, 2);
    }
  });
}

void Expands::add(const Job& job, Projection projection, int strip, const std::uint16_t* t,
                  float* c) const {
  const GemmKernel& kernel = rows_.gemm_for(job);
  const std::int64_t stride = t_stride(projection);
  for_each_left(job, projection, [&](const MixRun& run, const RowMixes::Part& part) {
    const ExpertLora::Expand& expand = part.lora->expand(projection);
    ExpandArgs args{};
    args.rows = run.rows;
    args.lora_b = expand.of(job.expert, strip);
    args.rank_pairs = expand.rank_pairs;
    args.t = t + run.first * stride + first_rank(part, projection);
    args.t_stride = stride;
    args.c = c + run.first * kStripRows;
    kernel.expand(args);
  });
}

}  // namespace ktrt
