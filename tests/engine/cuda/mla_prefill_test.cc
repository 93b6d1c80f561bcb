#include "engine/cuda/mla_prefill.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "engine/cuda/cublas.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/mla_cache_data.h"

namespace latentd {
namespace {

constexpr int kBlock = 64, kLatent = 512, kRope = 64, kCache = 576, kNope = 128, kKey = 192,
              kValue = 128;
constexpr int32_t kWildBlock = 2147480000;
constexpr float kScale = 0.1352f;

double ToDouble(__nv_bfloat16 x) { return __bfloat162float(x); }
double Rounded(double x) { return ToDouble(__float2bfloat16(static_cast<float>(x))); }

struct Case {
  std::string name;
  int num_heads;
  int32_t expand_tokens;
  std::vector<std::pair<int32_t, int32_t>> sequences;  // queries, keys
  std::vector<int> checked_heads;
  CacheFormat cache = CacheFormat::kBf16;
};

// Inputs of one layer, on the host and the device. The cache holds NaN but for the tokens' rows,
// the tables wild ids behind each sequence's own.
class Inputs {
 public:
  explicit Inputs(const Case& test, uint32_t seed) : num_heads(test.num_heads), random_(seed) {
    int32_t num_blocks = 0;
    for (const auto& [num_queries, num_keys] : test.sequences) {
      sequences.push_back({num_queries, num_keys, static_cast<int32_t>(blocks.size())});
      for (int32_t b = 0; b < (num_keys + kBlock - 1) / kBlock; ++b) blocks.push_back(num_blocks++);
      blocks.insert(blocks.end(), 3, kWildBlock);
      num_queries_ += num_queries;
    }
    std::vector<int32_t> ids(num_blocks + 5);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random_);
    for (int32_t& block : blocks) block = block == kWildBlock ? block : ids[block];

    q = Random(size_t(num_queries_) * num_heads * kKey, 1);
    w_uk = Random(size_t(num_heads) * kNope * kLatent, 1 / std::sqrt(512.f));
    w_uv = Random(size_t(num_heads) * kValue * kLatent, 1 / std::sqrt(512.f));
    cache = HostMlaCache(test.cache, static_cast<int64_t>(ids.size()));
    for (const MlaPrefillSequence& sequence : sequences) {
      for (int32_t key = 0; key < sequence.num_keys; ++key) {
        const std::vector<__nv_bfloat16> values = Random(kCache, 1);
        HostMlaCache::Row row;
        std::transform(values.begin(), values.end(), row.begin(), __bfloat162float);
        cache.Set(Slot(sequence, key), row);
      }
    }
  }

  // Where a key's row is in the cache.
  int64_t Slot(const MlaPrefillSequence& sequence, int32_t key) const {
    return int64_t{blocks[sequence.block_begin + key / kBlock]} * kBlock + key % kBlock;
  }
  int32_t num_queries() const { return num_queries_; }

  // One of the sequences with the same cache and weights.
  Inputs Alone(size_t index) const {
    Inputs alone = *this;
    size_t begin = 0;
    for (size_t i = 0; i < index; ++i) begin += sequences[i].num_queries;
    alone.sequences = {sequences[index]};
    alone.num_queries_ = sequences[index].num_queries;
    const size_t width = size_t(num_heads) * kKey;
    alone.q.assign(q.begin() + begin * width, q.begin() + (begin + alone.num_queries_) * width);
    return alone;
  }

  const int num_heads;
  std::vector<MlaPrefillSequence> sequences;
  std::vector<int32_t> blocks;
  HostMlaCache cache;
  std::vector<__nv_bfloat16> q, w_uk, w_uv;

 private:
  std::vector<__nv_bfloat16> Random(size_t size, float scale) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<__nv_bfloat16> values(size);
    for (__nv_bfloat16& value : values) value = __float2bfloat16(normal(random_));
    return values;
  }

  int32_t num_queries_ = 0;
  std::mt19937 random_;
};

// Keys and values of one head as bf16, everything after them in f64. Calls check(query row, result)
// for each query.
template <typename Check>
void Reference(const Inputs& in, int head, Check check) {
  int32_t row = 0;
  for (const MlaPrefillSequence& sequence : in.sequences) {
    const int32_t num_keys = sequence.num_keys;
    std::vector<float> keys(size_t(num_keys) * kKey), values(size_t(num_keys) * kValue);
    for (int32_t key = 0; key < num_keys; ++key) {
      const HostMlaCache::Row latent = in.cache.Get(in.Slot(sequence, key));
      for (int d = 0; d < kNope; ++d) {
        double k = 0, v = 0;
        for (int i = 0; i < kLatent; ++i) {
          const size_t at = (size_t(head) * kNope + d) * kLatent + i;
          k += latent[i] * ToDouble(in.w_uk[at]);
          v += latent[i] * ToDouble(in.w_uv[at]);
        }
        keys[size_t(key) * kKey + d] = static_cast<float>(Rounded(k));
        values[size_t(key) * kValue + d] = static_cast<float>(Rounded(v));
      }
      std::copy(latent.begin() + kLatent, latent.end(), &keys[size_t(key) * kKey + kNope]);
    }
    for (int32_t i = 0; i < sequence.num_queries; ++i, ++row) {
      const int32_t seen = num_keys - sequence.num_queries + i + 1;
      const __nv_bfloat16* q = &in.q[(size_t(row) * in.num_heads + head) * kKey];
      std::vector<double> scores(seen);
      for (int32_t key = 0; key < seen; ++key) {
        double dot = 0;
        for (int d = 0; d < kKey; ++d) dot += ToDouble(q[d]) * keys[size_t(key) * kKey + d];
        scores[key] = dot * kScale;
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      std::vector<double> out(kValue);
      for (int32_t key = 0; key < seen; ++key) {
        const double weight = std::exp(scores[key] - max);
        sum += weight;
        for (int d = 0; d < kValue; ++d) out[d] += weight * values[size_t(key) * kValue + d];
      }
      for (double& value : out) value /= sum;
      check(row, out);
    }
  }
}

class MlaPrefillTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    auto cublas = Cublas::Create();
    ASSERT_TRUE(cublas.ok()) << cublas.status();
    cublas_ = *std::move(cublas);
    ASSERT_CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  // The result of `times` layers in a row, of which each must be the same.
  std::vector<__nv_bfloat16> Run(const Case& test, const Inputs& in, int times) {
    const MlaPrefill::Options options = {.num_heads = in.num_heads,
                                         .max_queries = in.num_queries(),
                                         .max_sequences = static_cast<int>(in.sequences.size()),
                                         .expand_tokens = test.expand_tokens};
    auto prefill = MlaPrefill::Create(options, cublas_.get());
    if (!prefill.ok()) {
      ADD_FAILURE() << prefill.status();
      return {};
    }
    // Other columns follow the queries'.
    const int64_t q_width = int64_t{in.num_heads} * kKey, q_stride = q_width + 24;
    DeviceArray<__nv_bfloat16> q(size_t(in.num_queries()) * q_stride);
    cudaMemcpy2D(q.get(), q_stride * sizeof(in.q[0]), in.q.data(), q_width * sizeof(in.q[0]),
                 q_width * sizeof(in.q[0]), in.num_queries(), cudaMemcpyHostToDevice);
    DeviceArray<std::byte> cache(in.cache.bytes());
    DeviceArray<__nv_bfloat16> w_uk(in.w_uk), w_uv(in.w_uv);
    DeviceArray<__nv_bfloat16> out(size_t(in.num_queries()) * in.num_heads * kValue);
    DeviceArray<int32_t> blocks(in.blocks);
    DeviceArray<uint8_t> workspace(MlaPrefill::WorkspaceBytes(options));
    cudaDeviceSynchronize();  // the default stream's writes
    absl::Status status = (*prefill)->Plan(in.sequences, blocks.get(),
                                           reinterpret_cast<std::byte*>(workspace.get()), stream_);
    EXPECT_TRUE(status.ok()) << status;
    std::vector<__nv_bfloat16> first;
    for (int i = 0; i < times && status.ok(); ++i) {
      out.Poison();
      cudaDeviceSynchronize();
      status = (*prefill)->Run({q.get(),
                                q_stride,
                                {cache.get(), in.cache.format()},
                                w_uk.get(),
                                w_uv.get(),
                                kScale,
                                out.get()},
                               stream_);
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
      std::vector<__nv_bfloat16> result = out.Get();
      if (i == 0)
        first = std::move(result);
      else
        EXPECT_TRUE(SameBits(result, first)) << "the second layer differs from the first";
    }
    return first;
  }

  static bool SameBits(const std::vector<__nv_bfloat16>& a, const std::vector<__nv_bfloat16>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  }

  std::unique_ptr<Cublas> cublas_;
  cudaStream_t stream_ = nullptr;
};

class MlaPrefillReferenceTest : public MlaPrefillTest, public testing::WithParamInterface<Case> {};

TEST_P(MlaPrefillReferenceTest, AgreesWithReference) {
  const Case& test = GetParam();
  const Inputs in(test, 11);
  const std::vector<__nv_bfloat16> out = Run(test, in, 2);
  ASSERT_FALSE(out.empty());
  int32_t max_keys = 0;
  for (const MlaPrefillSequence& sequence : in.sequences) {
    max_keys = std::max(max_keys, sequence.num_keys);
  }
  double difference = 0, norm = 0, worst = 0;
  int32_t worst_row = 0;
  for (const int head : test.checked_heads) {
    Reference(in, head, [&](int32_t row, const std::vector<double>& want) {
      double row_difference = 0, row_norm = 0;
      for (int d = 0; d < kValue; ++d) {
        const double got = ToDouble(out[(size_t(row) * in.num_heads + head) * kValue + d]);
        row_difference += (got - want[d]) * (got - want[d]);
        row_norm += want[d] * want[d];
      }
      difference += row_difference;
      norm += row_norm;
      const double error = std::sqrt(row_difference / row_norm);
      if (!(error <= worst)) {
        worst = error;
        worst_row = row;
      }
    });
  }
  // Rounding to bf16 is about 2e-3 of a value: the weights' before the product with the values, the
  // result's, and that of the merged result with each part more, which the later ones shrink.
  const double parts = std::ceil(double(max_keys) / test.expand_tokens);
  const double tolerance = std::sqrt(3.5e-3 * 3.5e-3 + parts / 3 * 2.4e-3 * 2.4e-3);
  EXPECT_LT(std::sqrt(difference / norm), tolerance);
  EXPECT_LT(worst, 3 * tolerance) << "row " << worst_row;
}

INSTANTIATE_TEST_SUITE_P(
    Cases, MlaPrefillReferenceTest,
    testing::Values(
        Case{"one_query", 4, 128, {{1, 1}}, {0, 3}}, Case{"one_tile", 4, 128, {{128, 128}}, {0, 3}},
        Case{"odd", 4, 640, {{131, 131}, {1, 77}, {65, 300}}, {0, 1, 2, 3}},
        Case{"one_head", 1, 256, {{200, 250}}, {0}},
        // More than a part together, each less.
        Case{"packed_in_turn", 4, 384, {{100, 260}, {130, 200}, {50, 129}, {7, 384}}, {1, 2}},
        // Longer than a part: a chunk as large as one, contexts that are multiples of it and not.
        Case{"long_context", 4, 256, {{256, 1000}}, {0, 2}},
        Case{"long_multiple", 4, 256, {{100, 768}}, {3}},
        Case{"long_and_short",
             4,
             256,
             {{30, 40}, {129, 700}, {60, 257}, {1, 513}, {36, 36}},
             {0, 3}},
        Case{"many_parts", 2, 128, {{33, 2500}}, {1}},
        Case{"fp8_cache", 4, 256, {{30, 40}, {129, 700}, {1, 513}}, {0, 3}, CacheFormat::kFp8},
        Case{"deepseek_v3", 128, 1024, {{300, 1100}, {513, 513}}, {0, 77, 127}}),
    [](const auto& info) { return info.param.name; });

TEST_F(MlaPrefillTest, BitsDoNotDependOnTheOtherSequences) {
  const Case test = {"", 16, 1024, {{70, 70}, {1, 1}, {300, 330}, {150, 1700}, {400, 500}}, {}};
  const Inputs in(test, 5);
  const std::vector<__nv_bfloat16> together = Run(test, in, 1);
  ASSERT_FALSE(together.empty());
  size_t begin = 0;
  for (size_t i = 0; i < in.sequences.size(); ++i) {
    const std::vector<__nv_bfloat16> alone = Run(test, in.Alone(i), 1);
    ASSERT_FALSE(alone.empty());
    EXPECT_EQ(std::memcmp(alone.data(), &together[begin], alone.size() * sizeof(alone[0])), 0)
        << "sequence " << i;
    begin += alone.size();
  }
}

// A sequence that went wrong leaves its neighbours in the part alone.
TEST_F(MlaPrefillTest, ANanStaysInItsSequence) {
  for (const auto& [format, bad] :
       {std::pair{CacheFormat::kBf16, 1}, std::pair{CacheFormat::kBf16, 2},
        std::pair{CacheFormat::kFp8, 1}}) {
    const Case test = {"", 4, 1024, {{70, 70}, {90, 130}, {50, 200}}, {}, format};
    Inputs in(test, 3);
    const std::vector<__nv_bfloat16> want = Run(test, in, 1);
    Inputs poisoned = in;
    const MlaPrefillSequence& sequence = in.sequences[bad];
    for (int32_t key = 0; key < sequence.num_keys; ++key) {
      HostMlaCache::Row row;
      row.fill(NAN);
      poisoned.cache.Set(in.Slot(sequence, key), row);
    }
    const std::vector<__nv_bfloat16> got = Run(test, poisoned, 1);
    int32_t row = 0;
    for (int i = 0; i < 3; ++i) {
      for (int32_t q = 0; q < in.sequences[i].num_queries; ++q, ++row) {
        const size_t at = size_t(row) * in.num_heads * kValue, size = in.num_heads * kValue;
        if (i == bad) {
          ASSERT_TRUE(std::isnan(ToDouble(got[at])));
        } else {
          ASSERT_EQ(std::memcmp(&got[at], &want[at], size * sizeof(got[0])), 0)
              << "sequence " << i << " query " << q << ", NaN in " << bad;
        }
      }
    }
  }
}

TEST_F(MlaPrefillTest, RefusesWhatExceedsItsOptions) {
  using Options = MlaPrefill::Options;
  for (const Options& options : {Options{0, 1, 1, 1}, Options{1, 0, 1, 1}, Options{1, 1, 0, 1},
                                 Options{1, 129, 1, 128}, Options{1, 1, 1, (1 << 20) + 1}}) {
    EXPECT_EQ(MlaPrefill::Create(options, cublas_.get()).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
  const Options options = {4, 10, 2, 128};
  auto prefill = MlaPrefill::Create(options, cublas_.get());
  ASSERT_TRUE(prefill.ok()) << prefill.status();
  DeviceArray<uint8_t> workspace(MlaPrefill::WorkspaceBytes(options));
  DeviceArray<int32_t> blocks(16);
  const auto plan = [&](std::vector<MlaPrefillSequence> sequences) {
    return (*prefill)
        ->Plan(sequences, blocks.get(), reinterpret_cast<std::byte*>(workspace.get()), stream_)
        .code();
  };
  EXPECT_EQ(plan({{0, 5, 0}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({{6, 5, 0}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({{5, 5, -1}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({{5, 5, 0}, {6, 6, 1}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(plan({{1, 1, 0}, {1, 1, 1}, {1, 1, 2}}), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE((*prefill)->Run({}, stream_).ok());  // nothing is planned
  EXPECT_EQ(plan({}), absl::StatusCode::kOk);
  EXPECT_TRUE((*prefill)->Run({}, stream_).ok());
  ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));
}

}  // namespace
}  // namespace latentd
