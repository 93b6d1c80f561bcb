#include "engine/cuda/cuda_engine.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "engine/comm/nccl_communicator.h"
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
#include "engine/cuda/nccl_exchange.h"
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

bool IsDecode(const StepPlan& plan) {
  return std::all_of(plan.sequences.begin(), plan.sequences.end(),
                     [](const SequenceStep& s) { return s.num_tokens == 1 && s.sample; });
}

// Until `event`, a peer's failure, or `deadline`. A step that was broken off ends too, with wrong
// results.
absl::Status WaitForGroup(cudaEvent_t event, GpuExchange& exchange, absl::Time deadline) {
  constexpr int kPollsPerCheck = 256;  // a fraction of a millisecond
  cudaError_t error = cudaEventQuery(event);
  for (int i = 1; error == cudaErrorNotReady; error = cudaEventQuery(event), ++i) {
    sched_yield();
    if (i % kPollsPerCheck != 0) continue;
    RETURN_IF_ERROR(exchange.Check());
    if (absl::Now() >= deadline)
      return absl::DeadlineExceededError("the group's ranks do not answer one another");
  }
  RETURN_IF_ERROR(CudaStatus(error, "cudaEventQuery"));
  return exchange.Check();
}

class CudaEngineImpl : public CudaEngine {
 public:
  CudaEngineImpl(const ModelConfig& config, const CudaEngineOptions& options,
                 const EngineInfo& info)
      : config_(config),
        options_(options),
        info_(info),
        limits_(MakeStepLimits(config, options, MaxModelLen(config, options))),
        plan_check_(info, PlacementOf(options).rank) {}
  ~CudaEngineImpl() override;

  // Everything that can fail. `num_sms`: of the current device.
  absl::Status Init(const std::filesystem::path& dir, LoadFormat format, int num_sms,
                    const LoadProgress& progress);

  EngineInfo info() const override { return info_; }
  bool lost() const override { return lost_.load(std::memory_order_relaxed); }
  StepTimes last_step() const override { return last_step_; }

  absl::Status Join(const GroupSpec& group, absl::Time deadline) override;
  void AbortGroup(const absl::Status& why) override;
  std::string waiting_in() const override;
  std::string address() const override { return ""; }
  absl::StatusOr<std::string> MakeUniqueId() override;
  std::string transport() const override;
  std::string transport_warning() const override;

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;
  absl::StatusOr<std::vector<FamilyTime>> Profile(const StepPlan& plan) override;

 private:
  // A step's begin and end on the GPU.
  struct Span {
    CudaEvent begin, end;
  };

  absl::Status Prepare(absl::Time deadline);
  absl::Status FormGroup(const GroupSpec& group, absl::Time deadline);
  void LeaveGroup(const absl::Status& why);
  std::shared_ptr<GpuExchange> exchange() const;
  void SetExchange(std::shared_ptr<GpuExchange> exchange);
  void SetWaiting(std::string waiting);

  absl::Status CheckPlan(const StepPlan& plan);
  absl::Status RunPlan(const StepPlan& plan);
  absl::Status RunEagerly(const CudaForward::Watch& watch);
  absl::Status RunNothing(int rows, absl::Time deadline);
  absl::Status RunTimed(const StepPlan& plan, KernelTimer& timer, bool as_graph);
  absl::Status PlanPrefill();
  absl::Status Wait(cudaEvent_t event, absl::Time deadline);
  absl::Status MeasureStep(bool graph);
  absl::StatusOr<StepResult> ReadResult(const StepPlan& plan);
  int GraphRows(const StepPlan& plan) const;
  absl::Status Failed(const absl::Status& status);
  bool in_group() const { return options_.placement.has_value(); }
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
  mutable absl::Mutex group_mutex_;
  std::shared_ptr<GpuExchange> exchange_ ABSL_GUARDED_BY(group_mutex_);
  std::string waiting_ ABSL_GUARDED_BY(group_mutex_);
  bool joined_ = false;
  absl::Status left_;  // why it is in no group

  std::atomic<bool> lost_ = false;
  absl::Status lost_status_;  // why
};

CudaEngineImpl::~CudaEngineImpl() {
  cudaSetDevice(options_.device);
  LeaveGroup(absl::CancelledError("the engine is destroyed"));
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

  const uint64_t cache_bytes = uint64_t{1} * config_.num_hidden_layers * info_.num_blocks *
                               MlaCacheBlockBytes(options_.cache_format);
  ASSIGN_OR_RETURN(cache_, DeviceMemory::Allocate(cache_bytes));
  // NaN: a read of a row that no token has written cannot go unnoticed.
  RETURN_IF_CUDA_ERROR(cudaMemset(cache_.data(), 0xff, cache_.bytes()));
  ASSIGN_OR_RETURN(weights_, LoadGpuWeights(config_, dir, format, MaxModelLen(config_, options_),
                                            progress, PlacementOf(options_)));
  RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
  SetExchange(nullptr);
  if (!in_group()) return Prepare(absl::InfiniteFuture());
  left_ = absl::FailedPreconditionError("it has not joined a group");
  return absl::OkStatus();
}

// Runs a step of each shape that is captured, of padding alone: kernels are loaded and algorithms
// chosen, which may not happen in a capture. So no request pays for either.
absl::Status CudaEngineImpl::Prepare(absl::Time deadline) {
  const bool capturable = !in_group() || exchange()->capturable();
  const std::vector<int> sizes = GraphSizes(capturable ? MaxGraphSequences(options_) : 0);
  for (int rows : sizes) RETURN_IF_ERROR(RunNothing(rows, deadline));
  if (sizes.empty()) RETURN_IF_ERROR(RunNothing(1, deadline));
  const std::vector<int> cuts = GraphCuts(config_.num_hidden_layers);
  const int num_parts = static_cast<int>(cuts.size()) - 1;
  return graphs_.Capture(stream_.get(), sizes, num_parts, [&](int rows, int part) {
    const StepShape shape = StepShape::Decode(rows, limits_.piece_tokens);
    return forward_->Run(shape, input_->device(shape), {cuts[part], cuts[part + 1]}, sampled(), {},
                         stream_.get());
  });
}

absl::Status CudaEngineImpl::RunNothing(int rows, absl::Time deadline) {
  input_->StageNothing(rows);
  RETURN_IF_ERROR(input_->Upload(stream_.get()));
  RETURN_IF_ERROR(RunEagerly({}));
  const cudaEvent_t end = spans_[num_steps_ % 2].end.get();
  RETURN_IF_CUDA_ERROR(cudaEventRecord(end, stream_.get()));
  return Wait(end, deadline);
}

// ---- the group
// -----------------------------------------------------------------------------------

std::shared_ptr<GpuExchange> CudaEngineImpl::exchange() const {
  absl::MutexLock lock(&group_mutex_);
  return exchange_;
}

void CudaEngineImpl::SetExchange(std::shared_ptr<GpuExchange> exchange) {
  forward_ = std::make_unique<CudaForward>(CudaForward::Parts{
      .config = &config_,
      .weights = weights_.get(),
      .buffers = &buffers_,
      .cache = {cache_.data(), options_.cache_format},
      .num_blocks = info_.num_blocks,
      .cublas = cublas_.get(),
      .prefill = prefill_.get(),
      .batch_invariant = options_.batch_invariant,
      .group = {.placement = PlacementOf(options_), .exchange = exchange.get()}});
  absl::MutexLock lock(&group_mutex_);
  exchange_.swap(exchange);
}

void CudaEngineImpl::SetWaiting(std::string waiting) {
  absl::MutexLock lock(&group_mutex_);
  waiting_ = std::move(waiting);
}

absl::Status CudaEngineImpl::Join(const GroupSpec& group, absl::Time deadline) {
  if (lost()) return lost_status_;
  const Placement placement = PlacementOf(options_);
  if (!in_group() || group.rank != placement.rank || group.world_size != placement.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", placement.rank, " of ", placement.world_size, ", ",
                     in_group() ? "" : "made to be alone, ", "is asked to be rank ", group.rank,
                     " of ", group.world_size));
  }
  RETURN_IF_CUDA_ERROR(cudaSetDevice(options_.device));
  LeaveGroup(absl::CancelledError("a new group is formed"));
  absl::Status status = FormGroup(group, deadline);
  SetWaiting("");
  joined_ = status.ok();
  return joined_ ? status : Failed(status);
}

absl::Status CudaEngineImpl::FormGroup(const GroupSpec& group, absl::Time deadline) {
  const ExchangeFactory make = options_.exchanges ? options_.exchanges : NcclExchanges();
  ASSIGN_OR_RETURN(std::shared_ptr<GpuExchange> exchange, make(group));
  SetExchange(exchange);
  SetWaiting(absl::StrCat("forming ", group.epoch, " of the group, for ranks that have not come (",
                          exchange->transport(), ")"));
  RETURN_IF_ERROR(exchange->Form(deadline));
  return Prepare(deadline);
}

// The order matters: NCCL's communicator goes when no graph knows it any more, and the graphs'
// kernels end when it is told to abort.
void CudaEngineImpl::LeaveGroup(const absl::Status& why) {
  const std::shared_ptr<GpuExchange> left = exchange();
  joined_ = false;
  if (left == nullptr) return;
  left_ = why;
  left->Abort(why);
  graphs_.Clear();
  cudaStreamSynchronize(stream_.get());
  SetExchange(nullptr);
  SetWaiting("");
}

void CudaEngineImpl::AbortGroup(const absl::Status& why) {
  if (const std::shared_ptr<GpuExchange> exchange = this->exchange()) exchange->Abort(why);
}

std::string CudaEngineImpl::waiting_in() const {
  absl::MutexLock lock(&group_mutex_);
  if (exchange_ == nullptr) return "";
  const std::string known = exchange_->waiting_in();
  return known.empty() ? waiting_ : known;
}

absl::StatusOr<std::string> CudaEngineImpl::MakeUniqueId() {
  if (options_.exchanges) return std::string();
  return NcclCommunicator::MakeUniqueId();
}

std::string CudaEngineImpl::transport() const {
  const std::shared_ptr<GpuExchange> exchange = this->exchange();
  return exchange == nullptr ? "" : exchange->transport();
}

std::string CudaEngineImpl::transport_warning() const {
  const std::shared_ptr<GpuExchange> exchange = this->exchange();
  return exchange == nullptr ? "" : exchange->warning();
}

// ---- a step
// --------------------------------------------------------------------------------------

absl::StatusOr<StepResult> CudaEngineImpl::Execute(const StepPlan& plan) {
  if (lost()) return lost_status_;
  // A group that was aborted meanwhile is left: nothing may be launched in it.
  if (joined_) {
    if (const absl::Status status = exchange()->Check(); !status.ok()) LeaveGroup(status);
  }
  if (in_group() && !joined_) {
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", PlacementOf(options_).rank, " is in no group: ", left_.message()));
  }
  if (absl::Status status = CheckPlan(plan); !status.ok()) return Failed(status);
  // Of a group all ranks have a step, or none has.
  if (in_group() ? plan.shape.num_tokens == 0 : plan.empty()) return StepResult();
  if (absl::Status status = RunPlan(plan); !status.ok()) return Failed(status);
  return ReadResult(plan);
}

absl::Status CudaEngineImpl::CheckPlan(const StepPlan& plan) {
  RETURN_IF_ERROR(plan_check_.Check(plan));
  if (!in_group()) return absl::OkStatus();
  const GroupShape& shape = plan.shape;
  const auto tokens = static_cast<int32_t>(plan.tokens.size());
  const auto sequences = static_cast<int32_t>(plan.sequences.size());
  if (shape.num_tokens >= tokens && shape.num_tokens <= info_.max_step_tokens &&
      shape.num_sequences >= sequences && shape.num_sequences <= info_.max_sequences &&
      (!shape.decode || (IsDecode(plan) && shape.num_tokens == shape.num_sequences))) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "plan: shape of ", shape.num_tokens, " tokens, ", shape.num_sequences, " sequences",
      shape.decode ? ", decode" : "", " for a share of ", tokens, " and ", sequences,
      "; the limits are ", info_.max_step_tokens, " and ", info_.max_sequences));
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
  if (in_group()) {
    SetWaiting(absl::StrCat("step ", plan.step, ", waits for the group (NCCL)"));
  }
  RETURN_IF_ERROR(Wait(span.end.get(), absl::InfiniteFuture()));
  if (in_group()) SetWaiting("");
  return MeasureStep(graph_rows > 0);
}

// The rows of the graph that computes `plan`; 0: none does.
int CudaEngineImpl::GraphRows(const StepPlan& plan) const {
  if (in_group()) return plan.shape.decode ? graphs_.RowsFor(plan.shape.num_sequences) : 0;
  return IsDecode(plan) ? graphs_.RowsFor(plan.sequences.size()) : 0;
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
absl::Status CudaEngineImpl::Wait(cudaEvent_t event, absl::Time deadline) {
  if (in_group()) return WaitForGroup(event, *exchange(), deadline);
  cudaError_t error = cudaEventQuery(event);
  for (; error == cudaErrorNotReady; error = cudaEventQuery(event)) sched_yield();
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
  LeaveGroup(status);
  if (absl::IsInvalidArgument(status)) return status;
  const std::string message =
      absl::StrCat("rank ", PlacementOf(options_).rank, ": ", status.message());
  if (const cudaError_t error = cudaStreamSynchronize(stream_.get()); error != cudaSuccess) {
    cudaGetLastError();
    lost_status_ = absl::UnavailableError(absl::StrCat(message, "; the GPU is lost"));
    lost_.store(true, std::memory_order_relaxed);
    return lost_status_;
  }
  return in_group() ? absl::Status(status.code(), message) : absl::UnavailableError(message);
}

absl::StatusOr<std::vector<CudaEngine::FamilyTime>> CudaEngineImpl::Profile(const StepPlan& plan) {
  if (lost()) return lost_status_;
  RETURN_IF_ERROR(CheckPlan(plan));
  if (plan.empty()) return std::vector<FamilyTime>();
  if (in_group() && !joined_) return absl::FailedPreconditionError("it is in no group");
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
  return absl::Status(engine.status().code(), absl::StrCat("rank ", PlacementOf(options).rank, ": ",
                                                           engine.status().message()));
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
