#include "engine/cuda/step_trace.h"

#include <algorithm>
#include <numeric>

#include "engine/cuda/cuda_status.h"
#include "engine/model/quantization.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int kLatents = kMlaLatentDim;
constexpr int kRope = kMlaRopeDim;

std::vector<float> Floats(const std::vector<__nv_bfloat16>& values) {
  std::vector<float> floats(values.size());
  std::transform(values.begin(), values.end(), floats.begin(),
                 [](__nv_bfloat16 value) { return __bfloat162float(value); });
  return floats;
}

}  // namespace

template <typename T>
absl::StatusOr<std::vector<T>> StepTrace::Read(const T* device, int64_t count) {
  std::vector<T> host(count);
  RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost, stream_));
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_));
  return host;
}

// order[i]: where row i belongs.
void StepTrace::Report(std::string_view name, int layer, absl::Span<const float> data, int columns,
                       int64_t stride, absl::Span<const int32_t> order) {
  std::vector<float> sorted(order.size() * columns);
  for (size_t i = 0; i < order.size(); ++i)
    std::copy_n(data.data() + i * stride, columns, sorted.data() + size_t(order[i]) * columns);
  sink_->Rows(name, layer, sorted.data(), static_cast<int>(order.size()), columns, columns);
}

absl::Status StepTrace::Embedding(const float* residual, int hidden_size) {
  ASSIGN_OR_RETURN(const auto rows, Read(residual, plan_rows_.size() * int64_t{hidden_size}));
  Report("embed", -1, rows, hidden_size, hidden_size, plan_rows_);
  return absl::OkStatus();
}

absl::Status StepTrace::Rows(std::string_view name, int layer, const __nv_bfloat16* data,
                             int columns, int64_t stride) {
  const int64_t rows = static_cast<int64_t>(plan_rows_.size());
  ASSIGN_OR_RETURN(const auto values, Read(data, (rows - 1) * stride + columns));
  Report(name, layer, Floats(values), columns, stride, plan_rows_);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> StepTrace::ReadCacheRow(const MlaCache& cache, int64_t slot) {
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<const __nv_bfloat16*>(cache.data + offset);
  };
  if (cache.format == CacheFormat::kBf16) {
    ASSIGN_OR_RETURN(const auto row, Read(at(MlaBf16Offset(slot)), kLatents + kRope));
    return Floats(row);
  }
  ASSIGN_OR_RETURN(const auto latents, Read(cache.data + MlaFp8LatentsOffset(slot), kLatents));
  ASSIGN_OR_RETURN(const auto rope, Read(at(MlaFp8RopeOffset(slot)), kRope));
  ASSIGN_OR_RETURN(const auto scale,
                   Read(reinterpret_cast<const float*>(cache.data + MlaFp8ScaleOffset(slot)), 1));
  std::vector<float> row(kLatents);
  std::transform(latents.begin(), latents.end(), row.begin(),
                 [](std::byte bits) { return E4m3ToFloat(static_cast<uint8_t>(bits)); });
  const std::vector<float> rope_floats = Floats(rope);
  row.insert(row.end(), rope_floats.begin(), rope_floats.end());
  for (float& value : row) value *= scale[0];
  return row;
}

absl::Status StepTrace::Cache(int layer, const MlaCache& cache) {
  constexpr int kRow = kLatents + kRope;
  std::vector<float> rows(slots_.size() * kRow);
  for (size_t i = 0; i < slots_.size(); ++i) {
    ASSIGN_OR_RETURN(const auto row, ReadCacheRow(cache, slots_[i]));
    std::copy(row.begin(), row.end(), rows.begin() + i * kRow);
  }
  Report("c_kv", layer, rows, kLatents, kRow, plan_rows_);
  Report("k_pe", layer, absl::MakeConstSpan(rows).subspan(kLatents), kRope, kRow, plan_rows_);
  return absl::OkStatus();
}

absl::Status StepTrace::Experts(int layer, const MoeRouting& routing, int begin, int rows, int k) {
  ASSIGN_OR_RETURN(const auto ids, Read(routing.topk_ids, int64_t{rows} * k));
  ASSIGN_OR_RETURN(const auto weights, Read(routing.weights, int64_t{rows} * routing.num_choices));
  const bool whole = begin == 0 && rows == static_cast<int>(plan_rows_.size());
  std::vector<int32_t> experts(ids.size());
  std::vector<float> sorted(ids.size());
  std::vector<int> order(k);
  for (int row = 0; row < rows; ++row) {  // best first becomes ascending
    const int32_t* of_row = ids.data() + row * k;
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) { return of_row[a] < of_row[b]; });
    const int to = whole ? plan_rows_[row] : row;
    for (int j = 0; j < k; ++j) {
      experts[to * k + j] = of_row[order[j]];
      sorted[to * k + j] = weights[row * routing.num_choices + order[j]];
    }
  }
  sink_->Rows("experts", layer, experts.data(), rows, k);
  sink_->Rows("expert_weights", layer, sorted.data(), rows, k, k);
  return absl::OkStatus();
}

absl::Status StepTrace::BeforeMlp(const float* residual, int hidden_size, int begin, int rows) {
  const int64_t first = int64_t{begin} * hidden_size;
  ASSIGN_OR_RETURN(const auto part, Read(residual + first, int64_t{rows} * hidden_size));
  before_mlp_.resize(plan_rows_.size() * hidden_size);
  std::copy(part.begin(), part.end(), before_mlp_.begin() + first);
  return absl::OkStatus();
}

absl::Status StepTrace::AfterMlp(int layer, const float* residual, int hidden_size) {
  ASSIGN_OR_RETURN(const auto after, Read(residual, plan_rows_.size() * int64_t{hidden_size}));
  for (size_t i = 0; i < after.size(); ++i) before_mlp_[i] = after[i] - before_mlp_[i];
  Report("mlp_out", layer, before_mlp_, hidden_size, hidden_size, plan_rows_);
  Report("out", layer, after, hidden_size, hidden_size, plan_rows_);
  return absl::OkStatus();
}

absl::Status StepTrace::FinalHidden(const __nv_bfloat16* last, int hidden_size) {
  ASSIGN_OR_RETURN(const auto rows, Read(last, plan_samples_.size() * int64_t{hidden_size}));
  Report("final_hidden", -1, Floats(rows), hidden_size, hidden_size, plan_samples_);
  return absl::OkStatus();
}

absl::Status StepTrace::Logits(const float* logits, int begin, int rows, int vocab_size) {
  if (begin == 0) logits_.clear();
  ASSIGN_OR_RETURN(const auto part, Read(logits, int64_t{rows} * vocab_size));
  logits_.insert(logits_.end(), part.begin(), part.end());
  if (begin + rows == static_cast<int>(plan_samples_.size()))
    Report("logits", -1, logits_, vocab_size, vocab_size, plan_samples_);
  return absl::OkStatus();
}

}  // namespace latentd
