#include "engine/model/weights.h"

#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/json.h"
#include "engine/model/layout.h"
#include "engine/model/read_ahead.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr size_t kMaxProblems = 20;  // of one error
constexpr char kLayerPrefix[] = "model.layers.";

// Finds each tensor of the model in the checkpoint, and collects all that is wrong. Views are given
// to what a rank with these experts holds.
class Binder : public WeightVisitor {
 public:
  Binder(const ModelConfig& config, const Checkpoint& checkpoint, const ExpertRange& experts)
      : config_(config), checkpoint_(checkpoint), experts_(experts) {}

  void Tensor(const TensorSpec& spec, TensorView& view) override {
    if (const TensorView* found = Find(spec)) {
      const bool typed = found->dtype == DType::kF32 || found->dtype == DType::kBF16;
      if (!typed) WrongType(spec.name, *found, "F32 or BF16");
      Hold(spec, *found, view);
    }
  }

  void Linear(const TensorSpec& spec, LinearWeight& linear) override {
    const std::string scale_name = spec.name + "_scale_inv";
    const TensorView* found = Find(spec);
    if (found == nullptr) {
      used_.insert(scale_name);  // one bad projection, one problem
      return;
    }
    Hold(spec, *found, linear.weight);
    const bool fp8 = found->dtype == DType::kF8E4M3;
    if (fp8 && config_.quantization) {
      TensorSpec scale = spec;
      scale.name = scale_name;
      scale.shape = ScaleShape(*config_.quantization, spec.shape);
      if (const TensorView* scale_inv = Find(scale)) {
        if (scale_inv->dtype != DType::kF32) WrongType(scale.name, *scale_inv, "F32");
        Hold(scale, *scale_inv, linear.scale_inv);
      }
    } else if (fp8) {
      WrongType(spec.name, *found, "F32 or BF16, as config.json has no quantization_config");
    } else if (found->dtype != DType::kF32 && found->dtype != DType::kBF16) {
      WrongType(spec.name, *found, "F8_E4M3, BF16 or F32");
    }
  }

  // Tensors of the checkpoint that the architecture has, but that need not be there.
  void BindOptional();
  // After all else: whatever nobody asked for.
  void FindSurplus();

  absl::Status status(const std::filesystem::path& dir) const;
  // Names of what was given a view.
  const std::set<std::string, std::less<>>& held() const { return held_; }

 private:
  void Problem(std::string problem) {
    if (++num_problems_ <= kMaxProblems) problems_.push_back(std::move(problem));
  }

  const TensorView* Find(const TensorSpec& spec) {
    used_.insert(spec.name);
    const TensorView* found = checkpoint_.Find(spec.name);
    const TensorView wanted{.shape = spec.shape};
    if (found == nullptr) {
      Problem(absl::StrCat("'", spec.name, "' ", wanted.ShapeString(), " is missing"));
    } else if (found->shape != spec.shape) {
      Problem(absl::StrCat("'", spec.name, "' has shape ", found->ShapeString(),
                           ", config.json asks for ", wanted.ShapeString()));
      return nullptr;
    }
    return found;
  }

  void Hold(const TensorSpec& spec, const TensorView& found, TensorView& view) {
    if (!Holds(experts_, spec)) return;
    view = found;
    held_.insert(spec.name);
  }

  void WrongType(const std::string& name, const TensorView& found, const char* supported) {
    Problem(absl::StrCat("'", name, "' is ", std::string(DTypeName(found.dtype)), ", must be ",
                         supported));
  }

  void BindMtpLayer(int32_t index);

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
  const ExpertRange experts_;
  std::set<std::string, std::less<>> used_;
  std::set<std::string, std::less<>> held_;
  std::vector<std::string> problems_;
  size_t num_problems_ = 0;
};

void Binder::BindOptional() {
  if (config_.tie_word_embeddings) {
    // Written by some exporters all the same; then it must be what the config says it is.
    const TensorView* head = checkpoint_.Find("lm_head.weight");
    const TensorView* embedding = checkpoint_.Find("model.embed_tokens.weight");
    used_.insert("lm_head.weight");
    if (head != nullptr && embedding != nullptr &&
        (head->dtype != embedding->dtype || head->shape != embedding->shape ||
         std::memcmp(head->data, embedding->data, head->num_bytes()) != 0)) {
      Problem(
          "'lm_head.weight' differs from 'model.embed_tokens.weight', but config.json has "
          "tie_word_embeddings");
    }
  }
  for (int32_t i = 0; i < config_.num_nextn_predict_layers; ++i) BindMtpLayer(i);
}

// An MTP layer is there as a whole or not at all: Transformers drops it when it saves a model, and
// leaves num_nextn_predict_layers as it was. It is checked like the others and then left alone: it
// joins the weights with speculative decoding.
void Binder::BindMtpLayer(int32_t index) {
  const std::string prefix = absl::StrCat(kLayerPrefix, config_.num_hidden_layers + index, ".");
  const auto first = checkpoint_.tensors().lower_bound(prefix);
  if (first == checkpoint_.tensors().end() || !absl::StartsWith(first->first, prefix)) return;
  VisitMtpLayer(config_, index, *this);
}

void Binder::FindSurplus() {
  const int32_t num_layers = config_.num_hidden_layers + config_.num_nextn_predict_layers;
  for (const auto& [name, view] : checkpoint_.tensors()) {
    // Transformers writes the shared experts of n_shared_experts 0, with no elements.
    if (used_.contains(name) || view.num_elements() == 0) continue;
    // A buffer that old exporters wrote; it is computed from the config.
    if (absl::EndsWith(name, ".rotary_emb.inv_freq")) continue;
    absl::string_view rest = name;
    int32_t layer = 0;
    const bool of_layer = absl::ConsumePrefix(&rest, kLayerPrefix) &&
                          absl::SimpleAtoi(rest.substr(0, rest.find('.')), &layer);
    std::string problem =
        absl::StrCat("'", ShownName(name), "' ", view.ShapeString(), " is surplus");
    if (of_layer && layer >= num_layers) {
      absl::StrAppend(&problem, ": config.json has num_hidden_layers ", config_.num_hidden_layers,
                      " and num_nextn_predict_layers ", config_.num_nextn_predict_layers);
    }
    Problem(std::move(problem));
  }
}

absl::Status Binder::status(const std::filesystem::path& dir) const {
  if (num_problems_ == 0) return absl::OkStatus();
  std::string message = absl::StrCat(
      dir.string(),
      ": the checkpoint does not fit its config.json: ", absl::StrJoin(problems_, "; "));
  if (num_problems_ > problems_.size()) {
    absl::StrAppend(&message, "; ... and ", num_problems_ - problems_.size(), " more");
  }
  return absl::InvalidArgumentError(message);
}

// Maps and checks the checkpoint; `needed` gets the names of the main model's tensors that a rank
// at `placement` holds.
absl::StatusOr<MappedWeights> Bind(const ModelConfig& config, const std::filesystem::path& dir,
                                   const Placement& placement,
                                   std::set<std::string, std::less<>>& needed) {
  MappedWeights mapped;
  ASSIGN_OR_RETURN(mapped.checkpoint, Checkpoint::Open(dir));
  Binder binder(config, *mapped.checkpoint, placement.Experts(config.n_routed_experts));
  VisitWeights(config, mapped.weights, binder);
  needed = binder.held();
  binder.BindOptional();
  binder.FindSurplus();
  RETURN_IF_ERROR(binder.status(dir));
  if (config.tie_word_embeddings) mapped.weights.lm_head = mapped.weights.embed_tokens;
  mapped.weights.storage = mapped.checkpoint;
  return mapped;
}

}  // namespace

absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config,
                                         const std::filesystem::path& dir, LoadFormat format,
                                         const LoadProgress& progress, const Placement& placement) {
  if (format == LoadFormat::kDummy) return MakeDummyWeights(config, progress, placement);
  std::set<std::string, std::less<>> needed;
  ASSIGN_OR_RETURN(MappedWeights mapped, Bind(config, dir, placement, needed));
  RETURN_IF_ERROR(ReadAhead(*mapped.checkpoint, needed, progress));
  return std::move(mapped.weights);
}

absl::StatusOr<MappedWeights> MapWeights(const ModelConfig& config,
                                         const std::filesystem::path& dir,
                                         const Placement& placement) {
  std::set<std::string, std::less<>> needed;
  return Bind(config, dir, placement, needed);
}

absl::Status CheckWeights(const ModelConfig& config, const std::filesystem::path& dir) {
  return MapWeights(config, dir).status();
}

}  // namespace latentd
