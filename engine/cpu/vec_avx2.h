#ifndef LATENTD_ENGINE_CPU_VEC_AVX2_H_
#define LATENTD_ENGINE_CPU_VEC_AVX2_H_

#include <immintrin.h>

#include <cstdint>

namespace latentd {

// Eight floats with FMA. Meanings as in vec_portable.h.
struct VecAvx2 {
  static constexpr int kWidth = 8;
  static constexpr int kGemmRows = 3;   // 12 of 16 registers
  static constexpr int kScoreRows = 2;  // x 4 keys
  static constexpr int kValueRows = 3;
  static constexpr int kValueVecs = 4;

  __m256 v;

  static VecAvx2 Zero() { return {_mm256_setzero_ps()}; }
  static VecAvx2 Set(float x) { return {_mm256_set1_ps(x)}; }
  static VecAvx2 Load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VecAvx2 LoadBf16Low(const uint16_t* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  }
  static VecAvx2 LoadBf16High(const uint16_t* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)))};
  }
  void Store(float* p) const { _mm256_storeu_ps(p, v); }

  friend VecAvx2 operator+(VecAvx2 a, VecAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend VecAvx2 operator-(VecAvx2 a, VecAvx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend VecAvx2 operator*(VecAvx2 a, VecAvx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend VecAvx2 operator/(VecAvx2 a, VecAvx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  static VecAvx2 Fma(VecAvx2 a, VecAvx2 b, VecAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static VecAvx2 Max(VecAvx2 a, VecAvx2 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static VecAvx2 Min(VecAvx2 a, VecAvx2 b) { return {_mm256_min_ps(a.v, b.v)}; }
  static VecAvx2 ZeroBelow(VecAvx2 x, VecAvx2 limit, VecAvx2 a) {
    return {_mm256_and_ps(a.v, _mm256_cmp_ps(x.v, limit.v, _CMP_GE_OQ))};
  }
  static VecAvx2 ScaleByPower(VecAvx2 p, VecAvx2 magic) {
    __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(magic.v), 23);
    bits = _mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000));
    return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(bits))};
  }
  float Sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float Largest() const {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static void Sum4(VecAvx2 a, VecAvx2 b, VecAvx2 c, VecAvx2 d, float* out) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_VEC_AVX2_H_
