#ifndef LATENTD_ENGINE_CPU_QUANTIZE_ROW_H_
#define LATENTD_ENGINE_CPU_QUANTIZE_ROW_H_

namespace latentd {

// How the inputs of FP8 projections are rounded to FP8 e4m3 where they meet a tensor core.
struct ActivationQuantization {
  int group = 128;  // neighbouring columns of a row that share a scale
  bool power_of_two_scales = false;
};

// The scale of a group whose largest magnitude is `amax`: amax / 448, at least 1e-10 / 448, rounded
// up to a power of two if wanted.
float ActivationScale(float amax, bool power_of_two);

// out[n] = the value of x[n] once it is stored: e4m3(x / scale) * scale, ties to even; group by
// group from the first column, the last one may be short. May be in place; a NaN stays one.
void QuantizeRow(const float* x, int n, const ActivationQuantization& how, float* out);

// A row of the latent cache as CacheFormat::kFp8 holds it: all latents in one group, whose scale is
// a power of two, and rotated dims in bf16. In place.
void QuantizeCacheRow(float* latents, int num_latents, float* rotated, int num_rotated);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_QUANTIZE_ROW_H_
