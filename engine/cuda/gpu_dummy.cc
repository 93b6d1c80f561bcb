#include "engine/cuda/gpu_dummy.h"

#include <array>
#include <cstring>
#include <map>
#include <tuple>
#include <unordered_map>

#include "engine/cuda/cuda_status.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels/random_fill.h"
#include "engine/model/quantization.h"
#include "engine/status.h"

namespace latentd {
namespace {

// What each of the 256 random bytes stands for, in the type of the target.
using ValueTable = std::array<std::byte, 256 * sizeof(float)>;

// `scale`: of FP8 that is dequantised.
ValueTable MakeValues(const DummyTensor& tensor, float scale, DType target) {
  ValueTable table = {};
  const DType source = tensor.view->dtype;
  const std::array<uint8_t, 256> codes = DummyValuesE4m3();
  if (target == DType::kF8E4M3) {
    std::memcpy(table.data(), codes.data(), codes.size());
    return table;
  }
  std::array<float, 256> values = DummyValues(tensor);
  for (int i = 0; i < 256; ++i) {
    if (source == DType::kF8E4M3) values[i] = E4m3ToFloat(codes[i]) * scale;
    if (source == DType::kBF16) values[i] = Bf16ToFloat(FloatToBf16(values[i]));
    const uint16_t bf16 = FloatToBf16(values[i]);
    if (target == DType::kBF16) std::memcpy(table.data() + i * sizeof(bf16), &bf16, sizeof(bf16));
  }
  if (target == DType::kF32) std::memcpy(table.data(), values.data(), sizeof(values));
  return table;
}

// The tables of all copies: few, as they depend on types and deviations alone.
class ValueTables {
 public:
  size_t Add(const DummyTensor& tensor, float scale, DType target) {
    const auto [it, added] = index_.try_emplace(
        {tensor.view->dtype, target, tensor.mean, tensor.deviation, scale}, tables_.size());
    if (added) tables_.push_back(MakeValues(tensor, scale, target));
    return it->second;
  }
  const std::vector<ValueTable>& tables() const { return tables_; }

 private:
  std::map<std::tuple<DType, DType, float, float, float>, size_t> index_;
  std::vector<ValueTable> tables_;
};

}  // namespace

absl::Status MakeOnGpu(const std::vector<DummyTensor>& tensors,
                       const std::vector<WeightCopy>& copies, const LoadProgress& progress) {
  std::unordered_map<const TensorView*, size_t> numbers;
  for (size_t i = 0; i < tensors.size(); ++i) numbers[tensors[i].view] = i;
  ValueTables tables;
  std::vector<size_t> table_of(copies.size());
  uint64_t total_bytes = 0;
  for (size_t i = 0; i < copies.size(); ++i) {
    const WeightCopy& copy = copies[i];
    // The scales of a tensor are all the same.
    const float scale = copy.scale_inv == nullptr ? 1 : tensors[numbers.at(copy.scale_inv)].mean;
    table_of[i] = tables.Add(tensors[numbers.at(copy.source)], scale, copy.target_dtype);
    total_bytes +=
        static_cast<uint64_t>(copy.num_rows * copy.num_cols) * DTypeBytes(copy.target_dtype);
  }
  const size_t table_bytes = tables.tables().size() * sizeof(ValueTable);
  ASSIGN_OR_RETURN(const DeviceMemory values, DeviceMemory::Allocate(table_bytes));
  RETURN_IF_CUDA_ERROR(
      cudaMemcpy(values.data(), tables.tables().data(), table_bytes, cudaMemcpyHostToDevice));

  if (progress) progress(0, total_bytes);
  for (size_t i = 0; i < copies.size(); ++i) {
    const WeightCopy& copy = copies[i];
    const RandomFillArgs args = {.tensor = numbers.at(copy.source),
                                 .values = values.data() + table_of[i] * sizeof(ValueTable),
                                 .element_bytes = static_cast<int>(DTypeBytes(copy.target_dtype)),
                                 .target = copy.target,
                                 .num_rows = copy.num_rows,
                                 .num_cols = copy.num_cols,
                                 .source_cols = copy.source_cols(),
                                 .row_begin = copy.row_begin,
                                 .col_begin = copy.col_begin,
                                 .block_rows = copy.block_rows,
                                 .source_block_rows = copy.source_block_rows,
                                 .target_block_rows = copy.target_block_rows,
                                 .target_cols = copy.target_cols};
    RETURN_IF_CUDA_ERROR(RandomFill(args, /*stream=*/nullptr));
  }
  RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
  if (progress) progress(total_bytes, total_bytes);
  return absl::OkStatus();
}

}  // namespace latentd
