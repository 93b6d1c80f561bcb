#include "tests/engine/cuda/group_harness.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "engine/cuda/local_exchange.h"

namespace latentd {

GpuGroup MakeGpuGroup(const ModelConfig& config, const std::filesystem::path& dir,
                      LoadFormat format, CudaEngineOptions options, int world_size,
                      const ExchangeFactory& exchanges, const std::vector<TraceSink*>& traces) {
  GpuGroup group;
  std::vector<std::unique_ptr<GroupMember>> members;
  options.exchanges = exchanges;
  for (int rank = 0; rank < world_size; ++rank) {
    options.placement = Placement{.rank = rank, .world_size = world_size};
    if (!exchanges) options.device = rank;
    if (!traces.empty()) options.trace = traces[rank];
    std::unique_ptr<CudaEngine> engine = MakeCudaEngine(config, dir, format, options);
    group.ranks.push_back(engine.get());
    members.push_back(std::move(engine));
  }
  auto made = LocalGroup::Create(std::move(members));
  if (!made.ok()) {
    std::fprintf(stderr, "LocalGroup::Create: %s\n", made.status().ToString().c_str());
    std::exit(1);
  }
  group.group = *std::move(made);
  return group;
}

GroupRunner::GroupRunner(const ModelConfig& config, const std::filesystem::path& dir,
                         LoadFormat format, const CudaEngineOptions& options, int world_size)
    : config_(config) {
  std::vector<TraceSink*> sinks;
  for (int rank = 0; rank < world_size; ++rank) {
    traces_.push_back(std::make_unique<TraceRecorder>());
    sinks.push_back(traces_.back().get());
  }
  group_ = MakeGpuGroup(config, dir, format, options, world_size, LocalExchanges(), sinks);
}

std::vector<float> GroupRunner::Step(const std::vector<Runner::Part>& parts,
                                     const std::vector<int>& rank_of) {
  StepPlan plan = Runner::MakePlan(parts);
  for (size_t i = 0; i < parts.size(); ++i) {
    plan.sequences[i].dp_rank = rank_of[i];
    plan.sequences[i].sample = true;
    plan.sequences[i].sampling.temperature = 0;
  }
  for (const auto& trace : traces_) {
    trace->floats.clear();
    trace->ints.clear();
  }
  const size_t vocab = config_.vocab_size;
  const auto result = group_.group->Execute(plan);
  if (!result.ok()) {
    std::fprintf(stderr, "Execute: %s\n", result.status().ToString().c_str());
    return std::vector<float>(parts.size() * vocab, NAN);
  }
  std::vector<float> logits;
  std::vector<size_t> next(traces_.size());
  for (const int rank : rank_of) {
    const std::vector<float>& all = traces_[rank]->floats["logits"];
    const auto begin = all.begin() + static_cast<ptrdiff_t>(next[rank]++ * vocab);
    logits.insert(logits.end(), begin, begin + static_cast<ptrdiff_t>(vocab));
  }
  return logits;
}

}  // namespace latentd
