#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <thread>

#include "engine/cuda/kernels/mla_decode.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/mla_cache_data.h"

namespace latentd {
namespace {

constexpr int kKeyDim = 576;
constexpr int kValueDim = 512;
constexpr int kBlockKeys = 64;
constexpr int kWildBlocks = 3;  // entries of each block table behind its end

// A step's inputs on the host. Blocks are handed out in random order; what no key was written to is
// NaN.
struct Step {
  int num_heads = 0;
  std::vector<MlaSequence> sequences;
  std::vector<int32_t> blocks, block_begin;
  HostMlaCache cache;
  std::vector<__nv_bfloat16> q;
  float softmax_scale = 0.1352337788608801f;  // 192^-0.5 mscale^2, DeepSeek-V3's

  int num_queries() const {
    int sum = 0;
    for (const MlaSequence& s : sequences) sum += s.num_queries;
    return sum;
  }
  HostMlaCache::Row Key(int sequence, int key) const {
    const int64_t block = blocks[block_begin[sequence] + key / kBlockKeys];
    return cache.Get(block * kBlockKeys + key % kBlockKeys);
  }
};

// Keys differ in size by up to 16 times, and so do the scales of an FP8 cache.
Step MakeStep(CacheFormat format, int num_heads, std::vector<MlaSequence> sequences, uint32_t seed,
              float q_size = 1) {
  Step step;
  step.num_heads = num_heads;
  step.sequences = std::move(sequences);
  std::mt19937 random(seed);
  int num_blocks = 0;
  for (const MlaSequence& s : step.sequences)
    num_blocks += (s.num_keys + kBlockKeys - 1) / kBlockKeys;
  std::vector<int32_t> order(num_blocks + 5);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  step.cache = HostMlaCache(format, static_cast<int64_t>(order.size()));
  // A table of values is fast to draw from.
  std::normal_distribution<float> normal;
  std::vector<float> values(8191);
  for (float& v : values) v = normal(random);
  size_t next = 0;
  for (const MlaSequence& s : step.sequences) {
    step.block_begin.push_back(static_cast<int32_t>(step.blocks.size()));
    for (int key = 0; key < s.num_keys; ++key) {
      if (key % kBlockKeys == 0) step.blocks.push_back(order[next++]);
      const uint32_t offset = random();
      const float size = std::exp2(static_cast<float>(offset >> 28) / 4 - 2);
      HostMlaCache::Row row;
      for (int i = 0; i < kKeyDim; ++i) row[i] = size * values[(offset + i) % values.size()];
      step.cache.Set(int64_t{step.blocks.back()} * kBlockKeys + key % kBlockKeys, row);
    }
    for (int i = 0; i < kWildBlocks; ++i) step.blocks.push_back(0x7fffffff);
  }
  step.q.resize(int64_t{step.num_queries()} * num_heads * kKeyDim);
  for (__nv_bfloat16& v : step.q) {
    v = __float2bfloat16(q_size * values[random() % values.size()]);
  }
  return step;
}

// out [512] of one row, in f64.
std::vector<double> Reference(const Step& step, int sequence, int query, const __nv_bfloat16* q) {
  const MlaSequence& s = step.sequences[sequence];
  const int num_keys = s.num_keys - s.num_queries + query + 1;
  std::vector<float> q32(kKeyDim);
  for (int i = 0; i < kKeyDim; ++i) q32[i] = __bfloat162float(q[i]);
  std::vector<double> scores(num_keys);
  double top = -std::numeric_limits<double>::infinity();
  for (int key = 0; key < num_keys; ++key) {
    const HostMlaCache::Row row = step.Key(sequence, key);
    double sum = 0;
    for (int i = 0; i < kKeyDim; ++i) sum += double{q32[i]} * double{row[i]};
    scores[key] = sum * double{step.softmax_scale};
    top = std::max(top, scores[key]);
  }
  std::vector<double> out(kValueDim);
  double weights = 0;
  for (int key = 0; key < num_keys; ++key) {
    const double weight = std::exp(scores[key] - top);
    weights += weight;
    if (weight < 1e-20) continue;
    const HostMlaCache::Row row = step.Key(sequence, key);
    for (int i = 0; i < kValueDim; ++i) out[i] += weight * double{row[i]};
  }
  for (double& v : out) v /= weights;
  return out;
}

class MlaDecodeTest : public DeviceTest, public testing::WithParamInterface<CacheFormat> {
 protected:
  // out [num_queries, num_heads, 512]
  static std::vector<__nv_bfloat16> Run(const Step& step, bool batch_invariant = false) {
    MlaDecodePlanner::Options options;
    options.num_heads = step.num_heads;
    cudaDeviceGetAttribute(&options.num_sms, cudaDevAttrMultiProcessorCount, 0);
    options.max_sequences = static_cast<int32_t>(step.sequences.size());
    options.max_queries = step.num_queries();
    options.batch_invariant = batch_invariant;
    const MlaDecodePlanner planner(options);
    std::vector<int32_t> words;
    planner.Plan(step.sequences, &words);
    EXPECT_LE(words.size(), planner.plan_capacity());

    DeviceArray<int32_t> plan(words), blocks(step.blocks), block_begin(step.block_begin);
    DeviceArray<__nv_bfloat16> q(step.q);
    DeviceArray<std::byte> cache(step.cache.bytes());
    DeviceArray<std::byte> workspace(planner.workspace_bytes());
    workspace.Zero();
    DeviceArray<__nv_bfloat16> out(int64_t{step.num_queries()} * step.num_heads * kValueDim);
    MlaDecodeArgs args;
    args.q = q.get();
    args.cache = {cache.get(), step.cache.format()};
    args.blocks = blocks.get();
    args.block_begin = block_begin.get();
    args.plan = plan.get();
    args.workspace = workspace.get();
    args.num_heads = step.num_heads;
    args.softmax_scale = step.softmax_scale;
    args.out = out.get();
    EXPECT_EQ(MlaDecode(args, nullptr), cudaSuccess);
    const cudaError_t error = cudaDeviceSynchronize();
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    return out.Get();
  }

  // Compares up to `max_rows` rows of each sequence, spread over its queries and heads.
  static void Check(const Step& step, const std::vector<__nv_bfloat16>& out, int max_rows = 16) {
    struct Row {
      int sequence, query, head;
      int64_t index;
      double error = 0;
    };
    std::vector<Row> rows;
    int64_t first = 0;
    for (size_t s = 0; s < step.sequences.size(); ++s) {
      const int count = step.sequences[s].num_queries * step.num_heads;
      if (step.sequences[s].num_keys == 0) {
        for (int64_t i = first * kValueDim; i < (first + count) * kValueDim; ++i) {
          uint16_t bits;
          std::memcpy(&bits, &out[i], sizeof(bits));
          ASSERT_EQ(bits, 0xffff) << "a row of a sequence without keys was written";
        }
      } else {
        const int take = std::min(count, max_rows);
        for (int i = 0; i < take; ++i) {
          const int r = take == 1 ? 0 : static_cast<int>(int64_t{i} * (count - 1) / (take - 1));
          rows.push_back({static_cast<int>(s), r / step.num_heads, r % step.num_heads, first + r});
        }
      }
      first += count;
    }
    std::vector<std::thread> threads;
    const unsigned num_threads = std::max(std::thread::hardware_concurrency(), 1u);
    for (unsigned t = 0; t < num_threads; ++t) {
      threads.emplace_back([&, t] {
        for (size_t i = t; i < rows.size(); i += num_threads) {
          Row& row = rows[i];
          const std::vector<double> want =
              Reference(step, row.sequence, row.query, step.q.data() + row.index * kKeyDim);
          double difference = 0, size = 0;
          for (int c = 0; c < kValueDim; ++c) {
            const double d = double{__bfloat162float(out[row.index * kValueDim + c])} - want[c];
            difference += d * d;
            size += want[c] * want[c];
          }
          row.error = std::sqrt(difference / size);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    // P and the result are rounded to bf16, up to 2^-9 of a value each; seen: up to 4.02e-3.
    double worst = 0;
    int failures = 0;
    for (const Row& row : rows) {
      if (!(row.error < 5e-3) && ++failures <= 8) {
        ADD_FAILURE() << "sequence " << row.sequence << " ("
                      << step.sequences[row.sequence].num_keys << " keys), query " << row.query
                      << ", head " << row.head << ": error " << row.error
                      << " of the row's size, first values "
                      << __bfloat162float(out[row.index * kValueDim]) << " "
                      << __bfloat162float(out[row.index * kValueDim + 1]) << " "
                      << __bfloat162float(out[row.index * kValueDim + 256]);
      }
      worst = std::max(worst, row.error);
    }
    EXPECT_EQ(failures, 0) << "of " << rows.size() << " rows";
    testing::Test::RecordProperty("worst", std::to_string(worst));
    std::printf("    %zu rows, worst error %.2e of a row's size\n", rows.size(), worst);
  }
};

std::vector<MlaSequence> Ragged(int count, int min_keys, int max_keys, int num_queries,
                                uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<MlaSequence> sequences;
  for (int i = 0; i < count; ++i) {
    const int keys = std::uniform_int_distribution<int>(min_keys, max_keys)(random);
    sequences.push_back({num_queries, std::max(keys, num_queries)});
  }
  return sequences;
}

TEST_P(MlaDecodeTest, OneSequenceOfEachLength) {
  for (int num_heads : {128, 16, 4}) {
    for (int num_keys : {1, 63, 64, 65, 1000, 4097}) {
      SCOPED_TRACE(testing::Message() << num_heads << " heads, " << num_keys << " keys");
      const Step step = MakeStep(GetParam(), num_heads, {{1, num_keys}}, num_keys);
      Check(step, Run(step));
    }
  }
}

TEST_P(MlaDecodeTest, SeveralQueriesSeeTheKeysBeforeThem) {
  for (int num_heads : {128, 16, 4}) {
    for (int num_queries : {2, 3, 8}) {
      for (int num_keys : {8, 64, 67, 130, 1000}) {
        SCOPED_TRACE(testing::Message() << num_heads << " heads, " << num_queries << " queries, "
                                        << num_keys << " keys");
        const Step step =
            MakeStep(GetParam(), num_heads,
                     {{num_queries, num_keys}, {1, 100}, {num_queries, num_keys + 1}}, num_keys);
        Check(step, Run(step), 24);
      }
    }
  }
}

TEST_P(MlaDecodeTest, RaggedBatches) {
  for (int num_heads : {128, 16, 4}) {
    SCOPED_TRACE(testing::Message() << num_heads << " heads");
    const Step step = MakeStep(GetParam(), num_heads, Ragged(64, 1, 2000, 1, 7), 7);
    Check(step, Run(step), 4);
    const Step two = MakeStep(GetParam(), num_heads, Ragged(24, 1, 900, 2, 8), 8);
    Check(two, Run(two), 4);
  }
}

TEST_P(MlaDecodeTest, SequencesWithoutKeysAreLeftAlone) {
  const Step step = MakeStep(GetParam(), 128, {{1, 300}, {1, 0}, {1, 65}, {2, 0}}, 3);
  Check(step, Run(step));
  const Step none = MakeStep(GetParam(), 16, {{1, 0}}, 3);
  Check(none, Run(none));
}

TEST_P(MlaDecodeTest, LargeScores) {
  // Scores of some thousands: one key has all the weight, wherever it is.
  const Step step = MakeStep(GetParam(), 128, {{1, 700}, {2, 1500}}, 11, 100);
  Check(step, Run(step), 32);
}

TEST_P(MlaDecodeTest, BatchInvariant) {
  for (int num_heads : {128, 16}) {
    const Step batch = MakeStep(GetParam(), num_heads, Ragged(64, 1, 4097, 1, 5), 5);
    const std::vector<__nv_bfloat16> together = Run(batch, true);
    Check(batch, together, 2);
    const int row = num_heads * kValueDim;
    for (int s : {0, 1, 17, 63}) {
      Step alone = batch;
      alone.sequences = {batch.sequences[s]};
      alone.block_begin = {batch.block_begin[s]};
      alone.q.assign(batch.q.begin() + s * num_heads * kKeyDim,
                     batch.q.begin() + (s + 1) * num_heads * kKeyDim);
      const std::vector<__nv_bfloat16> out = Run(alone, true);
      EXPECT_EQ(
          std::memcmp(out.data(), together.data() + int64_t{s} * row, row * sizeof(__nv_bfloat16)),
          0)
          << "sequence " << s << ", " << num_heads << " heads";
    }
  }
}

TEST_P(MlaDecodeTest, RunsAreEqual) {
  const Step step = MakeStep(GetParam(), 128, Ragged(32, 1, 3000, 1, 9), 9);
  const std::vector<__nv_bfloat16> first = Run(step);
  for (int i = 0; i < 5; ++i) {
    const std::vector<__nv_bfloat16> again = Run(step);
    ASSERT_EQ(std::memcmp(first.data(), again.data(), first.size() * sizeof(first[0])), 0);
  }
}

// Every e4m3 there is, its subnormals apart too: scales are the largest that leave none but those.
TEST_P(MlaDecodeTest, SmallAndLargeLatents) {
  if (GetParam() != CacheFormat::kFp8) GTEST_SKIP() << "of FP8";
  for (const bool subnormal : {false, true}) {
    Step step = MakeStep(GetParam(), 128, {{1, 300}}, 12);
    std::mt19937 random(4);
    for (int key = 0; key < 300; ++key) {
      HostMlaCache::Row row;
      for (int i = 0; i < kKeyDim; ++i) {
        __nv_fp8_e4m3 value;
        value.__x = static_cast<uint8_t>(subnormal ? random() % 8 + random() % 2 * 128
                                                   : random() % 127 + random() % 2 * 128);
        row[i] = static_cast<float>(value) * (subnormal ? 64.f : 1.f / 64);
      }
      const int64_t block = step.blocks[key / kBlockKeys];
      step.cache.Set(block * kBlockKeys + key % kBlockKeys, row, subnormal ? 64.f : 1.f / 64);
    }
    Check(step, Run(step));
  }
}

TEST_P(MlaDecodeTest, ArgumentsAreChecked) {
  EXPECT_EQ(MlaDecode({}, nullptr), cudaErrorInvalidValue);
}

INSTANTIATE_TEST_SUITE_P(, MlaDecodeTest, testing::Values(CacheFormat::kBf16, CacheFormat::kFp8),
                         [](const auto& info) { return FormatName(info.param); });

}  // namespace
}  // namespace latentd
