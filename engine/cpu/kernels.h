#ifndef LATENTD_ENGINE_CPU_KERNELS_H_
#define LATENTD_ENGINE_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace latentd {

// The inner loops, compiled once for each instruction set. All of them keep one rule: a row of the
// result depends on its own row of the input alone, and is accumulated in an order that the
// weights' shape fixes. How many rows are computed together, and by which thread, changes no bit.
// Between two instruction sets the last bits may differ.

inline constexpr int kPanelCols = 32;   // columns of one panel of a packed matrix
inline constexpr int kRowPadding = 32;  // packed matrices have their K padded to a multiple of this
inline constexpr int kMaxGemmRows = 120;   // most rows of one GemmPanel call
inline constexpr int kSplitTokens = 5;     // rows of one split tile; see SplitRows below
inline constexpr int kAttentionRows = 48;  // most rows (query, head) of one AttendBlock call
inline constexpr int kAttentionKeys = 64;  // keys of one cache block

// out[rows, cols] = x[rows, k] W^T for one panel of W.
struct GemmPanelArgs {
  // The panel. bf16: [k / 2, 32, 2], so that one 32-bit lane holds two neighbours along k; f32: [k,
  // 32].
  const uint16_t* panel_bf16 = nullptr;
  const float* panel_f32 = nullptr;
  const float* scales = nullptr;  // [ceil(k / group), 32] f32: per column and `group` of k; or null
  int group = 0;                  // a multiple of 32; without scales: k
  int k = 0;                      // padded
  const float* x = nullptr;       // [rows, x_stride] f32; columns beyond the true k must be finite
  ptrdiff_t x_stride = 0;
  const uint16_t* split = nullptr;  // x as SplitRows wrote it; only when Kernels::split_rows is set
  int rows = 0;                     // 1..kMaxGemmRows
  float* out = nullptr;             // [rows, out_stride] f32
  ptrdiff_t out_stride = 0;
  int cols = 0;  // 1..kPanelCols
};

// One block of keys for up to kAttentionRows rows of one sequence, as a step of the online softmax.
struct AttendBlockArgs {
  const float* q = nullptr;     // [rows, dim] f32, scaled by the softmax scale
  const float* keys = nullptr;  // [64, dim] f32; the values are its first `value_dim` columns
  int rows = 0;
  int dim = 0;                 // a multiple of 16
  int value_dim = 0;           // a multiple of 16
  const int* valid = nullptr;  // [rows] how many keys the row may see, 0..64
  float* max = nullptr;        // [rows] running maximum, -inf at first
  float* sum = nullptr;        // [rows] running sum of exp(score - max)
  float* out = nullptr;        // [rows, value_dim] running sum of exp(score - max) * value
  float* scores = nullptr;     // [rows, 64] scratch
};

struct Kernels {
  const char* name;  // "amx", "avx512", "avx2", "portable"

  void (*gemm_panel)(const GemmPanelArgs&);

  // Writes rows [0, rows) of x as three bf16 terms whose sum is x exactly, in tiles of 5 rows:
  // [ceil(rows / 5), k / 32, 15, 32] bf16; row 3 i + t of a tile is term t of its row i. Null when
  // gemm_panel reads x itself. `begin`, `end`: the tiles to write.
  void (*split_rows)(const float* x, ptrdiff_t x_stride, int rows, int k, int begin_tile,
                     int end_tile, uint16_t* split);

  void (*attend_block)(const AttendBlockArgs&);

  // out[n] = x[n] * rsqrt(mean(x^2) + eps) * weight[n]; may be in place.
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);

  // x[n] += y[n].
  void (*add)(float* x, const float* y, int n);

  // x[n] += scale * y[n].
  void (*add_scaled)(float* x, float scale, const float* y, int n);

  // out[n] = x[n] * factor.
  void (*scale)(const float* x, float factor, int n, float* out);

  // out[n] = silu(gate[n]) * up[n]; may be in place of gate.
  void (*silu_multiply)(const float* gate, const float* up, int n, float* out);

  // Adds one part of a row's online softmax to its total: both as AttendBlockArgs says.
  void (*merge)(float part_max, float part_sum, const float* part, int value_dim, float* max,
                float* sum, float* out);

  // Runs `n` rounds of 32 * width register-only FMA and returns how many FLOPs those were.
  double (*fma_peak)(int64_t n);
};

// The kernels that this machine can run, the best first; never empty.
std::vector<const Kernels*> SupportedKernels();

// Defined in the files of the same name.
extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
#endif

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_KERNELS_H_
