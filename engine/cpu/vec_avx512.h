#ifndef LATENTD_ENGINE_CPU_VEC_AVX512_H_
#define LATENTD_ENGINE_CPU_VEC_AVX512_H_

#include <immintrin.h>

#include <cstdint>

namespace latentd {

// Sixteen floats. Meanings as in vec_portable.h.
struct VecAvx512 {
  static constexpr int kWidth = 16;
  static constexpr int kGemmRows = 12;  // 24 of 32 registers
  static constexpr int kScoreRows = 6;  // x 4 keys
  static constexpr int kValueRows = 6;
  static constexpr int kValueVecs = 4;

  __m512 v;

  static VecAvx512 Zero() { return {_mm512_setzero_ps()}; }
  static VecAvx512 Set(float x) { return {_mm512_set1_ps(x)}; }
  static VecAvx512 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VecAvx512 LoadBf16Low(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
  }
  static VecAvx512 LoadBf16High(const uint16_t* p) {
    __m512i bits = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536));
    return {_mm512_castsi512_ps(bits)};
  }
  void Store(float* p) const { _mm512_storeu_ps(p, v); }

  friend VecAvx512 operator+(VecAvx512 a, VecAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend VecAvx512 operator-(VecAvx512 a, VecAvx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend VecAvx512 operator*(VecAvx512 a, VecAvx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend VecAvx512 operator/(VecAvx512 a, VecAvx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  static VecAvx512 Fma(VecAvx512 a, VecAvx512 b, VecAvx512 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  static VecAvx512 Max(VecAvx512 a, VecAvx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
  static VecAvx512 Min(VecAvx512 a, VecAvx512 b) { return {_mm512_min_ps(a.v, b.v)}; }
  static VecAvx512 ZeroBelow(VecAvx512 x, VecAvx512 limit, VecAvx512 a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_GE_OQ), a.v)};
  }
  static VecAvx512 ScaleByPower(VecAvx512 p, VecAvx512 magic) {
    __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(magic.v), 23);
    bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x3f800000));
    return {_mm512_mul_ps(p.v, _mm512_castsi512_ps(bits))};
  }
  float Sum() const {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), UpperHalf(v));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float Largest() const { return _mm512_reduce_max_ps(v); }
  static void Sum4(VecAvx512 a, VecAvx512 b, VecAvx512 c, VecAvx512 d, float* out) {
    // Two at a time: [a even pairs | b ...] keeps the shuffles at seven for four sums.
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), UpperHalf(abcd));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

 private:
  static __m256 UpperHalf(__m512 x) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  }
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_VEC_AVX512_H_
