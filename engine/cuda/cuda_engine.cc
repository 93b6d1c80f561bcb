#include "engine/cuda/cuda_engine.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/cuda/cublas.h"
#include "engine/cuda/cuda_handles.h"
#include "engine/cuda/cuda_status.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/engine_limits.h"
#include "engine/cuda/forward.h"
#include "engine/cuda/gpu_weights.h"
#include "engine/cuda/graph_cache.h"
#include "engine/cuda/kernel_timer.h"
#include "engine/cuda/kernels/sampler.h"
#include "engine/cuda/mla_prefill.h"
#include "engine/cuda/step_buffers.h"
#include "engine/cuda/step_input.h"
#include "engine/cuda/step_trace.h"
#include "engine/plan_check.h"
#include "engine/status.h"

namespace latentd {
namespace {

// The last error of `device`'s setup, or OK when it is a Hopper GPU and current on this thread.
absl::Status UseDevice(int32_t device) {
  int count = 0;
  RETURN_IF_CUDA_ERROR(cudaGetDeviceCount(&count));
  if (device >= count) {
    return absl::UnavailableError(
        absl::StrCat("device: ", device, "; the driver shows ", count, " GPUs"));
  }
  int major = 0, minor = 0;
  RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) {
    return absl::UnavailableError(absl::StrCat("device ", device, " has compute capability ", major,
                                               ".", minor, "; the CUDA engine needs 9.0"));
  }
  RETURN_IF_CUDA_ERROR(cudaSetDevice(device));
  RETURN_IF_CUDA_ERROR(cudaFree(nullptr));  // makes the context
  return absl::OkStatus();
}

absl::StatusOr<int> NumMultiprocessors(int32_t device) {
  int count = 0;
  RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return std::min(count, kMaxMultiprocessors);
}

class CudaEngineImpl : public CudaEngine {
 public:
  CudaEngineImpl(const ModelConfig& config, const CudaEngineOptions& options,
                 const EngineInfo& info)
      : config_(config),
        options_(options),
        info_(info),
        limits_(MakeStepLimits(config, options, MaxModelLen(config, options))),
        plan_check_(info) {}
  ~CudaEngineImpl() override;

  // Everything that can fail. `num_sms`: of the current device.
  absl::Status Init(const std::filesystem::path& dir, LoadFormat format, int num_sms,
                    const LoadProgress& progress);

  EngineInfo info() const override { return info_; }
  bool lost() const override { return lost_.load(std::memory_order_relaxed); }
  StepTimes last_step() const override { return last_step_; }

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;
  absl::StatusOr<std::vector<FamilyTime>> Profile(const StepPlan& plan) override;

 private:
  // A step's begin and end on the GPU.
  struct Span {
    CudaEvent begin, end;
  };

  absl::Status Prepare();
  absl::Status RunPlan(const StepPlan& plan);
  absl::Status RunEagerly(const CudaForward::Watch& watch);
  absl::Status RunNothing(int rows);
  absl::Status RunTimed(const StepPlan& plan, KernelTimer& timer, bool as_graph);
  absl::Status PlanPrefill();
  absl::Status Wait();
  absl::Status MeasureStep(bool graph);
  absl::StatusOr<StepResult> ReadResult(const StepPlan& plan);
  int GraphRows(const StepPlan& plan) const;
  absl::Status Failed(const absl::Status& status);
  int32_t* sampled() const { return reinterpret_cast<int32_t*>(sampled_.data()); }

  const ModelConfig config_;
  const CudaEngineOptions options_;
  const EngineInfo info_;
  const StepLimits limits_;
  PlanCheck plan_check_;

  std::unique_ptr<GpuWeights> weights_;
  DeviceMemory workspace_;
  DeviceMemory cache_;
  PinnedMemory sampled_;  // [max_sequences] i32, written by the GPU
  StepBuffers buffers_;
  std::unique_ptr<StepInput> input_;
  std::unique_ptr<Cublas> cublas_;
  std::unique_ptr<MlaPrefill> prefill_;
  std::unique_ptr<CudaForward> forward_;
  CudaStream stream_;
  GraphCache graphs_;

  Span spans_[2];  // of the last two steps, in turns
  int64_t num_steps_ = 0;
  StepTimes last_step_;
  std::atomic<bool> lost_ = false;
  absl::Status lost_status_;  // why
};

CudaEngineImpl::~CudaEngineImpl() {
  cudaSetDevice(options_.device);
  if (stream_ != nullptr) cudaStreamSynchronize(stream_.get());
}

absl::Status CudaEngineImpl::Init(const std::filesystem::path& dir, LoadFormat format, int num_sms,
                                  const LoadProgress& progress) {
  ASSIGN_OR_RETURN(stream_, MakeCudaStream());
  for (Span& span : spans_) {
    ASSIGN_OR_RETURN(span.begin, MakeCudaEvent());
    ASSIGN_OR_RETURN(span.end, MakeCudaEvent());
  }
  ASSIGN_OR_RETURN(cublas_, Cublas::Create());
  ASSIGN_OR_RETURN(prefill_, MlaPrefill::Create(PrefillOptions(config_, limits_), cublas_.get()));
  ASSIGN_OR_RETURN(input_,
                   StepInput::Create(limits_, DecodePlannerOptions(config_, limits_, num_sms)));
  ASSIGN_OR_RETURN(sampled_, PinnedMemory::Allocate(sizeof(int32_t) * size_t(info_.max_sequences)));
  Carver counter(nullptr);
  CarveStepBuffers(config_, limits_, num_sms, counter);
  ASSIGN_OR_RETURN(workspace_, DeviceMemory::Allocate(counter.used()));
  RETURN_IF_CUDA_ERROR(cudaMemset(workspace_.data(), 0, workspace_.bytes()));
  Carver carver(workspace_.data());
  buffers_ = CarveStepBuffers(config_, limits_, num_sms, carver);

  const uint64_t cache_bytes = uint64_t{2} * config_.num_hidden_layers * info_.num_blocks *
                               kBlockSize * config_.latent_dim();
  ASSIGN_OR_RETURN(cache_, DeviceMemory::Allocate(cache_bytes));
  // NaN: a read of a row that no token has written cannot go unnoticed.
  RETURN_IF_CUDA_ERROR(cudaMemset(cache_.data(), 0xff, cache_.bytes()));
  ASSIGN_OR_RETURN(weights_,
                   LoadGpuWeights(config_, dir, format, MaxModelLen(config_, options_), progress));
  RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
  forward_ = std::make_unique<CudaForward>(
      CudaForward::Parts{.config = &config_,
                         .weights = weights_.get(),
                         .buffers = &buffers_,
                         .cache = reinterpret_cast<__nv_bfloat16*>(cache_.data()),
                         .num_blocks = info_.num_blocks,
                         .cublas = cublas_.get(),
                         .prefill = prefill_.get(),
                         .batch_invariant = options_.batch_invariant});
  return Prepare();
}

// Runs a step of each shape that is captured, of padding alone: kernels are loaded and algorithms
// chosen, which may not happen in a capture. So no request pays for either.
absl::Status CudaEngineImpl::Prepare() {
  const std::vector<int> sizes = GraphSizes(MaxGraphSequences(options_));
  for (int rows : sizes) RETURN_IF_ERROR(RunNothing(rows));
  if (sizes.empty()) RETURN_IF_ERROR(RunNothing(1));
  const std::vector<int> cuts = GraphCuts(config_.num_hidden_layers);
  const int num_parts = static_cast<int>(cuts.size()) - 1;
  return graphs_.Capture(stream_.get(), sizes, num_parts, [&](int rows, int part) {
    const StepShape shape = StepShape::Decode(rows);
    return forward_->Run(shape, input_->device(shape), {cuts[part], cuts[part + 1]}, sampled(), {},
                         stream_.get());
  });
}

absl::Status CudaEngineImpl::RunNothing(int rows) {
  input_->StageNothing(rows);
  RETURN_IF_ERROR(input_->Upload(stream_.get()));
  RETURN_IF_ERROR(RunEagerly({}));
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()));
  return absl::OkStatus();
}

absl::StatusOr<StepResult> CudaEngineImpl::Execute(const StepPlan& plan) {
  if (lost()) return lost_status_;
  RETURN_IF_ERROR(plan_check_.Check(plan));
  if (plan.empty()) return StepResult();
  if (absl::Status status = RunPlan(plan); !status.ok()) return Failed(status);
  return ReadResult(plan);
}

absl::Status CudaEngineImpl::RunPlan(const StepPlan& plan) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(options_.device));  // threads differ
  const int graph_rows = GraphRows(plan);
  RETURN_IF_ERROR(input_->Stage(plan, graph_rows));
  RETURN_IF_ERROR(input_->Upload(stream_.get()));
  RETURN_IF_ERROR(PlanPrefill());
  const Span& span = spans_[num_steps_ % 2];
  RETURN_IF_CUDA_ERROR(cudaEventRecord(span.begin.get(), stream_.get()));
  if (graph_rows > 0) {
    RETURN_IF_ERROR(graphs_.Launch(graph_rows, stream_.get()));
  } else if (options_.trace != nullptr) {
    StepTrace trace(options_.trace, input_->plan_rows(), input_->plan_samples(),
                    input_->host_slots(), stream_.get());
    RETURN_IF_ERROR(RunEagerly({.trace = &trace}));
  } else {
    RETURN_IF_ERROR(RunEagerly({}));
  }
  RETURN_IF_CUDA_ERROR(cudaEventRecord(span.end.get(), stream_.get()));
  RETURN_IF_ERROR(Wait());
  return MeasureStep(graph_rows > 0);
}

// The rows of the graph that computes `plan`; 0: none does.
int CudaEngineImpl::GraphRows(const StepPlan& plan) const {
  const bool decode =
      std::all_of(plan.sequences.begin(), plan.sequences.end(),
                  [](const SequenceStep& s) { return s.num_tokens == 1 && s.sample; });
  return decode ? graphs_.RowsFor(plan.sequences.size()) : 0;
}

absl::Status CudaEngineImpl::PlanPrefill() {
  if (input_->prefill_sequences().empty()) return absl::OkStatus();
  return prefill_->Plan(input_->prefill_sequences(), input_->device(input_->shape()).ids,
                        buffers_.prefill_workspace, stream_.get());
}

absl::Status CudaEngineImpl::RunEagerly(const CudaForward::Watch& watch) {
  const StepShape& shape = input_->shape();
  return forward_->Run(shape, input_->device(shape), forward_->all_layers(), sampled(), watch,
                       stream_.get());
}

// Asks, rather than sleeps until an interrupt: that would add tens of microseconds to a token.
absl::Status CudaEngineImpl::Wait() {
  const cudaEvent_t end = spans_[num_steps_ % 2].end.get();
  cudaError_t error = cudaEventQuery(end);
  for (; error == cudaErrorNotReady; error = cudaEventQuery(end)) sched_yield();
  return CudaStatus(error, "cudaEventQuery");
}

absl::Status CudaEngineImpl::MeasureStep(bool graph) {
  const Span& now = spans_[num_steps_ % 2];
  const Span& before = spans_[(num_steps_ + 1) % 2];
  float idle_ms = 0.0f, busy_ms = 0.0f;
  if (num_steps_ > 0) {
    RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&idle_ms, before.end.get(), now.begin.get()));
  }
  RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&busy_ms, now.begin.get(), now.end.get()));
  last_step_ = {.idle_s = idle_ms * 1e-3, .busy_s = busy_ms * 1e-3, .graph = graph};
  ++num_steps_;
  return absl::OkStatus();
}

absl::StatusOr<StepResult> CudaEngineImpl::ReadResult(const StepPlan& plan) {
  const absl::Span<const int32_t> order = input_->plan_samples();
  StepResult result;
  result.device = {.idle_seconds = last_step_.idle_s, .busy_seconds = last_step_.busy_s};
  result.sampled.resize(order.size());
  for (size_t i = 0; i < order.size(); ++i) result.sampled[order[i]] = sampled()[i];
  size_t i = 0;
  for (const SequenceStep& s : plan.sequences) {
    if (!s.sample) continue;
    const TokenId token = result.sampled[i++];
    if (token >= 0) continue;
    const std::string sequence = absl::StrCat("sequence ", s.id, ": ");
    if (token == kAllSuppressed) {
      return absl::InvalidArgumentError(
          absl::StrCat(sequence, "suppressed: all ", info_.vocab_size, " tokens are suppressed"));
    }
    return absl::InternalError(absl::StrCat(sequence, "a logit is not finite"));
  }
  return result;
}

// An error of CUDA's names the rank. Most cannot be mended: then even waiting for the device fails.
absl::Status CudaEngineImpl::Failed(const absl::Status& status) {
  if (absl::IsInvalidArgument(status)) return status;
  const std::string message = absl::StrCat("rank ", options_.rank, ": ", status.message());
  if (const cudaError_t error = cudaStreamSynchronize(stream_.get()); error != cudaSuccess) {
    cudaGetLastError();
    lost_status_ = absl::UnavailableError(absl::StrCat(message, "; the GPU is lost"));
    lost_.store(true, std::memory_order_relaxed);
    return lost_status_;
  }
  return absl::UnavailableError(message);
}

absl::StatusOr<std::vector<CudaEngine::FamilyTime>> CudaEngineImpl::Profile(const StepPlan& plan) {
  if (lost()) return lost_status_;
  RETURN_IF_ERROR(plan_check_.Check(plan));
  if (plan.empty()) return std::vector<FamilyTime>();
  const bool as_graph = GraphRows(plan) > 0;
  KernelTimer timer(as_graph);
  if (absl::Status status = RunTimed(plan, timer, as_graph); !status.ok()) return Failed(status);
  return timer.Times();
}

absl::Status CudaEngineImpl::RunTimed(const StepPlan& plan, KernelTimer& timer, bool as_graph) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(options_.device));
  RETURN_IF_ERROR(input_->Stage(plan, GraphRows(plan)));
  RETURN_IF_ERROR(input_->Upload(stream_.get()));
  RETURN_IF_ERROR(PlanPrefill());
  if (!as_graph) {
    RETURN_IF_ERROR(RunEagerly({.timer = &timer}));
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()));
    return absl::OkStatus();
  }
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()));
  ASSIGN_OR_RETURN(const CudaGraphExec graph,
                   CaptureGraph(stream_.get(), [&] { return RunEagerly({.timer = &timer}); }));
  RETURN_IF_CUDA_ERROR(cudaGraphLaunch(graph.get(), stream_.get()));
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CudaEngine>> CreateOnDevice(const ModelConfig& config,
                                                           const std::filesystem::path& dir,
                                                           LoadFormat format,
                                                           const CudaEngineOptions& options,
                                                           const CudaEngine::OnPlan& on_plan,
                                                           const LoadProgress& progress) {
  RETURN_IF_ERROR(UseDevice(options.device));
  size_t free = 0, total = 0;
  RETURN_IF_CUDA_ERROR(cudaMemGetInfo(&free, &total));
  ASSIGN_OR_RETURN(const CudaMemoryPlan plan, PlanCudaMemory(config, options, free));
  if (on_plan) on_plan(plan);
  ASSIGN_OR_RETURN(const int num_sms, NumMultiprocessors(options.device));
  const int64_t cached = int64_t{plan.num_blocks} * kBlockSize;
  const EngineInfo info{.num_blocks = plan.num_blocks,
                        .num_dp_ranks = 1,
                        .max_step_tokens = options.max_step_tokens,
                        .max_sequences = options.max_sequences,
                        .max_model_len = static_cast<int32_t>(
                            std::min<int64_t>(MaxModelLen(config, options), cached)),
                        .vocab_size = config.vocab_size};
  auto engine = std::make_unique<CudaEngineImpl>(config, options, info);
  RETURN_IF_ERROR(engine->Init(dir, format, num_sms, progress));
  return engine;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaEngine>> CudaEngine::Create(
    const ModelConfig& config, const std::filesystem::path& dir, LoadFormat format,
    const CudaEngineOptions& options, const OnPlan& on_plan, const LoadProgress& progress) {
  RETURN_IF_ERROR(CheckCudaSupports(config));
  RETURN_IF_ERROR(CheckCudaOptions(config, options));
  auto engine = CreateOnDevice(config, dir, format, options, on_plan, progress);
  if (engine.ok()) return engine;
  return absl::Status(engine.status().code(),
                      absl::StrCat("rank ", options.rank, ": ", engine.status().message()));
}

int CudaDeviceCount() {
  int count = 0, hopper = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    hopper += major == 9 && minor == 0;
  }
  return hopper;
}

}  // namespace latentd
