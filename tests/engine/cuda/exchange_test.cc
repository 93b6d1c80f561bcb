// The kernels of the exchange against plain loops: any division of the experts, odd sizes, ranks
// without tokens, bytes that make no sense.

#include "engine/cuda/kernels/exchange.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

// The slots of a group, as bytes: ids, then weights, then FP8 rows and their scales.
struct Slots {
  int num_ranks, rows, k, hidden;
  size_t weights_at, x_at, scales_at, bytes;
  int64_t scale_stride;
  std::vector<uint8_t> data;

  Slots(int num_ranks, int rows, int k, int hidden)
      : num_ranks(num_ranks), rows(rows), k(k), hidden(hidden) {
    const auto aligned = [](size_t size) { return (size + 255) / 256 * 256; };
    scale_stride = (rows + 3) / 4 * 4;
    weights_at = aligned(size_t(rows) * k * 4);
    x_at = weights_at + aligned(size_t(rows) * k * 4);
    scales_at = x_at + aligned(size_t(rows) * hidden);
    bytes = scales_at + aligned(hidden / kQuantGroup * scale_stride * 4);
    data.assign(bytes * num_ranks, 0xff);
  }
  int tokens() const { return num_ranks * rows; }
  int32_t* ids(int token) {
    return reinterpret_cast<int32_t*>(&data[token / rows * bytes]) + token % rows * k;
  }
  float* weights(int token) {
    return reinterpret_cast<float*>(&data[token / rows * bytes + weights_at]) + token % rows * k;
  }
  RankSlots OnDevice(const DeviceArray<uint8_t>& device) const {
    return {.num_ranks = num_ranks,
            .rows = rows,
            .slot_bytes = static_cast<int64_t>(bytes),
            .topk_ids = reinterpret_cast<const int32_t*>(device.get()),
            .weights = reinterpret_cast<const float*>(device.get() + weights_at)};
  }
};

// Each rank has real[r] tokens that choose k of `experts`.
Slots RandomSlots(int num_ranks, int rows, int k, int experts, const std::vector<int>& real,
                  uint32_t seed, int hidden = 128) {
  Slots slots(num_ranks, rows, k, hidden);
  std::mt19937 random(seed);
  std::vector<int32_t> all(experts);
  for (int e = 0; e < experts; ++e) all[e] = e;
  for (int t = 0; t < slots.tokens(); ++t) {
    std::shuffle(all.begin(), all.end(), random);
    const bool padding = t % rows >= real[t / rows];
    for (int j = 0; j < k; ++j) {
      slots.ids(t)[j] = padding ? -1 : all[j];
      slots.weights(t)[j] = padding ? 0.0f : static_cast<float>(random() % 1000) / 500.0f;
    }
  }
  return slots;
}

struct Routed {
  std::vector<int32_t> row_of, token_of_row, group_offsets;
};

// As kernels/moe.h and kernels/exchange.h say it.
Routed Expected(Slots& slots, int own_rank, int num_real, int first, int count, int shared,
                int max_rows) {
  Routed routed;
  const int choices = slots.k + shared;
  routed.row_of.assign(size_t(slots.tokens()) * choices, -1);
  routed.token_of_row.assign(max_rows, -1);
  routed.group_offsets = {0};
  int rows = 0;
  for (int g = 0; g < count + shared; ++g) {
    for (int t = 0; t < slots.tokens(); ++t) {
      const int own = t - own_rank * slots.rows;
      for (int j = 0; j < choices; ++j) {
        const bool here = g < count ? j < slots.k && slots.ids(t)[j] == first + g
                                    : j - slots.k == g - count && own >= 0 && own < num_real;
        if (!here) continue;
        routed.row_of[size_t(t) * choices + j] = rows;
        routed.token_of_row[rows++] = t;
      }
    }
    routed.group_offsets.push_back(rows);
  }
  return routed;
}

Routed RouteOnGpu(const Slots& slots, int own_rank, int num_real, int first, int count, int shared,
                  int max_rows) {
  const int choices = slots.k + shared;
  DeviceArray<uint8_t> data(slots.data);
  DeviceArray<int32_t> real(std::vector<int32_t>{num_real}),
      row_of(size_t(slots.tokens()) * choices), token_of_row(max_rows), offsets(count + shared + 1);
  const RouteSlotsArgs args = {.slots = slots.OnDevice(data),
                               .own_rank = own_rank,
                               .num_real_tokens = real.get(),
                               .num_experts_per_tok = slots.k,
                               .first_expert = first,
                               .num_local_experts = count,
                               .num_shared = shared,
                               .max_rows = max_rows,
                               .routing = {.num_choices = choices,
                                           .row_of = row_of.get(),
                                           .token_of_row = token_of_row.get(),
                                           .group_offsets = offsets.get()}};
  EXPECT_EQ(RouteSlots(args, nullptr), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  return {row_of.Get(), token_of_row.Get(), offsets.Get()};
}

class ExchangeTest : public DeviceTest {};

TEST_F(ExchangeTest, EachRankHasTheRowsOfItsExperts) {
  struct Case {
    int experts, k, shared;
  };
  uint32_t seed = 1;
  for (const Case& c : {Case{256, 8, 1}, Case{16, 4, 1}, Case{33, 7, 2}, Case{384, 8, 0}}) {
    for (const int num_ranks : {1, 2, 3, 16, 40}) {
      for (const int rows : {1, 4, 5, 33, 64, 200}) {
        if (num_ranks * rows > 4096) continue;
        std::vector<int> real(num_ranks);
        for (int r = 0; r < num_ranks; ++r) real[r] = (r * 7 + 3) % (rows + 1);  // 0 too
        Slots slots = RandomSlots(num_ranks, rows, c.k, c.experts, real, ++seed);
        for (const int rank : {0, num_ranks / 2, num_ranks - 1}) {
          SCOPED_TRACE(testing::Message() << c.experts << " experts, rank " << rank << " of "
                                          << num_ranks << ", rows " << rows);
          const int count = c.experts / num_ranks + (rank < c.experts % num_ranks);
          const int first = rank * (c.experts / num_ranks) + std::min(rank, c.experts % num_ranks);
          const int max_rows = slots.tokens() * std::min(c.k, std::max(count, 1)) + rows * c.shared;
          const Routed expected =
              Expected(slots, rank, real[rank], first, count, c.shared, max_rows);
          const Routed actual =
              RouteOnGpu(slots, rank, real[rank], first, count, c.shared, max_rows);
          EXPECT_EQ(actual.row_of, expected.row_of);
          EXPECT_EQ(actual.token_of_row, expected.token_of_row);
          EXPECT_EQ(actual.group_offsets, expected.group_offsets);
          if (HasFailure()) return;
        }
      }
    }
  }
}

// What is left of an exchange that was broken off.
TEST_F(ExchangeTest, AnyBytesStayInsideTheArrays) {
  constexpr int kRanks = 4, kRows = 50, kChoices = 8, kHidden = 256, kExperts = 16;
  std::mt19937 random(7);
  for (int round = 0; round < 4; ++round) {
    Slots slots(kRanks, kRows, kChoices, kHidden);
    for (uint8_t& byte : slots.data) byte = static_cast<uint8_t>(random());
    if (round > 0) {
      for (int t = 0; t < slots.tokens(); ++t) {  // ids there are, but any, and all the same
        for (int j = 0; j < kChoices; ++j)
          slots.ids(t)[j] = round == 1 ? static_cast<int32_t>(random() % kExperts) : 3;
      }
    }
    const int max_rows = round == 3 ? 100 : 700;
    DeviceArray<uint8_t> data(slots.data), out(size_t(max_rows) * kHidden);
    DeviceArray<float> scales(size_t(kHidden / kQuantGroup) * max_rows);
    DeviceArray<int32_t> real(std::vector<int32_t>{1 << 30}),
        row_of(size_t(slots.tokens()) * (kChoices + 1)), token_of_row(max_rows), offsets(6);
    RouteSlotsArgs args = {.slots = slots.OnDevice(data),
                           .own_rank = 1,
                           .num_real_tokens = real.get(),
                           .num_experts_per_tok = kChoices,
                           .first_expert = 3,
                           .num_local_experts = 4,
                           .num_shared = 1,
                           .max_rows = max_rows,
                           .routing = {.num_choices = kChoices + 1,
                                       .row_of = row_of.get(),
                                       .token_of_row = token_of_row.get(),
                                       .group_offsets = offsets.get()}};
    ASSERT_CUDA_OK(RouteSlots(args, nullptr));
    for (const int32_t row : row_of.Get()) {
      EXPECT_GE(row, -1);
      EXPECT_LT(row, max_rows);
    }
    const std::vector<int32_t> ends = offsets.Get();
    EXPECT_TRUE(std::is_sorted(ends.begin(), ends.end()));
    EXPECT_LE(ends.back(), max_rows);
    const GatherArgs gather = {
        .routing = args.routing,
        .num_groups = 5,
        .max_rows = max_rows,
        .hidden_size = kHidden,
        .x = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(data.get() + slots.x_at),
                      reinterpret_cast<float*>(data.get() + slots.scales_at), slots.scale_stride}},
        .out = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(out.get()), scales.get(), max_rows}},
        .num_ranks = kRanks,
        .rank_rows = kRows,
        .slot_bytes = static_cast<int64_t>(slots.bytes)};
    ASSERT_CUDA_OK(GatherRows(gather, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
  }
}

TEST_F(ExchangeTest, RowsAreGatheredFromTheirSlots) {
  for (const int rows : {1, 6, 64}) {
    constexpr int kRanks = 5, kHidden = 384;
    Slots slots(kRanks, rows, 2, kHidden);
    std::mt19937 random(rows);
    for (uint8_t& byte : slots.data) byte = static_cast<uint8_t>(random());
    const int max_rows = 3 * slots.tokens() + 4, num_rows = max_rows - 3;
    std::vector<int32_t> token_of_row(max_rows);
    for (int32_t& token : token_of_row) token = static_cast<int32_t>(random() % slots.tokens());
    DeviceArray<uint8_t> data(slots.data), out(size_t(max_rows) * kHidden);
    const int64_t stride = (max_rows + 3) / 4 * 4;
    DeviceArray<float> scales(kHidden / kQuantGroup * stride);
    DeviceArray<int32_t> map(token_of_row), offsets(std::vector<int32_t>{0, num_rows});
    const GatherArgs args = {
        .routing = {.token_of_row = map.get(), .group_offsets = offsets.get()},
        .num_groups = 1,
        .max_rows = max_rows,
        .hidden_size = kHidden,
        .x = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(data.get() + slots.x_at),
                      reinterpret_cast<float*>(data.get() + slots.scales_at), slots.scale_stride}},
        .out = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(out.get()), scales.get(), stride}},
        .num_ranks = kRanks,
        .rank_rows = rows,
        .slot_bytes = static_cast<int64_t>(slots.bytes)};
    ASSERT_CUDA_OK(GatherRows(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
    const std::vector<uint8_t> got = out.Get();
    const std::vector<float> got_scales = scales.Get();
    for (int row = 0; row < num_rows; ++row) {
      const int token = token_of_row[row];
      const uint8_t* slot = &slots.data[token / rows * slots.bytes];
      ASSERT_EQ(std::memcmp(&got[size_t(row) * kHidden],
                            slot + slots.x_at + size_t(token % rows) * kHidden, kHidden),
                0)
          << row;
      for (int g = 0; g < kHidden / kQuantGroup; ++g) {
        ASSERT_EQ(std::memcmp(&got_scales[g * stride + row],
                              slot + slots.scales_at +
                                  (g * slots.scale_stride + token % rows) * sizeof(float),
                              sizeof(float)),
                  0)
            << row << " " << g;
      }
    }
    EXPECT_EQ(got[size_t(num_rows) * kHidden], 0xff) << "beyond the last row";
  }
}

std::vector<__nv_bfloat16> RandomBf16(std::mt19937& random, size_t size) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<__nv_bfloat16> values(size);
  for (__nv_bfloat16& value : values) value = __float2bfloat16(normal(random));
  return values;
}

bool SameBf16(__nv_bfloat16 a, __nv_bfloat16 b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

TEST_F(ExchangeTest, SumsAreThoseOfTheExpertsHere) {
  for (const int hidden : {8, 128, 7168}) {
    constexpr int kRanks = 3, kRows = 21, kExperts = 12, kTopK = 5, kShared = 2;
    Slots slots = RandomSlots(kRanks, kRows, kTopK, kExperts, {21, 0, 13}, 3);
    const int own = 2, max_rows = slots.tokens() * 4 + kRows * kShared;
    const Routed routed = Expected(slots, own, 13, 8, 4, kShared, max_rows);
    std::mt19937 random(5);
    const std::vector<__nv_bfloat16> experts = RandomBf16(random, size_t(max_rows) * hidden);
    DeviceArray<uint8_t> data(slots.data);
    DeviceArray<__nv_bfloat16> expert_out(experts), out(size_t(slots.tokens()) * hidden);
    DeviceArray<int32_t> row_of(routed.row_of);
    const SumExpertsArgs args = {
        .slots = slots.OnDevice(data),
        .num_experts_per_tok = kTopK,
        .hidden_size = hidden,
        .expert_out = expert_out.get(),
        .routing = {.num_choices = kTopK + kShared, .row_of = row_of.get()},
        .out = out.get()};
    ASSERT_CUDA_OK(SumExperts(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
    const std::vector<__nv_bfloat16> got = out.Get();
    for (int t = 0; t < slots.tokens(); ++t) {
      for (int c = 0; c < hidden; ++c) {
        float sum = 0.0f;
        for (int j = 0; j < kTopK + kShared; ++j) {
          const int row = routed.row_of[t * (kTopK + kShared) + j];
          if (row < 0) continue;
          const float weight = j < kTopK ? slots.weights(t)[j] : 1.0f;
          sum = std::fma(weight, __bfloat162float(experts[size_t(row) * hidden + c]), sum);
        }
        ASSERT_TRUE(SameBf16(got[size_t(t) * hidden + c], __float2bfloat16(sum)))
            << "token " << t << " column " << c;
      }
    }
  }
}

TEST_F(ExchangeTest, PartsAreAddedInTheirOrder) {
  for (const int num_parts : {1, 2, 16, kMaxSumParts}) {
    constexpr int kCount = 8 * 1237;
    std::mt19937 random(num_parts);
    const std::vector<__nv_bfloat16> values = RandomBf16(random, size_t(num_parts) * kCount);
    DeviceArray<__nv_bfloat16> parts(values), out(kCount);
    SumPartsArgs args;
    args.num_parts = num_parts;
    for (int i = 0; i < num_parts; ++i) args.parts[i] = parts.get() + size_t(i) * kCount;
    args.count = kCount;
    args.out = out.get();
    ASSERT_CUDA_OK(SumParts(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
    const std::vector<__nv_bfloat16> got = out.Get();
    for (int c = 0; c < kCount; ++c) {
      float sum = 0.0f;
      for (int i = 0; i < num_parts; ++i) sum += __bfloat162float(values[size_t(i) * kCount + c]);
      ASSERT_TRUE(SameBf16(got[c], __float2bfloat16(sum))) << c;
    }
  }
}

TEST_F(ExchangeTest, BadArgumentsAreRefused) {
  EXPECT_EQ(RouteSlots({}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SumExperts({}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SumParts({}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace latentd
