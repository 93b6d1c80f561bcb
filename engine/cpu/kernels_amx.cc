// GEMM on AMX tiles, exact in fp32: an activation is split into three bf16 terms (8 significant
// bits each, 24 in all), the weights are bf16 or FP8 codes and so already exact, and a product of
// two bf16 is exact in the fp32 accumulator. One split tile holds 5 tokens as 15 rows; the three
// sums of a token are added at the end. Everything else is the AVX-512 code.
//
// Bound: weights of 2 bytes are read once a step; a tile product of 15 x 16 x 32 takes 16 cycles,
// 5 / 16 of what fp32 FMA would need for the same 5 tokens.

#include <immintrin.h>

#include <cstring>

#include "engine/cpu/kernels_impl.h"
#include "engine/cpu/vec_avx512.h"

namespace latentd {
namespace {

constexpr int kTileRows = 3 * kSplitTokens;        // of a split tile
constexpr int kTileElements = kTileRows * 32;      // bf16 of one split tile and 32 of k
constexpr int kPanelStrideBytes = kPanelCols * 4;  // of a pair of k
constexpr int kPartK = 256;                        // k of a panel that is worked on together

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3: sums of (token tile 0 or 1) x (columns 0..15 or 16..31); 4, 5: tokens; 6, 7: weights.
//
// Once for each thread, and for good: to configure and release the tiles around a panel took a
// third of a small batch's time. So a token tile is always 15 rows, whatever rows of it are in use;
// a row of a product depends on its own row alone. A thread that has used tiles costs 8 KB more
// when it is switched, and nothing else here uses them.
void ConfigureTiles() {
  thread_local bool configured = false;
  if (configured) return;
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.column_bytes[i] = 64;
    config.rows[i] = i < 6 ? kTileRows : 16;
  }
  _tile_loadconfig(&config);
  configured = true;
}

// sums[30, 32] = the products of up to two token tiles over k in [begin, end).
template <bool kTwo>
void MultiplyTiles(const uint16_t* tokens0, const uint16_t* tokens1, const uint16_t* panel,
                   int begin, int end, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = begin; k < end; k += 32) {
    const uint16_t* weights = panel + k * kPanelCols;
    _tile_loadd(6, weights, kPanelStrideBytes);
    _tile_loadd(4, tokens0 + k / 32 * kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + 32, kPanelStrideBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, tokens1 + k / 32 * kTileElements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kPanelCols * 4);
  _tile_stored(1, sums + 16, kPanelCols * 4);
  if constexpr (kTwo) {
    _tile_stored(2, sums + kTileRows * kPanelCols, kPanelCols * 4);
    _tile_stored(3, sums + kTileRows * kPanelCols + 16, kPanelCols * 4);
  }
}

// Adds k in [begin, end) to the sums of up to two token tiles. `partial` [rows, 32] holds the sums
// of what lies before; those of the last part go to a.out.
template <bool kTwo>
void GemmTiles(const GemmPanelArgs& a, int first_row, int rows, int begin, int end,
               float* partial) {
  alignas(64) float sums[2 * kTileRows * kPanelCols];
  const ptrdiff_t tile_stride = static_cast<ptrdiff_t>(a.k / 32) * kTileElements;
  const uint16_t* tokens0 = a.split + first_row / kSplitTokens * tile_stride;
  __m512 total[2 * kSplitTokens][2];
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < 2; ++j) {
      total[r][j] =
          begin == 0 ? _mm512_setzero_ps() : _mm512_load_ps(partial + r * kPanelCols + 16 * j);
    }
  }
  for (int group = begin; group < end; group += a.group) {
    const int group_end = group + a.group < end ? group + a.group : end;
    MultiplyTiles<kTwo>(tokens0, tokens0 + tile_stride, a.panel_bf16, group, group_end, sums);
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < 2; ++j) {
        const float* s = sums + 3 * r * kPanelCols + 16 * j;
        __m512 low =
            _mm512_add_ps(_mm512_load_ps(s + kPanelCols), _mm512_load_ps(s + 2 * kPanelCols));
        __m512 sum = _mm512_add_ps(_mm512_load_ps(s), low);
        if (a.scales != nullptr) {
          __m512 scale = _mm512_loadu_ps(a.scales + group / a.group * kPanelCols + 16 * j);
          total[r][j] = _mm512_fmadd_ps(scale, sum, total[r][j]);
        } else {
          total[r][j] = _mm512_add_ps(sum, total[r][j]);
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    float* out = a.out + (first_row + r) * a.out_stride;
    if (end == a.k && a.cols == kPanelCols) {
      _mm512_storeu_ps(out, total[r][0]);
      _mm512_storeu_ps(out + 16, total[r][1]);
      continue;
    }
    _mm512_store_ps(partial + r * kPanelCols, total[r][0]);
    _mm512_store_ps(partial + r * kPanelCols + 16, total[r][1]);
    if (end == a.k) std::memcpy(out, partial + r * kPanelCols, sizeof(float) * a.cols);
  }
}

void GemmPanel(const GemmPanelArgs& a) {
  if (a.panel_bf16 == nullptr) return KernelsImpl<VecAvx512>::GemmPanel(a);
  ConfigureTiles();
  alignas(64) float partial[kMaxGemmRows * kPanelCols];
  // A part of the panel stays in the first cache while all token tiles go by: 16 KB of it, in whole
  // groups.
  const int part = a.group >= kPartK ? kPartK : kPartK / a.group * a.group;
  const int full_rows = a.rows / (2 * kSplitTokens) * (2 * kSplitTokens);
  const int rest = a.rows - full_rows;
  for (int begin = 0; begin < a.k;) {
    int end = begin + part < a.k ? begin + part : a.k;
    const int group_end = (begin / a.group + 1) * a.group;
    if (a.group > kPartK && end > group_end) end = group_end;
    for (int row = 0; row < full_rows; row += 2 * kSplitTokens) {
      GemmTiles<true>(a, row, 2 * kSplitTokens, begin, end, partial + row * kPanelCols);
    }
    if (rest > kSplitTokens) {
      GemmTiles<true>(a, full_rows, rest, begin, end, partial + full_rows * kPanelCols);
    } else if (rest > 0) {
      GemmTiles<false>(a, full_rows, rest, begin, end, partial + full_rows * kPanelCols);
    }
    begin = end;
  }
}

void SplitRows(const float* x, ptrdiff_t x_stride, int rows, int k, int begin_tile, int end_tile,
               uint16_t* split) {
  const ptrdiff_t tile_stride = static_cast<ptrdiff_t>(k / 32) * kTileElements;
  for (int tile = begin_tile; tile < end_tile; ++tile) {
    for (int i = 0; i < kSplitTokens && tile * kSplitTokens + i < rows; ++i) {
      const float* row = x + (tile * kSplitTokens + i) * x_stride;
      for (int c = 0; c < k; c += 16) {
        __m512 rest = _mm512_loadu_ps(row + c);
        uint16_t* out = split + tile * tile_stride + c / 32 * kTileElements + 3 * i * 32 + c % 32;
        for (int term = 0; term < 3; ++term) {
          __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + term * 32), bits);
          __m512i value = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
          rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(value));
        }
      }
    }
  }
}

constexpr Kernels AmxTable() {
  Kernels table = KernelsImpl<VecAvx512>::Table("amx");
  table.gemm_panel = &GemmPanel;
  table.split_rows = &SplitRows;
  return table;
}

}  // namespace

const Kernels kAmxKernels = AmxTable();

}  // namespace latentd
