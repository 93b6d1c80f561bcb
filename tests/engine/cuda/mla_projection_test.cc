#include "engine/cuda/kernels/mla_projection.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/linear_input.h"
#include "tests/engine/cuda/mla_cache_data.h"

namespace latentd {
namespace {

constexpr int kNopeDim = 128;
constexpr int kRopeDim = 64;
constexpr int kHeadDim = kNopeDim + kRopeDim;
constexpr int kLatentDim = 512;
constexpr int kCacheRow = kMlaKeyDim;
constexpr int kNumPositions = 999;

double ToDouble(__nv_bfloat16 value) { return __bfloat162float(value); }
uint16_t Bits(__nv_bfloat16 value) { return __nv_bfloat16_raw(value).x; }

class Rotation {
 public:
  explicit Rotation(bool interleave)
      : interleave_(interleave),
        angles_(RandomFloats(kNumPositions * kRopeDim / 2, 0, 2, 99)),
        cos_(Map([](float angle) { return 1.1f * std::cos(angle); })),
        sin_(Map([](float angle) { return 1.1f * std::sin(angle); })),
        cos_device_(cos_),
        sin_device_(sin_) {}

  RopeTable table() const { return {cos_device_.get(), sin_device_.get(), interleave_}; }

  // As engine/model/rope.h.
  std::vector<double> Apply(const __nv_bfloat16* x, int position) const {
    std::vector<double> out(kRopeDim);
    constexpr int kHalf = kRopeDim / 2;
    for (int i = 0; i < kHalf; ++i) {
      const double a = ToDouble(interleave_ ? x[2 * i] : x[i]);
      const double b = ToDouble(interleave_ ? x[2 * i + 1] : x[kHalf + i]);
      const double cos = cos_[position * kHalf + i], sin = sin_[position * kHalf + i];
      out[i] = a * cos - b * sin;
      out[kHalf + i] = b * cos + a * sin;
    }
    return out;
  }

 private:
  template <typename Function>
  std::vector<float> Map(Function function) const {
    std::vector<float> values;
    for (const float angle : angles_) values.push_back(function(angle));
    return values;
  }
  bool interleave_;
  std::vector<float> angles_, cos_, sin_;
  DeviceArray<float> cos_device_, sin_device_;
};

std::vector<int32_t> RandomPositions(int num_tokens) {
  std::mt19937 random(7);
  std::vector<int32_t> positions(num_tokens);
  for (int32_t& position : positions) position = random() % kNumPositions;
  return positions;
}

void ExpectNear(__nv_bfloat16 got, double want, double absolute, const std::string& where) {
  ASSERT_NEAR(ToDouble(got), want, std::abs(want) * 0x1.02p-8 + absolute) << where;
}

std::string At(int a, int b, int c) {
  return std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c);
}

// --- NormLatents

struct LatentCase {
  int num_tokens;
  int q_dim;
  bool has_query = true;  // q_lora_rank
  bool interleave = true;
  bool power_of_two_scales = false;
  bool bf16 = false;
  CacheFormat cache = CacheFormat::kBf16;
};

// An element of a row of the cache: rounded once.
void ExpectCached(CacheFormat format, const HostMlaCache::Row& row, int column, double want,
                  double scale, const std::string& where) {
  const double error = std::fabs(double{row[column]} - want);
  const bool e4m3 = format == CacheFormat::kFp8 && column < kLatentDim;
  // Half a unit in the last place: 2^-4 of the value in e4m3, or of its least normal number.
  const double limit = e4m3 ? std::max(std::fabs(want) / 16, scale * 0x1p-10)
                            : std::max(std::fabs(want) / 256, 1e-30);
  ASSERT_LE(error, limit * (1 + 1e-4) + 2e-6) << where << ": " << row[column] << ", not " << want;
}

class NormLatentsTest : public DeviceTest, public testing::WithParamInterface<LatentCase> {
 protected:
  static constexpr float kEps = 1e-6f;
  static std::vector<double> Norm(const __nv_bfloat16* x, const std::vector<float>& weight) {
    double square_sum = 0;
    for (size_t i = 0; i < weight.size(); ++i) square_sum += ToDouble(x[i]) * ToDouble(x[i]);
    const double factor = 1 / std::sqrt(square_sum / static_cast<double>(weight.size()) + kEps);
    std::vector<double> out(weight.size());
    for (size_t i = 0; i < weight.size(); ++i) out[i] = ToDouble(x[i]) * factor * weight[i];
    return out;
  }
};

TEST_P(NormLatentsTest, IsTheReferencesAndARowAloneIsTheSame) {
  const LatentCase c = GetParam();
  const int stride = c.q_dim + kCacheRow;
  const int num_slots = (c.num_tokens + 3) * 2;
  const int num_blocks = (num_slots + kMlaBlockKeys - 1) / kMlaBlockKeys;
  const std::vector<__nv_bfloat16> qkv =
      RandomBf16(static_cast<size_t>(c.num_tokens) * stride, 2, 1);
  const std::vector<float> q_weight = RandomFloats(c.has_query ? c.q_dim : 0, 1, 0.2f, 2);
  const std::vector<float> kv_weight = RandomFloats(kLatentDim, 1, 0.2f, 3);
  const std::vector<int32_t> positions = RandomPositions(c.num_tokens);
  std::vector<int64_t> slots(c.num_tokens);
  for (int i = 0; i < c.num_tokens; ++i)
    slots[i] = i % 5 == 3 ? std::numeric_limits<int64_t>::min() + i : num_slots - 2 - 2 * i;
  if (c.num_tokens > 5) slots[5] = -1;
  const Rotation rotation(c.interleave);
  const DeviceArray<__nv_bfloat16> qkv_device(qkv);
  const DeviceArray<float> q_weight_device(q_weight), kv_weight_device(kv_weight);
  const DeviceArray<int32_t> positions_device(positions);
  const DeviceArray<int64_t> slots_device(slots);
  DeviceArray<std::byte> cache(num_blocks * MlaCacheBlockBytes(c.cache));

  const auto run = [&](int first, int count, std::byte* to_cache, const LinearInput& out) {
    LatentArgs args;
    args.num_tokens = count;
    args.qkv_a = qkv_device.get() + static_cast<size_t>(first) * stride;
    args.q_dim = c.q_dim;
    args.q_a_layernorm = c.has_query ? q_weight_device.get() : nullptr;
    args.kv_a_layernorm = kv_weight_device.get();
    args.eps = kEps;
    args.rope = rotation.table();
    args.positions = positions_device.get() + first;
    args.slots = slots_device.get() + first;
    args.cache = {to_cache, c.cache};
    args.power_of_two_scales = c.power_of_two_scales;
    if (c.has_query) args.q_out = out;
    ASSERT_CUDA_OK(NormLatents(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
  };
  LinearOutput out(c.num_tokens, c.has_query ? c.q_dim : 128, !c.bf16, c.bf16);
  run(0, c.num_tokens, cache.get(), out.input());
  if (HasFatalFailure()) return;

  const HostMlaCache rows(c.cache, cache.Get());
  std::vector<bool> written(num_slots, false);
  for (int i = 0; i < c.num_tokens; ++i) {
    const __nv_bfloat16* x = qkv.data() + static_cast<size_t>(i) * stride;
    if (c.has_query) out.ExpectRow(i, Norm(x, q_weight), c.power_of_two_scales, /*exact=*/false);
    if (HasFatalFailure()) return;
    if (slots[i] < 0) continue;
    written[slots[i]] = true;
    const std::vector<double> latent = Norm(x + c.q_dim, kv_weight);
    const std::vector<double> key = rotation.Apply(x + c.q_dim + kLatentDim, positions[i]);
    const HostMlaCache::Row row = rows.Get(slots[i]);
    double amax = 0;
    for (const double value : latent) amax = std::max(amax, std::fabs(value));
    const double scale = std::exp2(std::ceil(std::log2(amax / 448 * (1 - 1e-6))));
    if (c.cache == CacheFormat::kFp8) {
      ASSERT_EQ(rows.Scale(slots[i]), scale) << "token " << i;
    }
    for (int column = 0; column < kCacheRow; ++column) {
      ExpectCached(c.cache, row, column,
                   column < kLatentDim ? latent[column] : key[column - kLatentDim], scale,
                   At(i, column, 0));
      if (HasFatalFailure()) return;
    }
  }
  for (int slot = 0; slot < num_slots; ++slot) {
    if (!written[slot]) {
      ASSERT_TRUE(rows.IsUntouched(slot)) << slot;
    }
  }

  for (const int i : {0, c.num_tokens / 2, c.num_tokens - 1}) {
    LinearOutput one(1, c.has_query ? c.q_dim : 128, !c.bf16, c.bf16);
    DeviceArray<std::byte> other_cache(num_blocks * MlaCacheBlockBytes(c.cache));
    run(i, 1, other_cache.get(), one.input());
    if (c.has_query) one.ExpectSameRow(0, out, i);
    if (HasFatalFailure()) return;
    if (slots[i] < 0) continue;
    ASSERT_EQ(HostMlaCache(c.cache, other_cache.Get()).Get(slots[i]), rows.Get(slots[i])) << i;
  }
}

// FP8 alone cannot tell that a latent is none: its scale does.
TEST_F(NormLatentsTest, ARowThatIsNotANumberIsNoneInFp8) {
  constexpr int kTokens = 3;
  const Rotation rotation(true);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<__nv_bfloat16> qkv = RandomBf16(kTokens * (128 + kCacheRow), 2, 1);
    qkv[128 + kCacheRow + 128 + 300] = __float2bfloat16(bad);
    const DeviceArray<__nv_bfloat16> qkv_device(qkv);
    const DeviceArray<float> weight(RandomFloats(kLatentDim, 1, 0.2f, 3));
    const DeviceArray<int32_t> positions(std::vector<int32_t>{0, 1, 2});
    const DeviceArray<int64_t> slots(std::vector<int64_t>{0, 1, 2});
    DeviceArray<std::byte> cache(MlaCacheBlockBytes(CacheFormat::kFp8));
    LatentArgs args;
    args.num_tokens = kTokens;
    args.qkv_a = qkv_device.get();
    args.q_dim = 128;
    args.kv_a_layernorm = weight.get();
    args.eps = kEps;
    args.rope = rotation.table();
    args.positions = positions.get();
    args.slots = slots.get();
    args.cache = {cache.get(), CacheFormat::kFp8};
    ASSERT_CUDA_OK(NormLatents(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
    const HostMlaCache rows(CacheFormat::kFp8, cache.Get());
    for (int i = 0; i < kTokens; ++i) {
      for (const float value : rows.Get(i)) ASSERT_EQ(std::isnan(value), i == 1) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, NormLatentsTest,
    testing::Values(LatentCase{1, 128}, LatentCase{3, 128, true, false}, LatentCase{64, 128},
                    LatentCase{1, 1536}, LatentCase{3, 1536, true, false, true},
                    LatentCase{64, 1536}, LatentCase{300, 1536, true, true, true},
                    LatentCase{1001, 1536}, LatentCase{1001, 1536, true, false, false, true},
                    LatentCase{7, 1544, true, true, false, true}, LatentCase{7, 3456},
                    // Without q_lora_rank: 4 or 128 heads of 192.
                    LatentCase{7, 768, false}, LatentCase{600, 768, false, false},
                    LatentCase{1, 1536, true, true, false, false, CacheFormat::kFp8},
                    LatentCase{70, 1536, true, false, true, false, CacheFormat::kFp8},
                    LatentCase{1001, 1536, true, true, false, false, CacheFormat::kFp8},
                    LatentCase{65, 768, false, true, false, false, CacheFormat::kFp8},
                    LatentCase{64, 24576, false}));

// --- AbsorbQuery, ProjectValue: for a few heads in f64, for the others only that they were
// written.

struct ProductCase {
  int num_tokens;
  int num_heads;
  bool interleave = true;
  bool power_of_two_scales = false;
  bool bf16 = false;
};

std::string ProductName(const testing::TestParamInfo<ProductCase>& info) {
  const ProductCase& c = info.param;
  return std::to_string(c.num_tokens) + "x" + std::to_string(c.num_heads) +
         (c.interleave ? "" : "Halves") + (c.power_of_two_scales ? "Pow2" : "") +
         (c.bf16 ? "Bf16" : "");
}

std::vector<int> SomeTokens(int num_tokens) {
  std::vector<int> tokens;
  for (int i = 0; i < num_tokens; i += 1 + num_tokens / 40) tokens.push_back(i);
  tokens.push_back(num_tokens - 1);
  return tokens;
}

std::vector<int> SomeHeads(int num_heads) {
  return num_heads <= 4 ? std::vector<int>{0, num_heads - 1}
                        : std::vector<int>{0, num_heads / 2 + 1, num_heads - 1};
}

class AbsorbQueryTest : public DeviceTest, public testing::WithParamInterface<ProductCase> {};

TEST_P(AbsorbQueryTest, IsTheReferencesAndARowAloneIsTheSame) {
  const ProductCase c = GetParam();
  const int64_t stride = c.num_heads * kHeadDim + 8;
  const std::vector<__nv_bfloat16> q = RandomBf16(c.num_tokens * stride, 1, 1);
  const std::vector<__nv_bfloat16> w =
      RandomBf16(static_cast<size_t>(c.num_heads) * kNopeDim * kLatentDim, 0.1f, 2);
  const std::vector<int32_t> positions = RandomPositions(c.num_tokens);
  const Rotation rotation(c.interleave);
  const DeviceArray<__nv_bfloat16> q_device(q), w_device(w);
  const DeviceArray<int32_t> positions_device(positions);
  const size_t row_size = static_cast<size_t>(c.num_heads) * kCacheRow;
  DeviceArray<__nv_bfloat16> out_device(c.num_tokens * row_size);
  const auto run = [&](int first, int count, __nv_bfloat16* to) {
    AbsorbQueryArgs args;
    args.num_tokens = count;
    args.num_heads = c.num_heads;
    args.q = q_device.get() + first * stride;
    args.q_stride = stride;
    args.w_uk = w_device.get();
    args.rope = rotation.table();
    args.positions = positions_device.get() + first;
    args.out = to;
    ASSERT_CUDA_OK(AbsorbQuery(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
  };
  run(0, c.num_tokens, out_device.get());
  if (HasFatalFailure()) return;
  const std::vector<__nv_bfloat16> out = out_device.Get();
  for (size_t i = 0; i < out.size(); ++i) ASSERT_FALSE(std::isnan(ToDouble(out[i]))) << i;

  for (const int token : SomeTokens(c.num_tokens)) {
    for (const int head : SomeHeads(c.num_heads)) {
      const __nv_bfloat16* x = q.data() + token * stride + head * kHeadDim;
      const __nv_bfloat16* got = out.data() + token * row_size + head * kCacheRow;
      const std::vector<double> rope = rotation.Apply(x + kNopeDim, positions[token]);
      std::vector<double> want(kLatentDim, 0);
      for (int d = 0; d < kNopeDim; ++d) {
        const __nv_bfloat16* row =
            w.data() + (static_cast<size_t>(head) * kNopeDim + d) * kLatentDim;
        for (int column = 0; column < kLatentDim; ++column)
          want[column] += ToDouble(x[d]) * ToDouble(row[column]);
      }
      want.insert(want.end(), rope.begin(), rope.end());
      for (int column = 0; column < kCacheRow; ++column) {
        ExpectNear(got[column], want[column], 2e-5, At(token, head, column));
        if (HasFatalFailure()) return;
      }
    }
  }
  for (const int token : {0, c.num_tokens / 2, c.num_tokens - 1}) {
    DeviceArray<__nv_bfloat16> one_device(row_size);
    run(token, 1, one_device.get());
    const std::vector<__nv_bfloat16> one = one_device.Get();
    for (size_t i = 0; i < row_size; ++i)
      ASSERT_EQ(Bits(one[i]), Bits(out[token * row_size + i])) << token << ", " << i;
  }
}

class ProjectValueTest : public DeviceTest, public testing::WithParamInterface<ProductCase> {};

TEST_P(ProjectValueTest, IsTheReferencesAndARowAloneIsTheSame) {
  const ProductCase c = GetParam();
  const size_t row_size = static_cast<size_t>(c.num_heads) * kLatentDim;
  const std::vector<__nv_bfloat16> latent = RandomBf16(c.num_tokens * row_size, 1, 1);
  const std::vector<__nv_bfloat16> w =
      RandomBf16(static_cast<size_t>(c.num_heads) * 128 * kLatentDim, 0.1f, 2);
  const DeviceArray<__nv_bfloat16> latent_device(latent), w_device(w);
  const auto run = [&](int first, int count, const LinearInput& to) {
    ProjectValueArgs args;
    args.num_tokens = count;
    args.num_heads = c.num_heads;
    args.latent = latent_device.get() + first * row_size;
    args.w_uv = w_device.get();
    args.power_of_two_scales = c.power_of_two_scales;
    args.out = to;
    ASSERT_CUDA_OK(ProjectValue(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
  };
  const int columns = c.num_heads * 128;
  LinearOutput out(c.num_tokens, columns, !c.bf16, c.bf16);
  run(0, c.num_tokens, out.input());
  if (HasFatalFailure()) return;
  for (const int token : SomeTokens(c.num_tokens)) {
    for (const int head : SomeHeads(c.num_heads)) {
      std::vector<double> want(128, 0);
      const __nv_bfloat16* x = latent.data() + token * row_size + head * kLatentDim;
      for (int v = 0; v < 128; ++v) {
        const __nv_bfloat16* row = w.data() + (static_cast<size_t>(head) * 128 + v) * kLatentDim;
        for (int i = 0; i < kLatentDim; ++i) want[v] += ToDouble(x[i]) * ToDouble(row[i]);
      }
      out.ExpectGroup(token, head, want, c.power_of_two_scales, /*exact=*/false);
      if (HasFatalFailure()) return;
    }
  }
  out.ExpectWritten();
  for (const int token : {0, c.num_tokens / 2, c.num_tokens - 1}) {
    LinearOutput one(1, columns, !c.bf16, c.bf16);
    run(token, 1, one.input());
    one.ExpectSameRow(0, out, token);
    if (HasFatalFailure()) return;
  }
}

const auto kProductCases = testing::Values(
    ProductCase{1, 1}, ProductCase{3, 4, false}, ProductCase{64, 4, true, true},
    ProductCase{300, 4, true, false, true}, ProductCase{1, 128}, ProductCase{3, 128, false, true},
    ProductCase{16, 128}, ProductCase{17, 128, false}, ProductCase{32, 128}, ProductCase{33, 128},
    ProductCase{64, 128, true, true}, ProductCase{65, 128, false, false, true},
    ProductCase{128, 128}, ProductCase{300, 128});
INSTANTIATE_TEST_SUITE_P(Shapes, AbsorbQueryTest, kProductCases, ProductName);
INSTANTIATE_TEST_SUITE_P(Shapes, ProjectValueTest, kProductCases, ProductName);

// --- RopeQuery

class RopeQueryTest : public DeviceTest,
                      public testing::WithParamInterface<std::tuple<int, int, bool>> {};

TEST_P(RopeQueryTest, IsTheReference) {
  const auto [num_tokens, num_heads, interleave] = GetParam();
  const int64_t stride = num_heads * kHeadDim + 4;
  const std::vector<__nv_bfloat16> q = RandomBf16(num_tokens * stride, 1, 1);
  const std::vector<int32_t> positions = RandomPositions(num_tokens);
  const Rotation rotation(interleave);
  DeviceArray<__nv_bfloat16> q_device(q);
  const DeviceArray<int32_t> positions_device(positions);
  ASSERT_CUDA_OK(RopeQuery(q_device.get(), stride, num_tokens, num_heads, rotation.table(),
                           positions_device.get(), nullptr));
  ASSERT_CUDA_OK(cudaDeviceSynchronize());
  const std::vector<__nv_bfloat16> out = q_device.Get();
  for (int token = 0; token < num_tokens; ++token) {
    for (int head = 0; head < num_heads; ++head) {
      const __nv_bfloat16* x = q.data() + token * stride + head * kHeadDim;
      const __nv_bfloat16* got = out.data() + token * stride + head * kHeadDim;
      for (int d = 0; d < kNopeDim; ++d) ASSERT_EQ(Bits(got[d]), Bits(x[d])) << At(token, head, d);
      const std::vector<double> rope = rotation.Apply(x + kNopeDim, positions[token]);
      for (int d = 0; d < kRopeDim; ++d) {
        ExpectNear(got[kNopeDim + d], rope[d], 1e-6, At(token, head, d));
        if (HasFatalFailure()) return;
      }
    }
    for (int64_t i = num_heads * kHeadDim; i < stride; ++i)
      ASSERT_EQ(Bits(out[token * stride + i]), Bits(q[token * stride + i])) << token << ", " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, RopeQueryTest,
                         testing::Combine(testing::Values(1, 3, 300), testing::Values(1, 6, 128),
                                          testing::Bool()));

// --- Arguments

class MlaProjectionTest : public DeviceTest {};

TEST_F(MlaProjectionTest, RefusesBadArguments) {
  const Rotation rotation(true);
  DeviceArray<__nv_bfloat16> x(65536);
  DeviceArray<float> weight(4096);
  DeviceArray<int32_t> positions(1);
  DeviceArray<int64_t> slots(1);
  LinearOutput out(1, 3584, true, true);

  LatentArgs latents;
  latents.num_tokens = 1;
  latents.qkv_a = x.get();
  latents.q_dim = 3584;  // above what it is made for
  latents.q_a_layernorm = weight.get();
  latents.kv_a_layernorm = weight.get();
  latents.rope = rotation.table();
  latents.positions = positions.get();
  latents.slots = slots.get();
  latents.cache = {reinterpret_cast<std::byte*>(x.get()), CacheFormat::kBf16};
  latents.q_out = out.input();
  EXPECT_EQ(NormLatents(latents, nullptr), cudaErrorInvalidValue);
  latents.q_dim = 1536;
  latents.rope.cos = nullptr;
  EXPECT_EQ(NormLatents(latents, nullptr), cudaErrorInvalidValue);
  latents.rope = rotation.table();
  latents.num_tokens = 0;
  EXPECT_EQ(NormLatents(latents, nullptr), cudaSuccess);

  AbsorbQueryArgs absorb;
  absorb.num_tokens = 1;
  absorb.num_heads = 2;
  absorb.q = x.get();
  absorb.q_stride = 2 * kHeadDim - 8;
  absorb.w_uk = x.get();
  absorb.rope = rotation.table();
  absorb.positions = positions.get();
  absorb.out = x.get();
  EXPECT_EQ(AbsorbQuery(absorb, nullptr), cudaErrorInvalidValue);
  absorb.q_stride = 2 * kHeadDim + 4;
  EXPECT_EQ(AbsorbQuery(absorb, nullptr), cudaErrorInvalidValue);
  absorb.q_stride = 2 * kHeadDim;
  absorb.w_uk = nullptr;
  EXPECT_EQ(AbsorbQuery(absorb, nullptr), cudaErrorInvalidValue);
  absorb.w_uk = x.get();
  absorb.num_tokens = 0;
  EXPECT_EQ(AbsorbQuery(absorb, nullptr), cudaSuccess);

  ProjectValueArgs project;
  project.num_tokens = 1;
  project.num_heads = 2;
  project.latent = x.get();
  project.w_uv = x.get();
  EXPECT_EQ(ProjectValue(project, nullptr), cudaErrorInvalidValue);  // no output
  project.out = out.input();
  project.out.fp8.scale_stride = 0;
  EXPECT_EQ(ProjectValue(project, nullptr), cudaErrorInvalidValue);
  project.out = out.input();
  project.num_tokens = 0;
  EXPECT_EQ(ProjectValue(project, nullptr), cudaSuccess);

  EXPECT_EQ(RopeQuery(x.get(), kHeadDim - 4, 1, 1, rotation.table(), positions.get(), nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(RopeQuery(x.get(), kHeadDim, 1, 1, RopeTable(), positions.get(), nullptr),
            cudaErrorInvalidValue);
}

}  // namespace
}  // namespace latentd
