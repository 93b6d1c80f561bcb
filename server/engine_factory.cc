#include "server/engine_factory.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/cpu/cpu_engine.h"
#include "engine/cpu/tcp_transport.h"
#include "engine/model/host_memory.h"
#include "engine/model/memory_plan.h"
#include "engine/status.h"
#ifdef LATENTD_HAVE_CUDA
#include "engine/cuda/cuda_engine.h"
#endif

namespace latentd {
namespace {

// The CPU engine holds FP8 and bf16 weights as bf16, f32 ones as f32, and the cache as f32.
MemoryPlan CpuMemoryPlan(const ModelConfig& model, const EngineSettings& settings) {
  return MakeMemoryPlan(
      model, {.weight_storage = model.quantization || model.dtype_bytes == 2 ? WeightStorage::kBf16
                                                                             : WeightStorage::kF32,
              .cache_format = CacheFormat::kF32,
              .num_blocks = settings.num_blocks,
              .placement = {.rank = settings.rank, .world_size = settings.world_size}});
}

// With a `transport`: as a rank of a group.
absl::StatusOr<std::unique_ptr<CpuEngine>> MakeCpuEngine(
    const ModelConfig& model, const std::filesystem::path& dir, LoadFormat format,
    const EngineSettings& settings, LoadListener* listener,
    std::unique_ptr<GroupTransport> transport) {
  const MemoryPlan plan = CpuMemoryPlan(model, settings);
  const Placement placement = plan.options.placement;
  listener->OnPlan(plan.ToString());
  RETURN_IF_ERROR(CheckFits(plan, AvailableMemoryBytes()));
  const LoadProgress progress = [listener](uint64_t done, uint64_t total) {
    listener->OnProgress(done, total);
  };
  ASSIGN_OR_RETURN(const ModelWeights weights,
                   LoadWeights(model, dir, format, progress, placement));
  listener->OnPhase("engine");
  return CpuEngine::Create(model, weights,
                           {.num_threads = settings.threads,
                            .num_blocks = settings.num_blocks,
                            .max_step_tokens = settings.max_step_tokens,
                            .max_sequences = settings.max_sequences,
                            .max_model_len = settings.max_model_len,
                            .quantize_cache = settings.cache_format == CacheFormat::kFp8,
                            .placement = placement},
                           std::move(transport));
}

#ifdef LATENTD_HAVE_CUDA
CudaEngineOptions CudaOptions(const EngineSettings& settings) {
  CudaEngineOptions options{.device = settings.device,
                            .num_blocks = settings.num_blocks,
                            .max_step_tokens = settings.max_step_tokens,
                            .max_sequences = settings.max_sequences,
                            .max_model_len = settings.max_model_len,
                            .max_graph_sequences = settings.max_graph_sequences,
                            .batch_invariant = settings.batch_invariant,
                            .cache_format = settings.cache_format == CacheFormat::kFp8
                                                ? CacheFormat::kFp8
                                                : CacheFormat::kBf16};
  if (settings.world_size > 1) {
    options.placement = Placement{.rank = settings.rank, .world_size = settings.world_size};
  }
  return options;
}

absl::StatusOr<std::unique_ptr<CudaEngine>> MakeCudaEngine(const ModelConfig& model,
                                                           const std::filesystem::path& dir,
                                                           LoadFormat format,
                                                           const CudaEngineOptions& options,
                                                           LoadListener* listener) {
  listener->OnPhase("weights");
  return CudaEngine::Create(
      model, dir, format, options,
      [listener](const CudaMemoryPlan& plan) { listener->OnPlan(plan.ToString()); },
      [listener](uint64_t done, uint64_t total) { listener->OnProgress(done, total); });
}
#else
absl::Status NoCuda() {
  return absl::UnavailableError(
      "engine is 'cuda'; this program was built without the CUDA engine (scripts/setup --cuda, "
      "then build again)");
}
#endif

}  // namespace

std::string_view EngineName(EngineKind kind) { return kind == EngineKind::kCuda ? "cuda" : "cpu"; }

absl::StatusOr<EngineKind> ChooseEngine(std::string_view name) {
  if (name == "cpu") return EngineKind::kCpu;
#ifdef LATENTD_HAVE_CUDA
  if (name == "cuda") return EngineKind::kCuda;
  if (name == "auto") return CudaDeviceCount() > 0 ? EngineKind::kCuda : EngineKind::kCpu;
#else
  if (name == "cuda") return NoCuda();
  if (name == "auto") return EngineKind::kCpu;
#endif
  return absl::InvalidArgumentError(
      absl::StrCat("engine is '", std::string(name), "'; allowed are auto, cpu, cuda"));
}

absl::StatusOr<CacheFormat> ChooseCacheFormat(std::string_view name, EngineKind kind) {
  if (name == "auto") return kind == EngineKind::kCuda ? CacheFormat::kBf16 : CacheFormat::kF32;
  if (name == "fp8") return CacheFormat::kFp8;
  if (name == "bf16" && kind == EngineKind::kCuda) return CacheFormat::kBf16;
  return absl::InvalidArgumentError(absl::StrCat(
      "kv_cache_dtype is '", std::string(name), "'; the ", std::string(EngineName(kind)),
      " engine has auto, ", kind == EngineKind::kCuda ? "bf16, " : "", "fp8"));
}

uint64_t CacheBytesPerBlock(const ModelConfig& model, EngineKind kind, CacheFormat format) {
  const CacheFormat held = kind == EngineKind::kCpu ? CacheFormat::kF32 : format;
  return MakeMemoryPlan(model, {.cache_format = held}).cache_bytes_per_block;
}

absl::StatusOr<EngineMemory> PlanEngineMemory(const ModelConfig& model,
                                              const EngineSettings& settings,
                                              uint64_t available_bytes) {
  if (settings.kind == EngineKind::kCpu) {
    const MemoryPlan plan = CpuMemoryPlan(model, settings);
    return EngineMemory{.table = plan.ToString(),
                        .num_blocks = settings.num_blocks,
                        .fits = CheckFits(plan, available_bytes)};
  }
#ifdef LATENTD_HAVE_CUDA
  const absl::StatusOr<CudaMemoryPlan> plan =
      PlanCudaMemory(model, CudaOptions(settings), available_bytes);
  if (absl::IsResourceExhausted(plan.status())) {
    return EngineMemory{.table = "", .num_blocks = 0, .fits = plan.status()};
  }
  RETURN_IF_ERROR(plan.status());
  return EngineMemory{
      .table = plan->ToString(), .num_blocks = plan->num_blocks, .fits = absl::OkStatus()};
#else
  return NoCuda();
#endif
}

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const ModelConfig& model,
                                                   const std::filesystem::path& dir,
                                                   LoadFormat format,
                                                   const EngineSettings& settings,
                                                   LoadListener* listener) {
  if (settings.kind == EngineKind::kCpu) {
    listener->OnPhase("weights");
    return MakeCpuEngine(model, dir, format, settings, listener, nullptr);
  }
#ifdef LATENTD_HAVE_CUDA
  return MakeCudaEngine(model, dir, format, CudaOptions(settings), listener);
#else
  return NoCuda();
#endif
}

absl::StatusOr<std::unique_ptr<GroupMember>> MakeGroupMember(const ModelConfig& model,
                                                             const std::filesystem::path& dir,
                                                             LoadFormat format,
                                                             const EngineSettings& settings,
                                                             LoadListener* listener) {
  if (settings.kind == EngineKind::kCpu) {
    ASSIGN_OR_RETURN(std::unique_ptr<GroupTransport> transport,
                     MakeTcpTransport({.listen = settings.tensor_listen,
                                       .call_timeout = settings.call_timeout}));
    listener->OnPhase("weights");
    return MakeCpuEngine(model, dir, format, settings, listener, std::move(transport));
  }
#ifdef LATENTD_HAVE_CUDA
  CudaEngineOptions options = CudaOptions(settings);
  options.placement = Placement{.rank = settings.rank, .world_size = settings.world_size};
  return MakeCudaEngine(model, dir, format, options, listener);
#else
  return NoCuda();
#endif
}

absl::StatusOr<std::vector<KernelFamily>> ProfileStep([[maybe_unused]] Engine* engine,
                                                      [[maybe_unused]] const StepPlan& plan) {
  std::vector<KernelFamily> families;
#ifdef LATENTD_HAVE_CUDA
  if (auto* cuda = dynamic_cast<CudaEngine*>(engine)) {
    ASSIGN_OR_RETURN(const std::vector<CudaEngine::FamilyTime> times, cuda->Profile(plan));
    for (const CudaEngine::FamilyTime& time : times) {
      families.push_back({std::string(time.family), time.seconds, time.intervals});
    }
  }
#endif
  return families;
}

}  // namespace latentd
