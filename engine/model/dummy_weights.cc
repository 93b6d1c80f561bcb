#include "engine/model/dummy_weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/model/dummy_hash.h"
#include "engine/model/host_memory.h"
#include "engine/model/layout.h"
#include "engine/model/load_jobs.h"
#include "engine/model/quantization.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr size_t kAlignment = 64;
constexpr float kSmallDeviation = 0.01f;

// The middles of 256 equally likely slices of the normal distribution: a byte of hash picks one.
std::array<float, 256> MakeNormalQuantiles() {
  std::array<float, 256> quantiles;
  for (int i = 0; i < 256; ++i) {
    const double probability = (i + 0.5) / 256;
    double low = -4, high = 4;
    for (int step = 0; step < 50; ++step) {
      const double middle = (low + high) / 2;
      (0.5 * std::erfc(-middle / std::sqrt(2.0)) < probability ? low : high) = middle;
    }
    quantiles[i] = static_cast<float>(low);
  }
  return quantiles;
}

const std::array<float, 256>& NormalQuantiles() {
  static const std::array<float, 256> quantiles = MakeNormalQuantiles();
  return quantiles;
}

// Fills elements [begin, end) of tensor number `tensor` with the table's entries; begin is a
// multiple of 8.
template <typename T>
void FillFrom(const std::array<T, 256>& table, uint64_t tensor, int64_t begin, int64_t end,
              T* out) {
  for (int64_t i = begin; i < end; i += 8) {
    uint64_t bytes = DummyHash(tensor, static_cast<uint64_t>(i));
    for (int64_t j = i; j < std::min(i + 8, end); ++j, bytes >>= 8) out[j] = table[bytes & 0xff];
  }
}

// Gives every tensor its type, shape and content.
class Planner : public WeightVisitor {
 public:
  explicit Planner(const ModelConfig& config) : config_(config) {}

  void Tensor(const TensorSpec& spec, TensorView& view) override {
    const DType dtype = spec.kind == WeightKind::kCorrectionBias ? DType::kF32 : Plain();
    const bool small = spec.kind == WeightKind::kCorrectionBias || spec.kind == WeightKind::kBias;
    const bool norm = spec.kind == WeightKind::kNorm;
    const float deviation = norm ? 0 : small ? kSmallDeviation : Deviation(spec.shape);
    Add(spec, view, dtype, spec.shape, norm ? 1.0f : 0.0f, deviation);
  }

  void Linear(const TensorSpec& spec, LinearWeight& linear) override {
    const float deviation = Deviation(spec.shape);
    if (!config_.quantization) return Add(spec, linear.weight, Plain(), spec.shape, 0, deviation);
    Add(spec, linear.weight, DType::kF8E4M3, spec.shape, 0, deviation);
    Add(spec, linear.scale_inv, DType::kF32, ScaleShape(*config_.quantization, spec.shape),
        deviation * E4m3Unit(), 0);
  }

  // What a unit of deviation is multiplied by to use the whole range of e4m3, inverted.
  static float E4m3Unit() { return NormalQuantiles().back() / kE4m3Max; }

  std::vector<DummyTensor> TakeTensors() { return std::move(tensors_); }

 private:
  DType Plain() const { return config_.dtype_bytes == 4 ? DType::kF32 : DType::kBF16; }
  static float Deviation(const std::vector<int64_t>& shape) {
    return 1.0f / std::sqrt(static_cast<float>(shape.back()));
  }

  void Add(const TensorSpec& spec, TensorView& view, DType dtype, const std::vector<int64_t>& shape,
           float mean, float deviation) {
    view = {.dtype = dtype, .shape = shape};
    tensors_.push_back({&view, mean, deviation, spec.expert});
  }

  const ModelConfig& config_;
  std::vector<DummyTensor> tensors_;
};

class AnonymousMemory {
 public:
  static absl::StatusOr<std::shared_ptr<AnonymousMemory>> Allocate(size_t bytes) {
    const uint64_t available = AvailableMemoryBytes();
    if (bytes > available) {
      return absl::ResourceExhaustedError(absl::StrFormat(
          "the weights need %d bytes of memory; %d are available", bytes, available));
    }
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("cannot allocate %d bytes for weights: %s", bytes, std::strerror(errno)));
    }
    ::madvise(data, bytes, MADV_HUGEPAGE);
    return std::shared_ptr<AnonymousMemory>(new AnonymousMemory(data, bytes));
  }
  ~AnonymousMemory() { ::munmap(data_, bytes_); }
  AnonymousMemory(const AnonymousMemory&) = delete;
  AnonymousMemory& operator=(const AnonymousMemory&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  AnonymousMemory(void* data, size_t bytes) : data_(data), bytes_(bytes) {}
  void* data_;
  size_t bytes_;
};

size_t PaddedBytes(const TensorView& view) {
  return (view.num_bytes() + kAlignment - 1) / kAlignment * kAlignment;
}

void FillElements(const std::array<uint8_t, 256>& e4m3, const DummyTensor& fill, uint64_t tensor,
                  int64_t begin, int64_t end) {
  // The memory is ours and the views are const for everybody else.
  auto* data = const_cast<std::byte*>(fill.view->data);
  if (fill.view->dtype == DType::kF8E4M3) {
    return FillFrom(e4m3, tensor, begin, end, reinterpret_cast<uint8_t*>(data));
  }
  const std::array<float, 256> values = DummyValues(fill);
  if (fill.view->dtype == DType::kF32) {
    return FillFrom(values, tensor, begin, end, reinterpret_cast<float*>(data));
  }
  std::array<uint16_t, 256> bf16;
  std::transform(values.begin(), values.end(), bf16.begin(), FloatToBf16);
  FillFrom(bf16, tensor, begin, end, reinterpret_cast<uint16_t*>(data));
}

}  // namespace

std::vector<DummyTensor> PlanDummyWeights(const ModelConfig& config, ModelWeights& weights) {
  Planner planner(config);
  VisitWeights(config, weights, planner);
  return planner.TakeTensors();
}

// The quantiles, spread over the whole range of e4m3.
std::array<uint8_t, 256> DummyValuesE4m3() {
  std::array<uint8_t, 256> codes;
  for (int i = 0; i < 256; ++i) codes[i] = FloatToE4m3(NormalQuantiles()[i] / Planner::E4m3Unit());
  return codes;
}

std::array<float, 256> DummyValues(const DummyTensor& tensor) {
  std::array<float, 256> values;
  for (int i = 0; i < 256; ++i) values[i] = tensor.mean + tensor.deviation * NormalQuantiles()[i];
  return values;
}

absl::StatusOr<ModelWeights> MakeDummyWeights(const ModelConfig& config,
                                              const LoadProgress& progress,
                                              const Placement& placement) {
  ModelWeights weights;
  const std::vector<DummyTensor> tensors = PlanDummyWeights(config, weights);
  const ExpertRange experts = placement.Experts(config.n_routed_experts);
  const auto held = [&experts](const DummyTensor& tensor) {
    return tensor.expert == kNoExpert || experts.contains(tensor.expert);
  };
  size_t num_bytes = 0;
  for (const DummyTensor& tensor : tensors) {
    if (held(tensor)) num_bytes += PaddedBytes(*tensor.view);
  }
  ASSIGN_OR_RETURN(std::shared_ptr<AnonymousMemory> memory, AnonymousMemory::Allocate(num_bytes));

  const std::array<uint8_t, 256> e4m3 = DummyValuesE4m3();
  const std::byte* place = memory->data();
  std::vector<LoadJob> jobs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const DummyTensor& fill = tensors[i];
    if (!held(fill)) {
      *fill.view = {};
      continue;
    }
    fill.view->data = place;
    place += PaddedBytes(*fill.view);
    const int64_t n = fill.view->num_elements();
    const auto element_bytes = static_cast<int64_t>(DTypeBytes(fill.view->dtype));
    const int64_t step = static_cast<int64_t>(kLoadJobBytes) / element_bytes;
    for (int64_t begin = 0; begin < n; begin += step) {
      const int64_t end = std::min(begin + step, n);
      jobs.push_back(
          {static_cast<uint64_t>((end - begin) * element_bytes), [&e4m3, &fill, i, begin, end] {
             FillElements(e4m3, fill, i, begin, end);
             return absl::OkStatus();
           }});
    }
  }
  RETURN_IF_ERROR(RunLoadJobs(jobs, progress));
  if (config.tie_word_embeddings) weights.lm_head = weights.embed_tokens;
  weights.storage = std::move(memory);
  return weights;
}

}  // namespace latentd
