#include "engine/cuda/mla_prefill.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/cuda/cublas.h"
#include "engine/cuda/cuda_handles.h"
#include "engine/cuda/cuda_status.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels/mla_prefill.h"
#include "engine/cuda/mla_prefill_plan.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int kLatentDim = 512;
constexpr int kNopeDim = 128;
constexpr int kKeyDim = 192;
constexpr int kValueDim = 128;
// Of the largest Hopper GPU: the workspace is planned without one.
constexpr int kMaxSms = 144;
constexpr int32_t kMaxExpandTokens = 1 << 20;

struct Workspace {
  __nv_bfloat16* latents = nullptr;  // [part_rows, 512]
  __nv_bfloat16* keys = nullptr;     // [part_rows, num_heads, 192]
  __nv_bfloat16* values = nullptr;   // [part_rows, num_heads, 128]
  __nv_bfloat16* out = nullptr;      // [max_queries, num_heads, 128] of a part to be merged
  float* lse = nullptr;              // [max_queries, num_heads]
  float* part_lse = nullptr;         // [max_queries, num_heads] of a part to be merged
  int32_t* words = nullptr;          // of the plan
};

Workspace Carve(const MlaPrefill::Options& options, Carver* carver) {
  const size_t rows = static_cast<size_t>(MlaPrefillPartRows(options));
  const size_t heads = static_cast<size_t>(options.num_heads);
  const size_t query_heads = static_cast<size_t>(options.max_queries) * heads;
  Workspace workspace;
  workspace.latents = carver->Take<__nv_bfloat16>(rows * kLatentDim);
  workspace.keys = carver->Take<__nv_bfloat16>(rows * heads * kKeyDim);
  workspace.values = carver->Take<__nv_bfloat16>(rows * heads * kValueDim);
  workspace.out = carver->Take<__nv_bfloat16>(query_heads * kValueDim);
  workspace.lse = carver->Take<float>(query_heads);
  workspace.part_lse = carver->Take<float>(query_heads);
  workspace.words = carver->Take<int32_t>(MaxMlaPrefillWords(options, kMaxSms));
  return workspace;
}

class FlashPrefill : public MlaPrefill {
 public:
  FlashPrefill(const Options& options, Cublas* cublas) : options_(options), cublas_(*cublas) {}

  absl::Status Init();
  absl::Status Plan(absl::Span<const MlaPrefillSequence> sequences, const int32_t* blocks,
                    std::byte* workspace, cudaStream_t stream) override;
  absl::Status Run(const Layer& layer, cudaStream_t stream) override;

 private:
  absl::Status Expand(const Layer& layer, const MlaPrefillPart& part, cudaStream_t stream);
  absl::Status Attend(const Layer& layer, const MlaPrefillPart& part, cudaStream_t stream);
  absl::Status Merge(const Layer& layer, const MlaPrefillPart& part, cudaStream_t stream);
  PrefillWork Work(const MlaPrefillPart& part) const;

  const Options options_;
  Cublas& cublas_;
  int num_sms_ = 0;
  int32_t num_queries_ = 0;  // of the planned step
  MlaPrefillPlan plan_;
  PinnedMemory words_;
  CudaEvent copied_;  // words_ may be written again
  const int32_t* blocks_ = nullptr;
  Workspace workspace_;
};

absl::Status FlashPrefill::Init() {
  int device = 0;
  RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device));
  if (num_sms_ > kMaxSms) {
    return absl::UnavailableError(
        absl::StrCat("the GPU has ", num_sms_, " multiprocessors, more than ", kMaxSms));
  }
  ASSIGN_OR_RETURN(
      words_, PinnedMemory::Allocate(MaxMlaPrefillWords(options_, num_sms_) * sizeof(int32_t)));
  ASSIGN_OR_RETURN(copied_, MakeCudaEvent());
  return absl::OkStatus();
}

absl::Status FlashPrefill::Plan(absl::Span<const MlaPrefillSequence> sequences,
                                const int32_t* blocks, std::byte* workspace, cudaStream_t stream) {
  plan_.parts.clear();  // of a plan that failed nothing runs
  RETURN_IF_ERROR(PlanMlaPrefill(options_, num_sms_, sequences, &plan_));
  num_queries_ = 0;
  for (const MlaPrefillSequence& sequence : sequences) num_queries_ += sequence.num_queries;
  blocks_ = blocks;
  Carver carver(workspace);
  workspace_ = Carve(options_, &carver);
  if (plan_.words.empty()) return absl::OkStatus();

  RETURN_IF_CUDA_ERROR(cudaEventSynchronize(copied_.get()));
  const size_t bytes = plan_.words.size() * sizeof(int32_t);
  LATENTD_CHECK(bytes <= words_.bytes());
  std::copy(plan_.words.begin(), plan_.words.end(), reinterpret_cast<int32_t*>(words_.data()));
  RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(workspace_.words, words_.data(), bytes, cudaMemcpyHostToDevice, stream));
  RETURN_IF_CUDA_ERROR(cudaEventRecord(copied_.get(), stream));
  return absl::OkStatus();
}

absl::Status FlashPrefill::Run(const Layer& layer, cudaStream_t stream) {
  for (const MlaPrefillPart& part : plan_.parts) {
    RETURN_IF_ERROR(Expand(layer, part, stream));
    RETURN_IF_ERROR(Attend(layer, part, stream));
    if (part.merge) RETURN_IF_ERROR(Merge(layer, part, stream));
  }
  return absl::OkStatus();
}

absl::Status FlashPrefill::Expand(const Layer& layer, const MlaPrefillPart& part,
                                  cudaStream_t stream) {
  const int heads = options_.num_heads;
  const int planned_rows = MlaPrefillPartRows(options_);
  RETURN_IF_CUDA_ERROR(GatherLatents(
      {.num_rows = part.num_rows,
       .num_heads = heads,
       .cache = layer.cache,
       .blocks = blocks_,
       .sequences = reinterpret_cast<const PrefillKeys*>(workspace_.words + part.sequences),
       .num_sequences = part.num_sequences,
       .key_offset = part.key_offset,
       .latents = workspace_.latents,
       .keys = workspace_.keys},
      stream));
  // Keys of a head go between the rope dims that the gathering wrote.
  RETURN_IF_ERROR(cublas_.LinearBatched({.x = workspace_.latents,
                                         .x_stride = kLatentDim,
                                         .x_batch_stride = 0,
                                         .weight = layer.w_uk,
                                         .weight_stride = kLatentDim,
                                         .weight_batch_stride = int64_t{kNopeDim} * kLatentDim,
                                         .out = workspace_.keys,
                                         .out_stride = int64_t{heads} * kKeyDim,
                                         .out_batch_stride = kKeyDim,
                                         .rows = part.num_rows,
                                         .n = kNopeDim,
                                         .k = kLatentDim,
                                         .batch = heads,
                                         .planned_rows = planned_rows},
                                        stream));
  return cublas_.LinearBatched({.x = workspace_.latents,
                                .x_stride = kLatentDim,
                                .weight = layer.w_uv,
                                .weight_stride = kLatentDim,
                                .out = workspace_.values,
                                .out_stride = int64_t{heads} * kValueDim,
                                .rows = part.num_rows,
                                .n = heads * kValueDim,
                                .k = kLatentDim,
                                .batch = 1,
                                .planned_rows = planned_rows},
                               stream);
}

PrefillWork FlashPrefill::Work(const MlaPrefillPart& part) const {
  const int32_t* begin = workspace_.words + part.work;
  const int32_t* arrays = begin + num_sms_ + 1;
  const int64_t count = part.num_work;
  return {.begin = begin,
          .head = arrays,
          .tile = arrays + count,
          .query_begin = arrays + 2 * count,
          .num_queries = arrays + 3 * count,
          .row_begin = arrays + 4 * count,
          .num_keys = arrays + 5 * count};
}

absl::Status FlashPrefill::Attend(const Layer& layer, const MlaPrefillPart& part,
                                  cudaStream_t stream) {
  RETURN_IF_CUDA_ERROR(PrefillAttention(
      {.num_queries = num_queries_,
       .num_rows = part.num_rows,
       .num_heads = options_.num_heads,
       .causal = part.causal,
       .softmax_scale = layer.softmax_scale,
       .q = layer.q,
       .q_stride = layer.q_stride != 0 ? layer.q_stride : int64_t{options_.num_heads} * kKeyDim,
       .k = workspace_.keys,
       .v = workspace_.values,
       .work = Work(part),
       .out = part.merge ? workspace_.out : layer.out,
       .lse = part.merge  ? workspace_.part_lse
              : part.more ? workspace_.lse
                          : nullptr},
      stream));
  return absl::OkStatus();
}

absl::Status FlashPrefill::Merge(const Layer& layer, const MlaPrefillPart& part,
                                 cudaStream_t stream) {
  const int64_t begin = int64_t{part.query_begin} * options_.num_heads;
  RETURN_IF_CUDA_ERROR(MergeAttention({.num_rows = int64_t{part.num_queries} * options_.num_heads,
                                       .out = layer.out + begin * kValueDim,
                                       .lse = workspace_.lse + begin,
                                       .other = workspace_.out + begin * kValueDim,
                                       .other_lse = workspace_.part_lse + begin},
                                      stream));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<MlaPrefill>> MlaPrefill::Create(const Options& options,
                                                               Cublas* cublas) {
  if (options.num_heads < 1 || options.max_queries < 1 || options.max_sequences < 1 ||
      options.expand_tokens < options.max_queries || options.expand_tokens > kMaxExpandTokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "num_heads ", options.num_heads, ", max_queries ", options.max_queries, ", max_sequences ",
        options.max_sequences, ", expand_tokens ", options.expand_tokens,
        "; all are at least 1, and expand_tokens is from max_queries to ", kMaxExpandTokens));
  }
  auto prefill = std::make_unique<FlashPrefill>(options, cublas);
  RETURN_IF_ERROR(prefill->Init());
  return prefill;
}

size_t MlaPrefill::WorkspaceBytes(const Options& options) {
  Carver carver(nullptr);
  Carve(options, &carver);
  return carver.used();
}

}  // namespace latentd
