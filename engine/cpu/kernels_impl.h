#ifndef LATENTD_ENGINE_CPU_KERNELS_IMPL_H_
#define LATENTD_ENGINE_CPU_KERNELS_IMPL_H_

// The kernels, written once over a vector type V (vec_*.h). Included by one file for each
// instruction set, which is compiled with that set's flags. So nothing here may be shared between
// those files: every function is a member of a template over V, and no function of the standard
// library is called but memcpy. Otherwise the linker could keep the AVX-512 copy of it for all.

#include <cstring>

#include "engine/cpu/kernels.h"

namespace latentd {

template <class V>
struct KernelsImpl {
  static constexpr int kVecs = kPanelCols / V::kWidth;  // of one panel row
  static constexpr int kChunk = 128;                    // k between two additions to the total

  // ---- elementary functions ------------------------------------------------------------------

  // exp(x), within 2 ulp for x in [-87, 88]; 0 below, exp(88) above. Cephes' polynomial.
  static V Exp(V x) {
    const V low = V::Set(-87.0f);
    const V magic = V::Set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V c = V::Min(V::Max(x, low), V::Set(88.0f));
    V t = V::Fma(c, V::Set(1.44269504088896341f), magic);
    V n = t - magic;
    V r = V::Fma(n, V::Set(-0.693359375f), c);
    r = V::Fma(n, V::Set(2.12194440e-4f), r);
    V p = V::Set(1.9875691500e-4f);
    p = V::Fma(p, r, V::Set(1.3981999507e-3f));
    p = V::Fma(p, r, V::Set(8.3334519073e-3f));
    p = V::Fma(p, r, V::Set(4.1665795894e-2f));
    p = V::Fma(p, r, V::Set(1.6666665459e-1f));
    p = V::Fma(p, r, V::Set(5.0000001201e-1f));
    p = V::Fma(p, r * r, r) + V::Set(1.0f);
    return V::ZeroBelow(x, low, V::ScaleByPower(p, t));
  }

  static float Exp1(float x) {
    float lanes[V::kWidth];
    Exp(V::Set(x)).Store(lanes);
    return lanes[0];
  }

  // ---- GEMM ----------------------------------------------------------------------------------

  // total[R, 32] += scales * (x[R, k] w[k, 32]), k ascending.
  template <int R>
  static void TileF32(const float* w, int k, const float* x, ptrdiff_t x_stride,
                      const float* scales, float* total) {
    V acc[R][kVecs];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVecs; ++j) acc[r][j] = V::Zero();
    }
    for (int i = 0; i < k; ++i) {
      V b[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) b[j] = V::Load(w + i * kPanelCols + j * V::kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        V a = V::Set(x[r * x_stride + i]);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) acc[r][j] = V::Fma(a, b[j], acc[r][j]);
      }
    }
    AddToTotal<R>(acc, scales, total);
  }

  // The same from bf16 weights [k / 2, 32, 2].
  template <int R>
  static void TileBf16(const uint16_t* w, int k, const float* x, ptrdiff_t x_stride,
                       const float* scales, float* total) {
    V acc[R][kVecs];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVecs; ++j) acc[r][j] = V::Zero();
    }
    for (int i = 0; i < k; i += 2) {
      const uint16_t* row = w + i * kPanelCols;
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        V low = V::LoadBf16Low(row + 2 * j * V::kWidth);
        V high = V::LoadBf16High(row + 2 * j * V::kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          acc[r][j] = V::Fma(V::Set(x[r * x_stride + i]), low, acc[r][j]);
          acc[r][j] = V::Fma(V::Set(x[r * x_stride + i + 1]), high, acc[r][j]);
        }
      }
    }
    AddToTotal<R>(acc, scales, total);
  }

  template <int R>
  static void AddToTotal(const V (&acc)[R][kVecs], const float* scales, float* total) {
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kVecs; ++j) {
        float* t = total + r * kPanelCols + j * V::kWidth;
        V sum = scales == nullptr ? V::Load(t) + acc[r][j]
                                  : V::Fma(V::Load(scales + j * V::kWidth), acc[r][j], V::Load(t));
        sum.Store(t);
      }
    }
  }

  // Calls the tile of exactly `rows` rows, 1 <= rows <= R.
  template <int R>
  static void RowsF32(int rows, const float* w, int k, const float* x, ptrdiff_t x_stride,
                      const float* scales, float* total) {
    if constexpr (R > 1) {
      if (rows < R) return RowsF32<R - 1>(rows, w, k, x, x_stride, scales, total);
    }
    TileF32<R>(w, k, x, x_stride, scales, total);
  }
  template <int R>
  static void RowsBf16(int rows, const uint16_t* w, int k, const float* x, ptrdiff_t x_stride,
                       const float* scales, float* total) {
    if constexpr (R > 1) {
      if (rows < R) return RowsBf16<R - 1>(rows, w, k, x, x_stride, scales, total);
    }
    TileBf16<R>(w, k, x, x_stride, scales, total);
  }

  static void GemmPanel(const GemmPanelArgs& a) {
    alignas(64) float total[kMaxGemmRows * kPanelCols];
    alignas(64) float expanded[kChunk * kPanelCols];
    std::memset(total, 0, sizeof(float) * a.rows * kPanelCols);
    for (int begin = 0; begin < a.k;) {
      int end = begin + kChunk < a.k ? begin + kChunk : a.k;
      const float* scales = nullptr;
      if (a.scales != nullptr) {
        int group_end = (begin / a.group + 1) * a.group;
        end = end < group_end ? end : group_end;
        scales = a.scales + (begin / a.group) * kPanelCols;
      }
      const int k = end - begin;
      const float* w = a.panel_f32 + begin * kPanelCols;
      const uint16_t* w16 = a.panel_bf16 + begin * kPanelCols;
      // More rows than one tile: expand the weights once and use them for every tile.
      const bool expand = a.panel_f32 == nullptr && a.rows > V::kGemmRows;
      if (expand) {
        Expand(w16, k, expanded);
        w = expanded;
      }
      for (int r = 0; r < a.rows; r += V::kGemmRows) {
        const int rows = a.rows - r < V::kGemmRows ? a.rows - r : V::kGemmRows;
        const float* x = a.x + r * a.x_stride + begin;
        float* t = total + r * kPanelCols;
        if (a.panel_f32 != nullptr || expand) {
          RowsF32<V::kGemmRows>(rows, w, k, x, a.x_stride, scales, t);
        } else {
          RowsBf16<V::kGemmRows>(rows, w16, k, x, a.x_stride, scales, t);
        }
      }
      begin = end;
    }
    for (int r = 0; r < a.rows; ++r) {
      std::memcpy(a.out + r * a.out_stride, total + r * kPanelCols, sizeof(float) * a.cols);
    }
  }

  static void Expand(const uint16_t* w, int k, float* out) {
    for (int i = 0; i < k; i += 2) {
      for (int j = 0; j < kVecs; ++j) {
        const uint16_t* lanes = w + i * kPanelCols + 2 * j * V::kWidth;
        V::LoadBf16Low(lanes).Store(out + i * kPanelCols + j * V::kWidth);
        V::LoadBf16High(lanes).Store(out + (i + 1) * kPanelCols + j * V::kWidth);
      }
    }
  }

  // ---- attention -----------------------------------------------------------------------------

  // DeepSeek-V3's dim, 512 + 64, is known to the compiler (kDim), which spares the inner loops most
  // of their address arithmetic; other dims come at run time (kDim 0).

  // scores[R, 4] of R rows and four keys: dot products over the dim, lane by lane, then across
  // lanes.
  template <int R, int kDim>
  static void ScoreTile(const float* q, const float* keys, int any_dim, float* scores) {
    const int dim = kDim > 0 ? kDim : any_dim;
    V acc[R][4];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < 4; ++t) acc[r][t] = V::Zero();
    }
#pragma GCC unroll 2
    for (int i = 0; i < dim; i += V::kWidth) {
      V key[4];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) key[t] = V::Load(keys + t * dim + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        V a = V::Load(q + r * dim + i);
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) acc[r][t] = V::Fma(a, key[t], acc[r][t]);
      }
    }
    for (int r = 0; r < R; ++r) {
      V::Sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], scores + r * kAttentionKeys);
    }
  }

  template <int R, int kDim>
  static void ScoreRows(int rows, const float* q, const float* keys, int num_keys, int any_dim,
                        float* scores) {
    if constexpr (R > 1) {
      if (rows < R) return ScoreRows<R - 1, kDim>(rows, q, keys, num_keys, any_dim, scores);
    }
    const int dim = kDim > 0 ? kDim : any_dim;
    for (int t = 0; t < num_keys; t += 4) {
      ScoreTile<R, kDim>(q, keys + t * dim, dim, scores + t);
    }
  }

  // One row's softmax step; `scores` become exp(score - max), and 0 for keys it may not see.
  // Returns the factor for what the row has summed so far.
  static float SoftmaxRow(int valid, float* scores, float* max, float* sum) {
    if (valid == 0) {
      std::memset(scores, 0, sizeof(float) * kAttentionKeys);
      return 1.0f;
    }
    const float kMinusInfinity = -__builtin_inff();
    for (int t = valid; t < kAttentionKeys; ++t) scores[t] = kMinusInfinity;
    V largest = V::Load(scores);
    for (int t = V::kWidth; t < kAttentionKeys; t += V::kWidth) {
      largest = V::Max(largest, V::Load(scores + t));
    }
    const float block_max = largest.Largest();
    const float new_max = block_max > *max ? block_max : *max;
    const float factor = Exp1(*max - new_max);
    V shift = V::Set(new_max);
    V total = V::Zero();
    for (int t = 0; t < kAttentionKeys; t += V::kWidth) {
      V p = Exp(V::Load(scores + t) - shift);
      p.Store(scores + t);
      total = total + p;
    }
    *max = new_max;
    *sum = *sum * factor + total.Sum();
    return factor;
  }

  // out[R, C vectors] = out * factor + p[R, num_keys] values[num_keys, C vectors]. Prefetches what
  // lies `ahead` of the values.
  template <int R, int C, int kDim>
  static void ValueTile(const float* p, const float* factors, const float* values, int num_keys,
                        int any_dim, float* out, int value_dim, int ahead) {
    const int dim = kDim > 0 ? kDim : any_dim;
    V acc[R][C];
    for (int r = 0; r < R; ++r) {
      V factor = V::Set(factors[r]);
      for (int c = 0; c < C; ++c) {
        acc[r][c] = V::Load(out + r * value_dim + c * V::kWidth) * factor;
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < num_keys; ++t) {
      const float* row = values + t * dim;
      V value[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) value[c] = V::Load(row + c * V::kWidth);
      if constexpr (R > 2) __builtin_prefetch(row + ahead);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        V a = V::Set(p[r * kAttentionKeys + t]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r][c] = V::Fma(a, value[c], acc[r][c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) acc[r][c].Store(out + r * value_dim + c * V::kWidth);
    }
  }

  template <int R, int C, int kDim>
  static void ValueRows(int rows, const float* p, const float* factors, const float* values,
                        int num_keys, int dim, float* out, int value_dim, int ahead) {
    if constexpr (R > 1) {
      if (rows < R) {
        return ValueRows<R - 1, C, kDim>(rows, p, factors, values, num_keys, dim, out, value_dim,
                                         ahead);
      }
    }
    ValueTile<R, C, kDim>(p, factors, values, num_keys, dim, out, value_dim, ahead);
  }

  // Every tile of rows over C vectors of columns; the columns' values stay in the first cache, and
  // the next columns' are fetched into it, a line of each key per tile.
  template <int C, int kDim>
  static void ValueColumns(const AttendBlockArgs& a, const float* factors, int num_keys,
                           int column) {
    for (int r = 0; r < a.rows; r += V::kValueRows) {
      const int rows = a.rows - r < V::kValueRows ? a.rows - r : V::kValueRows;
      ValueRows<V::kValueRows, C, kDim>(rows, a.scores + r * kAttentionKeys, factors + r,
                                        a.keys + column, num_keys, a.dim,
                                        a.out + static_cast<ptrdiff_t>(r) * a.value_dim + column,
                                        a.value_dim, (C + r / V::kValueRows % C) * V::kWidth);
    }
  }

  template <int kDim>
  static void AttendBlockOfDim(const AttendBlockArgs& a) {
    int num_keys = 0;
    for (int r = 0; r < a.rows; ++r) num_keys = a.valid[r] > num_keys ? a.valid[r] : num_keys;
    for (int r = 0; r < a.rows; r += V::kScoreRows) {
      const int rows = a.rows - r < V::kScoreRows ? a.rows - r : V::kScoreRows;
      ScoreRows<V::kScoreRows, kDim>(rows, a.q + static_cast<ptrdiff_t>(r) * a.dim, a.keys,
                                     num_keys, a.dim, a.scores + r * kAttentionKeys);
    }
    float factors[kAttentionRows];
    for (int r = 0; r < a.rows; ++r) {
      factors[r] = SoftmaxRow(a.valid[r], a.scores + r * kAttentionKeys, a.max + r, a.sum + r);
    }
    constexpr int kWide = V::kValueVecs * V::kWidth;
    int column = 0;
    for (; column + kWide <= a.value_dim; column += kWide) {
      ValueColumns<V::kValueVecs, kDim>(a, factors, num_keys, column);
    }
    for (; column < a.value_dim; column += V::kWidth) {
      ValueColumns<1, kDim>(a, factors, num_keys, column);
    }
  }

  static void AttendBlock(const AttendBlockArgs& a) {
    if (a.dim == 576) {
      AttendBlockOfDim<576>(a);
    } else {
      AttendBlockOfDim<0>(a);
    }
  }

  static void Merge(float part_max, float part_sum, const float* part, int value_dim, float* max,
                    float* sum, float* out) {
    const float new_max = part_max > *max ? part_max : *max;
    const float old_factor = Exp1(*max - new_max);
    const float part_factor = Exp1(part_max - new_max);
    *max = new_max;
    *sum = *sum * old_factor + part_sum * part_factor;
    for (int i = 0; i < value_dim; i += V::kWidth) {
      V total = V::Load(out + i) * V::Set(old_factor);
      V::Fma(V::Load(part + i), V::Set(part_factor), total).Store(out + i);
    }
  }

  // ---- rows ----------------------------------------------------------------------------------

  static void RmsNorm(const float* x, const float* weight, int n, float eps, float* out) {
    V acc = V::Zero();
    int i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) {
      V v = V::Load(x + i);
      acc = V::Fma(v, v, acc);
    }
    float sum = acc.Sum();
    for (int j = i; j < n; ++j) sum += x[j] * x[j];
    const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
    for (i = 0; i + V::kWidth <= n; i += V::kWidth) {
      (V::Load(x + i) * V::Set(factor) * V::Load(weight + i)).Store(out + i);
    }
    for (; i < n; ++i) out[i] = x[i] * factor * weight[i];
  }

  static void Add(float* x, const float* y, int n) {
    int i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) (V::Load(x + i) + V::Load(y + i)).Store(x + i);
    for (; i < n; ++i) x[i] += y[i];
  }

  static void AddScaled(float* x, float scale, const float* y, int n) {
    int i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) {
      (V::Load(x + i) + V::Set(scale) * V::Load(y + i)).Store(x + i);
    }
    for (; i < n; ++i) x[i] += scale * y[i];
  }

  static void Scale(const float* x, float factor, int n, float* out) {
    int i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) (V::Load(x + i) * V::Set(factor)).Store(out + i);
    for (; i < n; ++i) out[i] = x[i] * factor;
  }

  static void SiluMultiply(const float* gate, const float* up, int n, float* out) {
    int i = 0;
    for (; i + V::kWidth <= n; i += V::kWidth) {
      Silu(V::Load(gate + i), V::Load(up + i)).Store(out + i);
    }
    if (i < n) {
      float g[V::kWidth] = {}, u[V::kWidth] = {};
      std::memcpy(g, gate + i, sizeof(float) * (n - i));
      std::memcpy(u, up + i, sizeof(float) * (n - i));
      Silu(V::Load(g), V::Load(u)).Store(g);
      std::memcpy(out + i, g, sizeof(float) * (n - i));
    }
  }
  static V Silu(V gate, V up) { return gate / (V::Set(1.0f) + Exp(V::Zero() - gate)) * up; }

  static double FmaPeak(int64_t n) {
    constexpr int kAccumulators = V::kWidth == 16 ? 24 : 12;
    V acc[kAccumulators];
    for (int j = 0; j < kAccumulators; ++j) acc[j] = V::Set(1.0f + static_cast<float>(j));
    const V a = V::Set(0.999f), b = V::Set(1e-3f);
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 24
      for (int j = 0; j < kAccumulators; ++j) acc[j] = V::Fma(acc[j], a, b);
    }
    float sink = 0.0f;
    for (int j = 0; j < kAccumulators; ++j) sink += acc[j].Sum();
    volatile float keep = sink;
    (void)keep;
    return 2.0 * static_cast<double>(n) * kAccumulators * V::kWidth;
  }

  static constexpr Kernels Table(const char* name) {
    return {name,       &GemmPanel, nullptr,       &AttendBlock, &RmsNorm, &Add,
            &AddScaled, &Scale,     &SiluMultiply, &Merge,       &FmaPeak};
  }
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_KERNELS_IMPL_H_
