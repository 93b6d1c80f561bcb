#ifndef LATENTD_ENGINE_CPU_VEC_PORTABLE_H_
#define LATENTD_ENGINE_CPU_VEC_PORTABLE_H_

#include <cstdint>

namespace latentd {

// Four floats, in the vector language that GCC and clang share: SSE2 or NEON, whatever the target
// has.
struct VecPortable {
  using Floats = float __attribute__((vector_size(16)));
  using Ints = int32_t __attribute__((vector_size(16)));
  using LooseFloats = float __attribute__((vector_size(16), aligned(4)));

  static constexpr int kWidth = 4;
  static constexpr int kGemmRows = 1;   // rows of a GEMM tile: 8 accumulators
  static constexpr int kScoreRows = 2;  // x 4 keys
  static constexpr int kValueRows = 2;  // rows x kValueVecs of an attention value tile
  static constexpr int kValueVecs = 4;

  Floats v;

  static VecPortable Zero() { return {Floats{0, 0, 0, 0}}; }
  static VecPortable Set(float x) { return {Floats{x, x, x, x}}; }
  static VecPortable Load(const float* p) { return {*reinterpret_cast<const LooseFloats*>(p)}; }
  // The first (low half) and second (high half) bf16 of each 32-bit lane.
  static VecPortable LoadBf16Low(const uint16_t* p) {
    Ints bits = *reinterpret_cast<const Ints*>(p) << 16;
    return {reinterpret_cast<Floats>(bits)};
  }
  static VecPortable LoadBf16High(const uint16_t* p) {
    Ints bits = *reinterpret_cast<const Ints*>(p) & static_cast<int32_t>(0xffff0000u);
    return {reinterpret_cast<Floats>(bits)};
  }
  void Store(float* p) const { *reinterpret_cast<LooseFloats*>(p) = v; }

  friend VecPortable operator+(VecPortable a, VecPortable b) { return {a.v + b.v}; }
  friend VecPortable operator-(VecPortable a, VecPortable b) { return {a.v - b.v}; }
  friend VecPortable operator*(VecPortable a, VecPortable b) { return {a.v * b.v}; }
  friend VecPortable operator/(VecPortable a, VecPortable b) { return {a.v / b.v}; }
  static VecPortable Fma(VecPortable a, VecPortable b, VecPortable c) { return {a.v * b.v + c.v}; }
  static VecPortable Max(VecPortable a, VecPortable b) {
    Ints greater = a.v > b.v;
    return Select(greater, a, b);
  }
  static VecPortable Min(VecPortable a, VecPortable b) {
    Ints less = a.v < b.v;
    return Select(less, a, b);
  }
  // a where x >= limit, else 0.
  static VecPortable ZeroBelow(VecPortable x, VecPortable limit, VecPortable a) {
    Ints keep = x.v >= limit.v;
    return {reinterpret_cast<Floats>(reinterpret_cast<Ints>(a.v) & keep)};
  }
  // p * 2^n, n being the integer in the low bits of `magic` (= 1.5 * 2^23 + n).
  static VecPortable ScaleByPower(VecPortable p, VecPortable magic) {
    Ints bits = (reinterpret_cast<Ints>(magic.v) << 23) + 0x3f800000;
    return {p.v * reinterpret_cast<Floats>(bits)};
  }
  float Sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float Largest() const {
    float a = v[0] > v[1] ? v[0] : v[1];
    float b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  // out[i] = Sum() of the i-th.
  static void Sum4(VecPortable a, VecPortable b, VecPortable c, VecPortable d, float* out) {
    out[0] = a.Sum();
    out[1] = b.Sum();
    out[2] = c.Sum();
    out[3] = d.Sum();
  }

 private:
  static VecPortable Select(Ints mask, VecPortable a, VecPortable b) {
    Ints bits = (reinterpret_cast<Ints>(a.v) & mask) | (reinterpret_cast<Ints>(b.v) & ~mask);
    return {reinterpret_cast<Floats>(bits)};
  }
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_VEC_PORTABLE_H_
