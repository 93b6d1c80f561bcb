#include "engine/cpu/packed_matrix.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "engine/model/quantization.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPiece = size_t{32} << 20;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t PartN(const MatrixPart& part) {
  return part.transposed ? part.linear->weight.shape[1] : part.num_rows;
}
int64_t PartK(const MatrixPart& part) {
  return part.transposed ? part.num_rows : part.linear->weight.shape[1];
}

bool IsFp8(const MatrixPart& part) { return part.linear->weight.dtype == DType::kF8E4M3; }

// out[count] = elements first, first + stride, ... of `tensor` as they are stored, without scales.
void ReadCodes(const TensorView& tensor, int64_t first, int64_t stride, int64_t count, float* out) {
  switch (tensor.dtype) {
    case DType::kF8E4M3: {
      const auto* codes = reinterpret_cast<const uint8_t*>(tensor.data);
      for (int64_t i = 0; i < count; ++i) out[i] = E4m3ToFloat(codes[first + i * stride]);
      return;
    }
    case DType::kBF16: {
      const auto* codes = reinterpret_cast<const uint16_t*>(tensor.data);
      for (int64_t i = 0; i < count; ++i) out[i] = Bf16ToFloat(codes[first + i * stride]);
      return;
    }
    default: {
      LATENTD_CHECK(tensor.dtype == DType::kF32);
      const auto* values = reinterpret_cast<const float*>(tensor.data);
      for (int64_t i = 0; i < count; ++i) out[i] = values[first + i * stride];
    }
  }
}

// Row `i` of the part as a matrix [n, k].
void ReadRow(const MatrixPart& part, int64_t i, float* out) {
  const int64_t columns = part.linear->weight.shape[1];
  if (part.transposed) {
    ReadCodes(part.linear->weight, part.row_begin * columns + i, columns, part.num_rows, out);
  } else {
    ReadCodes(part.linear->weight, (part.row_begin + i) * columns, 1, columns, out);
  }
}

// The scale of the part's element [i, k].
float ScaleAt(const MatrixPart& part, const Fp8Quantization& q, int64_t i, int64_t k) {
  const int64_t row = part.row_begin + (part.transposed ? k : i);
  const int64_t column = part.transposed ? i : k;
  const TensorView& scales = part.linear->scale_inv;
  const int64_t index = row / q.block_rows * scales.shape[1] + column / q.block_cols;
  return reinterpret_cast<const float*>(scales.data)[index];
}

// The k of one scale when all parts can be packed with scales apart, else 0.
int ScaleGroup(const std::vector<MatrixPart>& parts, const Fp8Quantization& q) {
  int group = 0;
  for (const MatrixPart& part : parts) {
    const int part_group = part.transposed ? q.block_rows : q.block_cols;
    const bool aligned = !part.transposed || part.row_begin % q.block_rows == 0;
    if (part_group % kRowPadding != 0 || !aligned || (group != 0 && group != part_group)) return 0;
    group = part_group;
  }
  return group;
}

struct Located {
  const MatrixPart* part;
  int64_t row;
};
Located Locate(const std::vector<MatrixPart>& parts, int64_t n) {
  for (const MatrixPart& part : parts) {
    if (n < PartN(part)) return {&part, n};
    n -= PartN(part);
  }
  return {nullptr, 0};
}

}  // namespace

void Arena::Free::operator()(std::byte* piece) const { std::free(piece); }

std::byte* Arena::Allocate(size_t bytes) {
  bytes = static_cast<size_t>(RoundUp(static_cast<int64_t>(bytes), 64));
  if (bytes > left_) {
    const size_t size =
        std::max(kPiece, static_cast<size_t>(RoundUp(static_cast<int64_t>(bytes), kHugePage)));
    void* piece = std::aligned_alloc(kHugePage, size);
    if (piece == nullptr) return nullptr;
    madvise(piece, size, MADV_HUGEPAGE);  // only advice: small pages do as well, slower
    pieces_.emplace_back(static_cast<std::byte*>(piece));
    next_ = pieces_.back().get();
    left_ = size;
  }
  std::byte* result = next_;
  next_ += bytes;
  left_ -= bytes;
  bytes_used_ += bytes;
  std::memset(result, 0, bytes);
  return result;
}

size_t PackedBytes(int64_t n, int64_t k, DType dtype) {
  const size_t elements = static_cast<size_t>(RoundUp(n, kPanelCols) * RoundUp(k, kRowPadding));
  if (dtype == DType::kF32) return elements * sizeof(float);
  // A scale per column and 32 of k is the most that FP8 can need; per 128 it is 1.5 % of the rest.
  return elements * sizeof(uint16_t) + (dtype == DType::kF8E4M3 ? elements / 32 : 0);
}

PackedMatrix Pack(const std::vector<MatrixPart>& parts,
                  const std::optional<Fp8Quantization>& quantization, ThreadPool& pool,
                  Arena& arena) {
  PackedMatrix m;
  m.k = static_cast<int>(PartK(parts[0]));
  m.k_padded = static_cast<int>(RoundUp(m.k, kRowPadding));
  m.group = m.k_padded;
  bool f32 = false;
  bool any_fp8 = false, all_fp8 = true;
  for (const MatrixPart& part : parts) {
    LATENTD_CHECK(PartK(part) == m.k);
    m.n += static_cast<int>(PartN(part));
    f32 = f32 || part.linear->weight.dtype == DType::kF32;
    any_fp8 = any_fp8 || IsFp8(part);
    all_fp8 = all_fp8 && IsFp8(part);
  }
  int num_groups = 0;
  if (any_fp8) {
    LATENTD_CHECK(quantization.has_value());
    const int group = all_fp8 ? ScaleGroup(parts, *quantization) : 0;
    f32 = group == 0;
    if (!f32) {
      m.group = group;
      num_groups = (m.k_padded + group - 1) / group;
    }
  }

  const size_t panel = static_cast<size_t>(m.k_padded) * kPanelCols;
  std::byte* data =
      arena.Allocate(panel * m.num_panels() * (f32 ? sizeof(float) : sizeof(uint16_t)));
  if (data == nullptr) return m;
  float* scales = nullptr;
  if (num_groups > 0) {
    scales = reinterpret_cast<float*>(
        arena.Allocate(sizeof(float) * m.num_panels() * num_groups * kPanelCols));
    if (scales == nullptr) return m;
  }
  auto* out_f32 = reinterpret_cast<float*>(data);
  auto* out_bf16 = reinterpret_cast<uint16_t*>(data);
  pool.For(m.num_panels(), 1, [&](int64_t begin, int64_t end, int) {
    std::vector<float> row(m.k);
    for (int64_t n = begin * kPanelCols; n < std::min<int64_t>(end * kPanelCols, m.n); ++n) {
      const auto [part, part_row] = Locate(parts, n);
      ReadRow(*part, part_row, row.data());
      const int64_t p = n / kPanelCols, column = n % kPanelCols;
      if (f32) {
        for (int k = 0; k < m.k; ++k) {
          const float scale = IsFp8(*part) ? ScaleAt(*part, *quantization, part_row, k) : 1.0f;
          out_f32[p * panel + k * kPanelCols + column] = row[k] * scale;
        }
        continue;
      }
      for (int k = 0; k < m.k; ++k) {
        out_bf16[p * panel + (k / 2 * kPanelCols + column) * 2 + k % 2] = FloatToBf16(row[k]);
      }
      for (int g = 0; g < num_groups && g * m.group < m.k; ++g) {
        scales[(p * num_groups + g) * kPanelCols + column] =
            ScaleAt(*part, *quantization, part_row, int64_t{g} * m.group);
      }
    }
  });

  const TensorView& bias = parts[0].linear->bias;
  if (!bias.empty()) {
    LATENTD_CHECK(parts.size() == 1 && !parts[0].transposed && m.n == bias.num_elements());
    auto* values = reinterpret_cast<float*>(arena.Allocate(sizeof(float) * m.n));
    if (values == nullptr) return m;
    ToFloat(bias, values);
    m.bias = values;
  }
  if (f32) {
    m.f32 = out_f32;
  } else {
    m.bf16 = out_bf16;
  }
  m.scales = scales;
  return m;
}

}  // namespace latentd
