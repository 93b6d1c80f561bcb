#include "engine/cuda/gpu_weights.h"

#include <cuda_runtime_api.h>

#include <future>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/cuda/cuda_status.h"
#include "engine/cuda/gpu_copy.h"
#include "engine/cuda/gpu_dummy.h"
#include "engine/cuda/gpu_layout.h"
#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/norm.h"
#include "engine/cuda/kernels/sampler.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/layout.h"
#include "engine/model/rope.h"
#include "engine/status.h"

namespace latentd {
namespace {

// What the kernels are compiled for.
constexpr int kLatent = 512, kRope = 64, kNope = 128, kValue = 128;
constexpr int kBf16Unit = 32;         // columns of a tile of bf16 weights
constexpr int kMaxColumns = 1 << 16;  // of any weight: sizes of matrices fit where they are kept

absl::Status Unsupported(const char* field, int64_t value, const std::string& supported) {
  return absl::UnimplementedError(
      absl::StrCat("config.json: ", field, " is ", value, "; the CUDA engine serves ", supported));
}

absl::Status CheckExactly(const char* field, int64_t value, int64_t wanted) {
  if (value == wanted) return absl::OkStatus();
  return Unsupported(field, value, absl::StrCat(wanted));
}

absl::Status CheckColumns(const char* field, int64_t value, int64_t unit,
                          int64_t most = kMaxColumns) {
  if (value > 0 && value % unit == 0 && value <= most) return absl::OkStatus();
  return Unsupported(field, value, absl::StrCat("multiples of ", unit, " up to ", most));
}

absl::Status CheckAtMost(const char* field, int64_t value, int64_t most) {
  if (value <= most) return absl::OkStatus();
  return Unsupported(field, value, absl::StrCat("up to ", most));
}

absl::Status CheckRouter(const ModelConfig& config) {
  RETURN_IF_ERROR(CheckAtMost("n_routed_experts", config.n_routed_experts, kMaxRoutedExperts));
  RETURN_IF_ERROR(CheckAtMost("n_shared_experts", config.n_shared_experts, kMaxSharedExperts));
  RETURN_IF_ERROR(CheckAtMost("n_group", config.n_group, kMaxExpertGroups));
  RETURN_IF_ERROR(
      CheckAtMost("num_experts_per_tok", config.num_experts_per_tok, kMaxExpertsPerTok));
  // A group is judged by its two best experts.
  if (config.topk_group < config.n_group && config.n_routed_experts / config.n_group < 2) {
    return Unsupported("n_group", config.n_group, "groups of two experts or more");
  }
  return absl::OkStatus();
}

// An FP8 model's projections are FP8, every one; kv_b_proj is dequantised anyway.
class TypeChecker : public WeightVisitor {
 public:
  TypeChecker(const ModelConfig& config, const Placement& placement)
      : fp8_(config.quantization.has_value()),
        experts_(placement.Experts(config.n_routed_experts)) {}
  void Tensor(const TensorSpec&, TensorView&) override {}
  void Linear(const TensorSpec& spec, LinearWeight& linear) override {
    if (!Holds(experts_, spec)) return;  // it has no view
    const bool fp8 = linear.weight.dtype == DType::kF8E4M3;
    if (fp8 == fp8_ || !status_.ok() || spec.name.ends_with(".kv_b_proj.weight")) return;
    status_ = absl::UnimplementedError(absl::StrCat(
        "'", spec.name, "' is ", std::string(DTypeName(linear.weight.dtype)),
        "; the CUDA engine serves models whose projections are all of the type that config.json's "
        "quantization_config says: F8_E4M3"));
  }
  const absl::Status& status() const { return status_; }

 private:
  const bool fp8_;
  const ExpertRange experts_;
  absl::Status status_;
};

absl::Status UploadRope(const Rope& rope, const RopeTable& table) {
  const auto upload = [](const std::vector<float>& values, const float* target) {
    return CudaStatus(cudaMemcpy(const_cast<float*>(target), values.data(),
                                 values.size() * sizeof(float), cudaMemcpyHostToDevice),
                      "cudaMemcpy");
  };
  RETURN_IF_ERROR(upload(rope.cos(), table.cos));
  return upload(rope.sin(), table.sin);
}

}  // namespace

absl::Status CheckCudaSupports(const ModelConfig& config) {
  RETURN_IF_ERROR(CheckExactly("kv_lora_rank", config.kv_lora_rank, kLatent));
  RETURN_IF_ERROR(CheckExactly("qk_rope_head_dim", config.qk_rope_head_dim, kRope));
  RETURN_IF_ERROR(CheckExactly("qk_nope_head_dim", config.qk_nope_head_dim, kNope));
  RETURN_IF_ERROR(CheckExactly("v_head_dim", config.v_head_dim, kValue));
  if (config.attention_bias) {
    return absl::UnimplementedError(
        "config.json: attention_bias is true; the CUDA engine serves models without");
  }
  if (config.quantization) {
    RETURN_IF_ERROR(CheckExactly("quantization_config.weight_block_size[0]",
                                 config.quantization->block_rows, kQuantGroup));
    RETURN_IF_ERROR(CheckExactly("quantization_config.weight_block_size[1]",
                                 config.quantization->block_cols, kQuantGroup));
  }
  const int unit = config.quantization ? kQuantGroup : kBf16Unit;
  RETURN_IF_ERROR(CheckColumns("hidden_size", config.hidden_size, unit, kMaxNormColumns));
  RETURN_IF_ERROR(CheckAtMost("vocab_size", config.vocab_size, kMaxVocabSize));
  if (config.first_k_dense_replace > 0) {
    RETURN_IF_ERROR(CheckColumns("intermediate_size", config.intermediate_size, unit));
  }
  if (config.first_k_dense_replace < config.num_hidden_layers) {
    RETURN_IF_ERROR(CheckColumns("moe_intermediate_size", config.moe_intermediate_size, unit));
    RETURN_IF_ERROR(CheckRouter(config));
  }
  RETURN_IF_ERROR(
      CheckAtMost("num_attention_heads", config.num_attention_heads, kMaxColumns / kValue));
  if (config.q_lora_rank) {
    return CheckColumns("q_lora_rank", *config.q_lora_rank, unit, kMaxQLoraRank);
  }
  // q_proj and kv_a_proj_with_mqa are one matrix on the GPU, and no block of scales has rows of
  // both.
  if (config.quantization && config.num_attention_heads * config.qk_head_dim() % kQuantGroup != 0) {
    return Unsupported("num_attention_heads", config.num_attention_heads,
                       "even numbers in an FP8 model without q_lora_rank");
  }
  return absl::OkStatus();
}

uint64_t GpuWeightBytes(const ModelConfig& config, int32_t max_model_len,
                        const Placement& placement) {
  Carver counter(nullptr);
  LayOutWeights(config, max_model_len, /*stored=*/nullptr, counter, placement);
  return counter.used();
}

absl::StatusOr<std::unique_ptr<GpuWeights>> LoadGpuWeights(const ModelConfig& config,
                                                           const std::filesystem::path& dir,
                                                           LoadFormat format, int32_t max_model_len,
                                                           const LoadProgress& progress,
                                                           const Placement& placement) {
  RETURN_IF_ERROR(CheckCudaSupports(config));
  LATENTD_CHECK(max_model_len > 0);
  MappedWeights mapped;
  std::vector<DummyTensor> dummies;
  if (format == LoadFormat::kDummy) {
    dummies = PlanDummyWeights(config, mapped.weights);
  } else {
    ASSIGN_OR_RETURN(mapped, MapWeights(config, dir, placement));
    TypeChecker checker(config, placement);
    ModelWeights visited = mapped.weights;
    VisitWeights(config, visited, checker);
    RETURN_IF_ERROR(checker.status());
  }

  // Of 160k positions the tables take a core some tenths of a second.
  std::future<Rope> rope =
      std::async(std::launch::async, [&] { return Rope(config, max_model_len); });
  Carver counter(nullptr);
  LayOutWeights(config, max_model_len, &mapped.weights, counter, placement);
  ASSIGN_OR_RETURN(DeviceMemory memory, DeviceMemory::Allocate(counter.used()));
  // Copies leave out the paddings of scales, which products read.
  RETURN_IF_CUDA_ERROR(cudaMemset(memory.data(), 0, memory.bytes()));
  RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
  Carver carver(memory.data());
  auto weights = std::make_unique<GpuWeights>(
      LayOutWeights(config, max_model_len, &mapped.weights, carver, placement));
  weights->memory = std::move(memory);

  const std::vector<WeightCopy> copies = PlanCopies(config, mapped.weights, *weights, placement);
  RETURN_IF_ERROR(format == LoadFormat::kDummy ? MakeOnGpu(dummies, copies, progress)
                                               : CopyToGpu(*mapped.checkpoint, copies, progress));
  RETURN_IF_ERROR(UploadRope(rope.get(), weights->rope));
  return weights;
}

}  // namespace latentd
