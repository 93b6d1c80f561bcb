#include "engine/cuda/gpu_staging.h"

#include <algorithm>
#include <array>
#include <vector>

#include "engine/model/quantization.h"
#include "engine/status.h"

namespace latentd {
namespace {

bool OneBlock(const WeightCopy& copy) { return copy.block_rows == copy.num_rows; }

// Reads the stored elements of rows [begin, end), packed.
absl::Status ReadRows(const WeightCopy& copy, int64_t begin, int64_t end, const ReadBytes& read,
                      std::byte* out) {
  const int64_t cols = copy.source_cols();
  const auto element = static_cast<int64_t>(DTypeBytes(copy.source->dtype));
  const bool whole_rows = copy.num_cols == cols;
  const bool adjacent = copy.source_block_rows == copy.block_rows;
  for (int64_t row = begin; row < end;) {
    // The longest run that lies together in the file.
    int64_t rows = 1;
    if (whole_rows) rows = adjacent ? end - row : copy.block_rows - row % copy.block_rows;
    rows = std::min(rows, end - row);
    const int64_t at = copy.source_row(row) * cols + copy.col_begin;
    const auto bytes = static_cast<size_t>(rows * copy.num_cols * element);
    RETURN_IF_ERROR(read(copy.source->data + at * element, bytes, out));
    out += bytes;
    row += rows;
  }
  return absl::OkStatus();
}

// FP8 codes of whole rows [begin, end) times the scales of their blocks, as bf16.
void DequantizeRows(const WeightCopy& copy, int64_t begin, int64_t end, const float* scales,
                    const uint8_t* codes, uint16_t* out) {
  const int64_t scale_cols = copy.scale_inv->shape[1];
  std::array<uint16_t, 256> values;
  for (int64_t row = begin; row < end;) {
    // Rows of one row of blocks; each of its blocks has but 256 values.
    const int64_t first = copy.source_row(row);
    int64_t next = row + 1;
    while (next < end && copy.source_row(next) == first + next - row &&
           copy.source_row(next) / kQuantGroup == first / kQuantGroup) {
      ++next;
    }
    for (int64_t block = 0; block < scale_cols; ++block) {
      const float scale = scales[first / kQuantGroup * scale_cols + block];
      for (int code = 0; code < 256; ++code) {
        values[code] = FloatToBf16(E4m3ToFloat(static_cast<uint8_t>(code)) * scale);
      }
      const int64_t col_begin = block * kQuantGroup;
      const int64_t col_end = std::min<int64_t>(col_begin + kQuantGroup, copy.num_cols);
      for (int64_t r = row - begin; r < next - begin; ++r) {
        for (int64_t i = r * copy.num_cols + col_begin; i < r * copy.num_cols + col_end; ++i) {
          out[i] = values[codes[i]];
        }
      }
    }
    row = next;
  }
}

// `count` elements between bf16 and f32.
void Convert(const WeightCopy& copy, size_t count, const std::byte* in, std::byte* out) {
  if (copy.target_dtype == DType::kBF16) {
    LATENTD_CHECK(copy.source->dtype == DType::kF32);
    const auto* values = reinterpret_cast<const float*>(in);
    std::transform(values, values + count, reinterpret_cast<uint16_t*>(out), FloatToBf16);
  } else {
    LATENTD_CHECK(copy.target_dtype == DType::kF32 && copy.source->dtype == DType::kBF16);
    const auto* values = reinterpret_cast<const uint16_t*>(in);
    std::transform(values, values + count, reinterpret_cast<float*>(out), Bf16ToFloat);
  }
}

}  // namespace

size_t PieceBytes(const WeightCopy& copy, int64_t rows) {
  const size_t element = std::max(DTypeBytes(copy.source->dtype), DTypeBytes(copy.target_dtype));
  return static_cast<size_t>(rows * copy.num_cols) * element;
}

int64_t PieceRows(const WeightCopy& copy, size_t bytes) {
  const size_t row_bytes = std::max<size_t>(PieceBytes(copy, 1), 1);
  const auto rows = static_cast<int64_t>(bytes / row_bytes);
  const int64_t unit = OneBlock(copy) ? 1 : copy.block_rows;
  return std::min(copy.num_rows, std::max(rows / unit * unit, unit));
}

absl::Status StageRows(const WeightCopy& copy, int64_t begin, int64_t end, const ReadBytes& read,
                       std::byte* scratch, std::byte* out) {
  if (!copy.converts()) return ReadRows(copy, begin, end, read, out);
  RETURN_IF_ERROR(ReadRows(copy, begin, end, read, scratch));
  if (copy.scale_inv == nullptr) {
    Convert(copy, static_cast<size_t>((end - begin) * copy.num_cols), scratch, out);
    return absl::OkStatus();
  }
  std::vector<float> scales(static_cast<size_t>(copy.scale_inv->num_elements()));
  RETURN_IF_ERROR(read(copy.scale_inv->data, copy.scale_inv->num_bytes(),
                       reinterpret_cast<std::byte*>(scales.data())));
  DequantizeRows(copy, begin, end, scales.data(), reinterpret_cast<const uint8_t*>(scratch),
                 reinterpret_cast<uint16_t*>(out));
  return absl::OkStatus();
}

RowTarget PlaceRows(const WeightCopy& copy, int64_t begin, int64_t end) {
  const auto element = static_cast<int64_t>(DTypeBytes(copy.target_dtype));
  const int64_t row_bytes = copy.target_cols * element;
  const int64_t first = begin / copy.block_rows * copy.target_block_rows + begin % copy.block_rows;
  // One run, unless rows or blocks of rows have something in between.
  int64_t pitch = (end - begin) * row_bytes, width = pitch, height = 1;
  if (copy.num_cols != copy.target_cols) {
    pitch = row_bytes;
    width = copy.num_cols * element;
    height = end - begin;
  } else if (!OneBlock(copy) && copy.target_block_rows != copy.block_rows) {
    pitch = copy.target_block_rows * row_bytes;
    width = copy.block_rows * row_bytes;
    height = (end - begin) / copy.block_rows;
  }
  return {.target = copy.target + first * row_bytes,
          .pitch = static_cast<size_t>(pitch),
          .width = static_cast<size_t>(width),
          .height = static_cast<size_t>(height)};
}

}  // namespace latentd
