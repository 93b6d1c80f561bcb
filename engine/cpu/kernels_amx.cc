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

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3: sums of (token tile 0 or 1) x (columns 0..15 or 16..31); 4, 5: tokens; 6, 7: weights.
void ConfigureTiles(int rows0, int rows1) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.column_bytes[i] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(rows0);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(rows1);
  config.rows[6] = config.rows[7] = 16;
  _tile_loadconfig(&config);
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

// The rows of up to two token tiles: out[rows, cols].
template <bool kTwo>
void GemmTiles(const GemmPanelArgs& a, int first_row, int rows) {
  alignas(64) float sums[2 * kTileRows * kPanelCols];
  __m512 total[2 * kSplitTokens][2];
  const ptrdiff_t tile_stride = static_cast<ptrdiff_t>(a.k / 32) * kTileElements;
  const uint16_t* tokens0 = a.split + first_row / kSplitTokens * tile_stride;
  for (int begin = 0; begin < a.k; begin += a.group) {
    const int end = begin + a.group < a.k ? begin + a.group : a.k;
    MultiplyTiles<kTwo>(tokens0, tokens0 + tile_stride, a.panel_bf16, begin, end, sums);
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < 2; ++j) {
        const float* s = sums + 3 * r * kPanelCols + 16 * j;
        __m512 sum =
            _mm512_add_ps(_mm512_load_ps(s + kPanelCols), _mm512_load_ps(s + 2 * kPanelCols));
        sum = _mm512_add_ps(_mm512_load_ps(s), sum);
        if (a.scales != nullptr) {
          __m512 scale = _mm512_loadu_ps(a.scales + begin / a.group * kPanelCols + 16 * j);
          sum = begin == 0 ? _mm512_mul_ps(scale, sum) : _mm512_fmadd_ps(scale, sum, total[r][j]);
        }
        total[r][j] = sum;
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    float* out = a.out + (first_row + r) * a.out_stride;
    if (a.cols == kPanelCols) {
      _mm512_storeu_ps(out, total[r][0]);
      _mm512_storeu_ps(out + 16, total[r][1]);
    } else {
      alignas(64) float row[kPanelCols];
      _mm512_store_ps(row, total[r][0]);
      _mm512_store_ps(row + 16, total[r][1]);
      std::memcpy(out, row, sizeof(float) * a.cols);
    }
  }
}

void GemmPanel(const GemmPanelArgs& a) {
  if (a.panel_bf16 == nullptr) return KernelsImpl<VecAvx512>::GemmPanel(a);
  int row = 0;
  if (a.rows >= 2 * kSplitTokens) {
    ConfigureTiles(kTileRows, kTileRows);
    for (; a.rows - row >= 2 * kSplitTokens; row += 2 * kSplitTokens) {
      GemmTiles<true>(a, row, 2 * kSplitTokens);
    }
  }
  if (const int rows = a.rows - row; rows > kSplitTokens) {
    ConfigureTiles(kTileRows, 3 * (rows - kSplitTokens));
    GemmTiles<true>(a, row, rows);
  } else if (rows > 0) {
    ConfigureTiles(3 * rows, 3 * rows);
    GemmTiles<false>(a, row, rows);
  }
  _tile_release();
}

// bf16 of x, round to nearest even; x is finite or the result is of no use anyway.
inline __m512i RoundToBf16(__m512i bits) {
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_and_si512(rounded, _mm512_set1_epi32(-65536));
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
          __m512i bits = RoundToBf16(_mm512_castps_si512(rest));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + term * 32),
                              _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
          rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(bits));
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
