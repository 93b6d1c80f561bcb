#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "absl/types/span.h"
#include "engine/cpu/sampler.h"
#include "engine/cuda/kernels/sampler.h"
#include "engine/sampling.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

struct Batch {
  int vocab_size = 0;
  std::vector<float> logits;  // [rows, vocab_size]
  std::vector<SampleRow> rows;
  std::vector<int32_t> suppressed;

  int size() const { return static_cast<int>(rows.size()); }
  absl::Span<const float> row(int i) const {
    return absl::MakeConstSpan(logits).subspan(size_t(i) * vocab_size, vocab_size);
  }
};

SamplingParams Params(const SampleRow& row) {
  return {.temperature = row.temperature,
          .top_p = row.top_p,
          .top_k = row.top_k,
          .min_p = row.min_p,
          .seed = row.seed,
          .sample_index = row.sample_index};
}

// splitmix64: fast enough for 10^9 logits.
struct Random {
  uint64_t state;
  uint64_t Next() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  int Below(int n) { return static_cast<int>(Next() % static_cast<uint64_t>(n)); }
  float Normal() {  // the sum of eight bytes: near enough
    uint64_t bits = Next();
    int sum = 0;
    for (int i = 0; i < 8; ++i, bits >>= 8) sum += static_cast<int>(bits & 255);
    return static_cast<float>(sum - 1020) * (1.0f / 209.0f) +
           static_cast<float>(Next() >> 40) * 0x1p-32f;
  }
};

void FillRow(Random& random, absl::Span<float> logits, SampleRow* row) {
  const int vocab = static_cast<int>(logits.size());
  const float sigma = static_cast<float>(std::exp2(6.0 * random.Uniform() - 2.0));  // 0.25 to 16
  const float mean = random.Below(3) == 0 ? 20.0f * random.Normal() : 0.0f;
  const int kind = random.Below(10);
  for (float& logit : logits) {
    float x = mean + sigma * random.Normal();
    if (kind == 0) x = std::rint(x);                // many ties, -0 among them
    if (kind == 1) x = std::rint(x * 8.0f) / 8.0f;  // some
    if (kind == 2) x = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffff0000u);  // bf16
    if (kind == 3) x = mean;                                                            // all equal
    if (kind == 4) x *= std::exp2(-static_cast<float>(random.Below(40)));  // most near 0
    logit = x;
  }
  if (random.Below(200) == 0) {
    const float bad[] = {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY};
    logits[random.Below(vocab)] = bad[random.Below(3)];
  }
  row->seed = random.Next();
  row->position = static_cast<int64_t>(random.Next() >> 20);
  row->sample_index = random.Below(4);
  row->temperature = 0.0f;
  if (random.Below(10) != 0) row->temperature = static_cast<float>(0.01 + 1.99 * random.Uniform());
  if (random.Below(10) == 0) row->temperature = 1.0f;
  if (random.Below(100) == 0) row->temperature = 1e-30f;
  row->top_p = random.Below(2) == 0 ? 1.0f : static_cast<float>(0.001 + 0.999 * random.Uniform());
  row->top_k = 0;
  if (random.Below(2) == 0)
    row->top_k = 1 + random.Below(random.Below(2) == 0 ? 64 : vocab + vocab / 4);
  row->min_p =
      random.Below(3) != 0 ? 0.0f : static_cast<float>(std::pow(10.0, -4.0 * random.Uniform()));
}

Batch RandomBatch(uint64_t seed, int rows, int vocab_size) {
  Batch batch;
  batch.vocab_size = vocab_size;
  batch.logits.resize(size_t(rows) * vocab_size);
  batch.rows.resize(rows);
  Random random{seed};
  std::vector<Random> randoms;
  for (SampleRow& row : batch.rows) {
    row.suppressed_begin = static_cast<int32_t>(batch.suppressed.size());
    if (random.Below(5) == 0) {
      for (int n = 1 + random.Below(8); n > 0; --n)
        batch.suppressed.push_back(random.Below(vocab_size));
    }
    row.suppressed_end = static_cast<int32_t>(batch.suppressed.size());
    randoms.push_back({random.Next()});
  }
  std::atomic<int> next = 0;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    threads.emplace_back([&] {
      for (int i; (i = next++) < rows;) {
        FillRow(randoms[i],
                absl::MakeSpan(batch.logits).subspan(size_t(i) * vocab_size, vocab_size),
                &batch.rows[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return batch;
}

std::vector<int32_t> SampleOnGpu(const Batch& batch) {
  DeviceArray<float> logits(batch.logits);
  DeviceArray<SampleRow> rows(batch.rows);
  DeviceArray<int32_t> suppressed(batch.suppressed), sampled(batch.rows.size());
  DeviceArray<std::byte> workspace(SamplerWorkspaceBytes(batch.size(), batch.vocab_size));
  EXPECT_EQ(SampleTokens({.logits = logits.get(),
                          .num_rows = batch.size(),
                          .vocab_size = batch.vocab_size,
                          .rows = rows.get(),
                          .suppressed = suppressed.get(),
                          .workspace = workspace.get(),
                          .sampled = sampled.get()},
                         nullptr),
            cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  return sampled.Get();
}

int32_t SampleOnCpu(Sampler& sampler, const Batch& batch, int i) {
  const SampleRow& row = batch.rows[i];
  std::vector<float> logits(batch.row(i).begin(), batch.row(i).end());
  const auto token =
      sampler.Sample(absl::MakeSpan(logits),
                     absl::MakeConstSpan(batch.suppressed)
                         .subspan(row.suppressed_begin, row.suppressed_end - row.suppressed_begin),
                     Params(row), row.position);
  if (token.ok()) return *token;
  return token.status().code() == absl::StatusCode::kInternal ? kNotFinite : kAllSuppressed;
}

// The definition, slowly, with the three numbers that a comparison of sums can fall either way by.
int32_t Definition(const Batch& batch, int i, double draw_shift, double top_p_shift,
                   double min_p_factor) {
  const SampleRow& row = batch.rows[i];
  std::vector<float> logits(batch.row(i).begin(), batch.row(i).end());
  for (int s = row.suppressed_begin; s < row.suppressed_end; ++s)
    logits[batch.suppressed[s]] = -INFINITY;
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  const double largest = logits[order[0]], temperature = row.temperature;
  const auto weight = [&](int id) { return std::exp((logits[id] - largest) / temperature); };
  size_t kept = 0;
  while (kept < order.size() && logits[order[kept]] >= largest - 45.0 * temperature) ++kept;
  if (row.top_k > 0) kept = std::min(kept, size_t(row.top_k));
  order.resize(kept);
  if (row.top_p < 1.0f) {
    double total = 0.0, running = 0.0;
    for (int id : order) total += weight(id);
    for (kept = 0; kept < order.size();) {
      running += weight(order[kept++]);
      if (running >= (row.top_p + top_p_shift) * total) break;
    }
    order.resize(kept);
  }
  std::erase_if(order, [&](int id) { return weight(id) < row.min_p * min_p_factor; });
  std::sort(order.begin(), order.end());
  double sum = 0.0, running = 0.0;
  for (int id : order) sum += weight(id);
  const double target = (UniformDraw(row.seed, row.sample_index, row.position) + draw_shift) * sum;
  for (int id : order) {
    running += weight(id);
    if (running > target) return id;
  }
  return order.back();
}

bool IsTie(const Batch& batch, int i, int32_t token) {
  if (token < 0 || batch.rows[i].temperature == 0.0f) return false;
  constexpr double kTie = 1e-5;
  for (double draw : {0.0, -kTie, kTie}) {
    for (double top_p : {0.0, -kTie, kTie}) {
      for (double min_p : {1.0, 1.0 - kTie, 1.0 + kTie}) {
        if (Definition(batch, i, draw, top_p, min_p) == token) return true;
      }
    }
  }
  return false;
}

// Draws every row on both sides; returns how many differ, each of which must be a tie.
int CountDifferences(const Batch& batch) {
  const std::vector<int32_t> on_gpu = SampleOnGpu(batch);
  std::atomic<int> next = 0, different = 0, wrong = 0;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t) {
    threads.emplace_back([&] {
      Sampler sampler;
      for (int i; (i = next++) < batch.size();) {
        const int32_t on_cpu = SampleOnCpu(sampler, batch, i);
        if (on_gpu[i] == on_cpu) continue;
        ++different;
        if (IsTie(batch, i, on_gpu[i]) || wrong++ >= 10) continue;
        const SampleRow& row = batch.rows[i];
        ADD_FAILURE() << "row " << i << " of vocabulary " << batch.vocab_size << ": GPU "
                      << on_gpu[i] << ", CPU " << on_cpu << "; temperature " << row.temperature
                      << " top_k " << row.top_k << " top_p " << row.top_p << " min_p " << row.min_p
                      << " suppressed " << row.suppressed_end - row.suppressed_begin;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  return different;
}

class GpuSamplerTest : public DeviceTest {};

TEST_F(GpuSamplerTest, AMillionRowsAreTheCpus) {
  // Odd vocabularies, and such that a block of a row has nothing; the demo model's.
  const int vocabularies[] = {512, 4096, 1000, 1021, 777, 2048, 600, 3333};
  constexpr int kRows = 15625, kBatches = 64;
  int different = 0;
  for (int b = 0; b < kBatches && !HasFailure(); ++b) {
    different +=
        CountDifferences(RandomBatch(1000 + b, kRows, vocabularies[b % std::size(vocabularies)]));
  }
  RecordProperty("different", different);
  printf("%d of %d draws differ\n", different, kRows * kBatches);
  EXPECT_LE(different, kRows * kBatches / 10000);
}

TEST_F(GpuSamplerTest, DeepSeeksVocabulary) {
  int different = 0;
  for (int b = 0; b < 8 && !HasFailure(); ++b)
    different += CountDifferences(RandomBatch(b, 500, 129280));
  printf("%d of 4000 draws differ\n", different);
  EXPECT_LE(different, 1);
}

TEST_F(GpuSamplerTest, TinyAndOddVocabularies) {
  for (int vocab : {1, 2, 3, 5, 7, 31, 32, 33, 63, 64, 100, 257, 511, 129281, 300000}) {
    const int rows = vocab > 1000 ? 50 : 500;
    EXPECT_LE(CountDifferences(RandomBatch(vocab, rows, vocab)), 1) << vocab;
  }
}

Batch OneRow(std::vector<float> logits, SampleRow row, std::vector<int32_t> suppressed = {}) {
  row.suppressed_end = static_cast<int32_t>(suppressed.size());
  Batch batch;
  batch.vocab_size = static_cast<int>(logits.size());
  batch.logits = std::move(logits);
  batch.rows = {row};
  batch.suppressed = std::move(suppressed);
  return batch;
}

TEST_F(GpuSamplerTest, Errors) {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY}) {
    for (float temperature : {0.0f, 1.0f}) {
      EXPECT_EQ(SampleOnGpu(OneRow({1, 2, bad, 0}, {.temperature = temperature}))[0], kNotFinite);
      EXPECT_EQ(SampleOnGpu(OneRow({1, 2, bad, 0}, {.temperature = temperature}, {2}))[0],
                kNotFinite);
    }
  }
  EXPECT_EQ(SampleOnGpu(OneRow({1, 2}, {.temperature = 1}, {1, 0}))[0], kAllSuppressed);
  EXPECT_EQ(SampleOnGpu(OneRow({1, 2}, {.temperature = 0}, {1, 0}))[0], kAllSuppressed);
  const float lowest = std::numeric_limits<float>::lowest();
  EXPECT_EQ(SampleOnGpu(OneRow({lowest, 2, lowest}, {.temperature = 0}, {1}))[0], 0);
}

TEST_F(GpuSamplerTest, EqualLogitsAreCutByTheirIds) {
  // top_k keeps the lowest ids among equals, across the blocks of a row.
  const std::vector<float> equal(10000, 0.5f);
  for (int top_k : {1, 7, 1250, 1251, 5000, 9999}) {
    int32_t most = 0;
    for (int i = 0; i < 200; ++i) {
      const SampleRow row = {.seed = 3, .position = i, .temperature = 1, .top_k = top_k};
      const int32_t token = SampleOnGpu(OneRow(equal, row))[0];
      ASSERT_LT(token, top_k);
      most = std::max(most, token);
    }
    EXPECT_GE(most, top_k * 9 / 10 - 1);
  }
}

TEST_F(GpuSamplerTest, ARowDoesNotDependOnTheOthers) {
  const Batch batch = RandomBatch(77, 64, 5000);
  const std::vector<int32_t> together = SampleOnGpu(batch);
  EXPECT_EQ(SampleOnGpu(batch), together);
  for (int i = 0; i < batch.size(); ++i) {
    Batch alone = batch;
    alone.logits.assign(batch.row(i).begin(), batch.row(i).end());
    alone.rows = {batch.rows[i]};
    EXPECT_EQ(SampleOnGpu(alone)[0], together[i]) << i;
  }
}

TEST_F(GpuSamplerTest, BadArgumentsAreRefused) {
  EXPECT_EQ(SampleTokens({.num_rows = -1, .vocab_size = 10}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SampleTokens({.num_rows = 1, .vocab_size = 0}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SampleTokens({.num_rows = 1, .vocab_size = 10}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SampleTokens({.num_rows = 0, .vocab_size = 10}, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace latentd
