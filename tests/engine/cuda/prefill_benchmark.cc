// The dense products by cuBLASLt and the attention of long chunks, with DeepSeek-V3's dims. Prints
// a line for each; shares of the bound are of 989 TFLOP/s (bf16), 1979 TFLOP/s (FP8), 3.35 TB/s.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "engine/cuda/cublas.h"
#include "engine/cuda/kernels/mla_prefill.h"
#include "engine/cuda/mla_prefill.h"
#include "engine/cuda/mla_prefill_plan.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

constexpr int kHeads = 128, kKey = 192, kValue = 128, kLatent = 512, kCache = 576, kBlock = 64;
constexpr double kBytesPerSecond = 3.35e12, kBf16Flops = 989e12, kFp8Flops = 1979e12;

void Print(const std::string& shape, double us, double flops, double bytes, double peak_flops) {
  const double bound_us = std::max(flops / peak_flops, bytes / kBytesPerSecond) * 1e6;
  std::printf("%-58s | %9.1f us | %7.1f TFLOP/s | %7.1f GB/s | %5.1f %% of bound\n", shape.c_str(),
              us, flops / us / 1e6, bytes / us / 1e3, 100 * bound_us / us);
  std::fflush(stdout);
}

// Random values, the same 64 Ki of them over and over.
template <typename T, typename Make>
void Fill(DeviceArray<T>* array, Make make) {
  std::vector<T> values(65521);
  uint32_t state = 1;
  for (T& value : values) {
    state = state * 1664525 + 1013904223;
    value = make(static_cast<float>(state >> 8) / (1 << 23) - 1);
  }
  cudaMemcpy(array->get(), values.data(), std::min(array->bytes(), values.size() * sizeof(T)),
             cudaMemcpyHostToDevice);
  for (size_t done = values.size(); done < array->size();) {
    const size_t count = std::min(done, array->size() - done);
    cudaMemcpy(array->get() + done, array->get(), count * sizeof(T), cudaMemcpyDeviceToDevice);
    done += count;
  }
}
__nv_bfloat16 Bf16(float x) { return __float2bfloat16(x); }
__nv_fp8_e4m3 Fp8(float x) { return __nv_fp8_e4m3(x); }

bool Report(const absl::Status& status) {
  if (!status.ok()) std::printf("%s\n", std::string(status.message()).c_str());
  return status.ok();
}
cudaError_t Error(const absl::Status& status) {
  return Report(status) ? cudaSuccess : cudaErrorUnknown;
}

void BenchmarkLinear(Cublas* cublas) {
  std::printf("\nFP8 linears, weights cold\n");
  struct Shape {
    const char* name;
    int n, k;
  };
  for (const Shape& shape :
       {Shape{"qkv_a", 2112, 7168}, Shape{"q_b", 24576, 1536}, Shape{"o", 7168, 16384},
        Shape{"shared down", 7168, 2048}, Shape{"shared gate_up", 4096, 7168}}) {
    const size_t weight_bytes = size_t(shape.n) * shape.k;
    const int copies = static_cast<int>(200'000'000 / weight_bytes) + 1;
    DeviceArray<__nv_fp8_e4m3> weights(copies * weight_bytes), x(size_t{8192} * shape.k);
    DeviceArray<float> weight_scales(size_t((shape.n + 127) / 128) * (shape.k / 128 + 4));
    DeviceArray<float> x_scales(size_t{8192} * shape.k / 128);
    DeviceArray<__nv_bfloat16> out(size_t{8192} * shape.n);
    Fill(&weights, Fp8);
    Fill(&x, Fp8);
    Fill(&weight_scales, [](float v) { return v + 2; });
    Fill(&x_scales, [](float v) { return v + 2; });
    for (const int rows : {1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192}) {
      const int padded = Cublas::PaddedRows(rows);
      const auto enqueue = [&](int i, cudaStream_t stream) {
        WeightMatrix weight;
        weight.fp8 = weights.get() + size_t(i % copies) * weight_bytes;
        weight.scales = weight_scales.get();
        weight.scale_stride = (shape.k / 128 + 3) / 4 * 4;
        weight.n = shape.n;
        weight.k = shape.k;
        LinearInput input;
        input.fp8 = {x.get(), x_scales.get(), padded};
        return Error(cublas->Linear(input, rows, weight, out.get(), shape.n, stream));
      };
      if (enqueue(0, nullptr) != cudaSuccess) continue;
      const double us = GraphMicroseconds(rows > 1000 ? 5 : 20, 5, enqueue);
      Print(std::string(shape.name) + ", n " + std::to_string(shape.n) + ", k " +
                std::to_string(shape.k) + ", rows " + std::to_string(rows),
            us, 2.0 * rows * shape.n * shape.k,
            weight_bytes + double(rows) * (shape.k + 2.0 * shape.n), kFp8Flops);
    }
  }
}

// Which row counts give a row the bits that it has alone.
void ReportInvariance(Cublas* cublas) {
  std::printf("\nrow 0 has the bits that it has with 1 row, for rows: (FP8 | bf16 to f32)\n");
  for (const auto& [n, k] : {std::pair{2112, 7168}, {24576, 1536}, {7168, 16384}, {256, 7168}}) {
    DeviceArray<__nv_fp8_e4m3> weight_fp8(size_t(n) * k), x_fp8(size_t{512} * k);
    DeviceArray<__nv_bfloat16> weight_bf16(size_t(n) * k), x_bf16(size_t{512} * k);
    DeviceArray<float> weight_scales(size_t((n + 127) / 128) * (k / 128 + 4));
    DeviceArray<float> x_scales(size_t{512} * k / 128), out_f32(size_t{512} * n);
    DeviceArray<__nv_bfloat16> out(size_t{512} * n);
    Fill(&weight_fp8, Fp8);
    Fill(&x_fp8, Fp8);
    Fill(&weight_bf16, Bf16);
    Fill(&x_bf16, Bf16);
    Fill(&weight_scales, [](float v) { return v + 2; });
    std::vector<float> ones(x_scales.size(), 0.75f);  // the same at any stride
    x_scales.Set(ones);
    std::vector<__nv_bfloat16> first(n), row(n);
    std::vector<float> first_f32(n), row_f32(n);
    std::string same, same_f32;
    for (const int rows : {1, 2, 4, 5, 8, 12, 16, 20, 32, 48, 64, 128, 256, 500}) {
      WeightMatrix weight;
      weight.fp8 = weight_fp8.get();
      weight.scales = weight_scales.get();
      weight.scale_stride = (k / 128 + 3) / 4 * 4;
      weight.n = n;
      weight.k = k;
      LinearInput input;
      input.fp8 = {x_fp8.get(), x_scales.get(), Cublas::PaddedRows(rows)};
      if (!Report(cublas->Linear(input, rows, weight, out.get(), n, nullptr)) ||
          !Report(cublas->LinearF32(x_bf16.get(), rows, weight_bf16.get(), n, k, out_f32.get(), n,
                                    nullptr))) {
        continue;
      }
      cudaDeviceSynchronize();
      cudaMemcpy(row.data(), out.get(), n * sizeof(row[0]), cudaMemcpyDeviceToHost);
      cudaMemcpy(row_f32.data(), out_f32.get(), n * sizeof(row_f32[0]), cudaMemcpyDeviceToHost);
      if (rows == 1) {
        first = row;
        first_f32 = row_f32;
      }
      if (std::memcmp(row.data(), first.data(), n * sizeof(row[0])) == 0)
        same += " " + std::to_string(rows);
      if (row_f32 == first_f32) same_f32 += " " + std::to_string(rows);
    }
    std::printf("n %d, k %d:%s |%s\n", n, k, same.c_str(), same_f32.c_str());
  }
}

// FLOPs of the attention to expanded keys, with what is below the diagonal alone.
double AttentionFlops(const std::vector<MlaPrefillSequence>& sequences) {
  double pairs = 0;
  for (const MlaPrefillSequence& sequence : sequences) {
    const double q = sequence.num_queries;
    pairs += q * (sequence.num_keys - q) + q * (q + 1) / 2;
  }
  return pairs * kHeads * 2 * (kKey + kValue);
}

struct PrefillInputs {
  explicit PrefillInputs(int32_t num_queries, int32_t num_keys)
      : q(size_t(num_queries) * kHeads * kKey),
        cache(size_t(num_keys + kBlock) * kCache),
        w_uk(size_t{kHeads} * kValue * kLatent),
        w_uv(size_t{kHeads} * kValue * kLatent),
        out(size_t(num_queries) * kHeads * kValue),
        blocks(num_keys / kBlock + 1) {
    for (DeviceArray<__nv_bfloat16>* array : {&q, &cache}) Fill(array, Bf16);
    for (DeviceArray<__nv_bfloat16>* array : {&w_uk, &w_uv})
      Fill(array, [](float v) { return Bf16(v / 22); });
    std::vector<int32_t> ids(blocks.size());
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    blocks.Set(ids);
  }
  MlaPrefill::Layer layer() {
    return {q.get(), 0, Cache(), w_uk.get(), w_uv.get(), 0.1352f, out.get()};
  }
  MlaCache Cache() { return {reinterpret_cast<std::byte*>(cache.get()), CacheFormat::kBf16}; }

  DeviceArray<__nv_bfloat16> q, cache, w_uk, w_uv, out;
  DeviceArray<int32_t> blocks;
};

void BenchmarkPrefill(Cublas* cublas, const std::string& name, int32_t expand_tokens,
                      const std::vector<MlaPrefillSequence>& sequences) {
  MlaPrefill::Options options = {
      .num_heads = kHeads, .max_sequences = 256, .expand_tokens = expand_tokens};
  int32_t num_keys = 0;
  for (const MlaPrefillSequence& sequence : sequences) {
    options.max_queries += sequence.num_queries;
    num_keys += (sequence.num_keys + kBlock - 1) / kBlock * kBlock;
  }
  PrefillInputs in(options.max_queries, num_keys);
  DeviceArray<uint8_t> workspace(MlaPrefill::WorkspaceBytes(options));
  auto prefill = MlaPrefill::Create(options, cublas);
  if (!Report(prefill.status())) return;
  std::vector<double> plan_us;
  for (int i = 0; i < 5; ++i) {
    cudaDeviceSynchronize();
    const auto begin = std::chrono::steady_clock::now();
    if (!Report((*prefill)->Plan(sequences, in.blocks.get(),
                                 reinterpret_cast<std::byte*>(workspace.get()), nullptr))) {
      return;
    }
    plan_us.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
            .count());
  }
  std::sort(plan_us.begin(), plan_us.end());
  if (!Report((*prefill)->Run(in.layer(), nullptr))) return;
  const double us = GraphMicroseconds(
      1, 5, [&](int, cudaStream_t stream) { return Error((*prefill)->Run(in.layer(), stream)); });
  std::printf("\n%s: workspace %.0f MB, Plan() %.0f us on the host\n", name.c_str(),
              workspace.bytes() / 1e6, plan_us[2]);
  Print("a layer's Run()", us, AttentionFlops(sequences), 0, kBf16Flops);
}

// The kernels of 4 prompts of 2,048 one by one.
void BenchmarkPieces(Cublas* cublas) {
  std::printf("\n4 prompts of 2,048, piece by piece\n");
  const int rows = 8192;
  const std::vector<MlaPrefillSequence> sequences = {
      {2048, 2048, 0}, {2048, 2048, 32}, {2048, 2048, 64}, {2048, 2048, 96}};
  PrefillInputs in(rows, rows);
  int num_sms = 0;
  cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0);
  MlaPrefillPlan plan;
  if (!Report(PlanMlaPrefill(
          {.num_heads = kHeads, .max_queries = rows, .max_sequences = 4, .expand_tokens = rows},
          num_sms, sequences, &plan))) {
    return;
  }
  const MlaPrefillPart& part = plan.parts[0];
  DeviceArray<int32_t> words(plan.words);
  DeviceArray<__nv_bfloat16> latents(size_t{rows} * kLatent), keys(size_t{rows} * kHeads * kKey);
  DeviceArray<__nv_bfloat16> values(size_t{rows} * kHeads * kValue);
  DeviceArray<__nv_bfloat16> other(size_t{rows} * kHeads * kValue);
  DeviceArray<float> lse(size_t{rows} * kHeads), other_lse(size_t{rows} * kHeads);
  const auto time = [](const char* name, double flops, double bytes, auto enqueue) {
    if (enqueue(0, nullptr) != cudaSuccess) return;
    Print(name, GraphMicroseconds(4, 5, enqueue), flops, bytes, kBf16Flops);
  };

  time("gather", 0, rows * (2.0 * kCache + 2.0 * kLatent + 128.0 * kHeads),
       [&](int, cudaStream_t stream) {
         return GatherLatents(
             {.num_rows = rows,
              .num_heads = kHeads,
              .cache = in.Cache(),
              .blocks = in.blocks.get(),
              .sequences = reinterpret_cast<const PrefillKeys*>(words.get() + part.sequences),
              .num_sequences = 4,
              .latents = latents.get(),
              .keys = keys.get()},
             stream);
       });
  const double expand_flops = 2.0 * rows * kHeads * kValue * kLatent;
  Cublas::Batched expand = {.x = latents.get(),
                            .x_stride = kLatent,
                            .weight = in.w_uk.get(),
                            .weight_stride = kLatent,
                            .weight_batch_stride = int64_t{kValue} * kLatent,
                            .out = keys.get(),
                            .out_stride = int64_t{kHeads} * kKey,
                            .out_batch_stride = kKey,
                            .rows = rows,
                            .n = kValue,
                            .k = kLatent,
                            .batch = kHeads};
  time("keys, a product for each head", expand_flops, 2.0 * rows * kHeads * kValue,
       [&](int, cudaStream_t stream) { return Error(cublas->LinearBatched(expand, stream)); });
  expand.out = values.get();
  expand.out_stride = int64_t{kHeads} * kValue;
  expand.n = kHeads * kValue;
  expand.batch = 1;
  time("values, one product", expand_flops, 2.0 * rows * kHeads * kValue,
       [&](int, cudaStream_t stream) { return Error(cublas->LinearBatched(expand, stream)); });

  const int32_t* begin = words.get() + part.work;
  const int32_t* arrays = begin + num_sms + 1;
  PrefillAttentionArgs attention = {
      .num_queries = rows,
      .num_rows = rows,
      .num_heads = kHeads,
      .causal = true,
      .softmax_scale = 0.1352f,
      .q = in.q.get(),
      .q_stride = kHeads * kKey,
      .k = keys.get(),
      .v = values.get(),
      .work = {begin, arrays, arrays + part.num_work, arrays + 2 * part.num_work,
               arrays + 3 * part.num_work, arrays + 4 * part.num_work, arrays + 5 * part.num_work},
      .out = in.out.get(),
      .lse = lse.get()};
  time("attention, causal", AttentionFlops(sequences), 0,
       [&](int, cudaStream_t stream) { return PrefillAttention(attention, stream); });
  attention.causal = false;
  attention.out = other.get();
  attention.lse = other_lse.get();
  time("attention, all keys", 4.0 * 2048 * 2048 * kHeads * 2 * (kKey + kValue), 0,
       [&](int, cudaStream_t stream) { return PrefillAttention(attention, stream); });
  time("merge", 0, rows * kHeads * (3.0 * 2 * kValue + 12), [&](int, cudaStream_t stream) {
    return MergeAttention(
        {int64_t{rows} * kHeads, in.out.get(), lse.get(), other.get(), other_lse.get()}, stream);
  });
}

int Main(int argc, char** argv) {
  auto cublas = Cublas::Create();
  if (!Report(cublas.status())) return 1;
  const std::string what = argc > 1 ? argv[1] : "all";
  if (what == "all" || what == "linear") {
    BenchmarkLinear(cublas->get());
    ReportInvariance(cublas->get());
  }
  if (what == "all" || what == "prefill") {
    BenchmarkPieces(cublas->get());
    BenchmarkPrefill(cublas->get(), "4 prompts of 2,048", 8192,
                     {{2048, 2048, 0}, {2048, 2048, 32}, {2048, 2048, 64}, {2048, 2048, 96}});
    for (const int32_t expand_tokens : {8192, 16384}) {
      for (const int32_t context : {28 << 10, 120 << 10}) {
        BenchmarkPrefill(cublas->get(),
                         "4,096 queries after " + std::to_string(context) + ", " +
                             std::to_string(expand_tokens) + " keys at a time",
                         expand_tokens, {{4096, context + 4096, 0}});
      }
    }
  }
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) { return latentd::Main(argc, argv); }
