#include "engine/cuda/kernels/mla_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "engine/cuda/kernels/mla_decode.h"

namespace latentd {
namespace {

struct Plan {
  MlaPlanHeader header;
  std::vector<std::vector<MlaPlanItem>> workers;
  std::vector<MlaPlanItem> items;
  std::vector<MlaPlanMerge> merges;
};

Plan Decode(const std::vector<int32_t>& words) {
  Plan plan;
  const int32_t* next = words.data();
  std::memcpy(&plan.header, next, sizeof(plan.header));
  next += kMlaHeaderWords;
  plan.items.resize(plan.header.num_items);
  if (!plan.items.empty())
    std::memcpy(static_cast<void*>(plan.items.data()), next,
                plan.items.size() * sizeof(MlaPlanItem));
  next += plan.items.size() * kMlaItemWords;
  plan.merges.resize(plan.header.num_merges);
  if (!plan.merges.empty())
    std::memcpy(static_cast<void*>(plan.merges.data()), next,
                plan.merges.size() * sizeof(MlaPlanMerge));
  next += plan.merges.size() * kMlaMergeWords;
  EXPECT_EQ(next - words.data(), static_cast<ptrdiff_t>(words.size()));
  int reached = 0;
  for (int w = 0; w < plan.header.num_workers; ++w) {
    plan.workers.emplace_back();
    for (int i = w; i >= 0; i = plan.items[i].next, ++reached) {
      if (plan.items[i].block_begin < plan.items[i].block_end)
        plan.workers.back().push_back(plan.items[i]);
    }
  }
  EXPECT_EQ(reached, plan.header.num_items);
  return plan;
}

int UnitRows(int num_heads) { return kMlaTileRows * MlaTilesPerUnit(num_heads); }

// Every block of every unit of rows is some item's once, the parts are merged in order, and nothing
// is beyond what the planner asked room for.
void CheckPlan(const MlaDecodePlanner::Options& options,
               const std::vector<MlaSequence>& sequences) {
  const MlaDecodePlanner planner(options);
  std::vector<int32_t> words;
  planner.Plan(sequences, &words);
  ASSERT_LE(words.size(), planner.plan_capacity());
  const Plan plan = Decode(words);
  const int unit_rows = UnitRows(options.num_heads);
  ASSERT_EQ(plan.header.num_workers,
            std::max(options.num_sms / MlaTilesPerUnit(options.num_heads), 1));
  ASSERT_EQ(planner.workspace_bytes(),
            size_t{kMlaPartBytes} * plan.header.num_slots * (unit_rows / kMlaTileRows));

  std::map<int, std::vector<MlaPlanItem>> by_row;
  std::set<int> slots;
  for (const std::vector<MlaPlanItem>& items : plan.workers) {
    for (const MlaPlanItem& item : items) {
      by_row[item.row].push_back(item);
      if (item.slot < 0) continue;
      ASSERT_LT(item.slot, plan.header.num_slots);
      ASSERT_TRUE(slots.insert(item.slot).second) << "slot " << item.slot << " is used twice";
    }
  }
  // Of a plan whose parts are not merged by those who have them.
  std::map<int, MlaPlanMerge> merges;
  for (const MlaPlanMerge& merge : plan.merges) {
    ASSERT_TRUE(merges.emplace(merge.row, merge).second) << "row " << merge.row << ", twice";
  }
  int row = 0;
  size_t units = 0, merged = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const int rows = sequences[s].num_queries * options.num_heads;
    if (sequences[s].num_keys > 0) {
      for (int first = 0; first < rows; first += unit_rows, ++units) {
        const int num_rows = std::min(unit_rows, rows - first);
        const int last_query = (first + num_rows - 1) / options.num_heads;
        const int num_keys = sequences[s].num_keys - sequences[s].num_queries + last_query + 1;
        std::vector<MlaPlanItem>& items = by_row[row + first];
        std::sort(items.begin(), items.end(), [](const MlaPlanItem& a, const MlaPlanItem& b) {
          return a.block_begin < b.block_begin;
        });
        int block = 0;
        for (const MlaPlanItem& item : items) {
          ASSERT_EQ(item.sequence, static_cast<int>(s));
          ASSERT_EQ(item.sequence_row, first);
          ASSERT_EQ(item.num_rows, num_rows);
          ASSERT_EQ(item.first_limit, sequences[s].num_keys - sequences[s].num_queries + 1);
          ASSERT_EQ(item.num_keys, num_keys);
          ASSERT_EQ(item.block_begin, block);
          ASSERT_GT(item.block_end, block);
          block = item.block_end;
        }
        ASSERT_EQ(block, (num_keys + kMlaBlockKeys - 1) / kMlaBlockKeys);
        if (items.size() == 1) {
          ASSERT_EQ(items[0].slot, -1);
          continue;
        }
        const int num_parts = static_cast<int>(items.size());
        for (int i = 0; i < num_parts; ++i) {
          ASSERT_EQ(items[i].slot, items[0].slot + i);
          ASSERT_EQ(items[i].part, i);
          ASSERT_EQ(items[i].num_parts, merges.empty() ? num_parts : 0);
        }
        if (merges.empty()) continue;
        ++merged;
        ASSERT_EQ(merges.count(row + first), 1u);
        const MlaPlanMerge& merge = merges[row + first];
        ASSERT_EQ(merge.num_rows, num_rows);
        ASSERT_EQ(merge.first_slot, items[0].slot);
        ASSERT_EQ(merge.num_parts, num_parts);
        ASSERT_LE(items.size(), size_t{kMlaMaxParts});
      }
    }
    row += rows;
  }
  ASSERT_EQ(by_row.size(), units);
  ASSERT_EQ(merges.size(), merged);
}

std::vector<MlaSequence> Draw(std::mt19937& random, int max_sequences, int max_queries,
                              int max_keys) {
  const int count = std::uniform_int_distribution<int>(0, max_sequences)(random);
  std::vector<MlaSequence> sequences;
  for (int i = 0; i < count; ++i) {
    MlaSequence sequence;
    sequence.num_queries = std::uniform_int_distribution<int>(1, max_queries)(random);
    if (random() % 8 != 0) {
      sequence.num_keys = std::uniform_int_distribution<int>(
          sequence.num_queries,
          std::max<int>(sequence.num_queries, 1 + random() % max_keys))(random);
    }
    sequences.push_back(sequence);
  }
  return sequences;
}

TEST(MlaPlanTest, EveryBlockIsAttendedOnce) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    MlaDecodePlanner::Options options;
    options.num_heads = std::vector<int>{128, 64, 16, 4, 1, 256, 96}[random() % 7];
    options.num_sms = std::vector<int>{132, 1, 2, 7, 114}[random() % 5];
    options.batch_invariant = random() % 2 == 0;
    const std::vector<MlaSequence> sequences =
        Draw(random, 1 + random() % 80, 1 + random() % 8, 1 + random() % 20000);
    options.max_sequences = static_cast<int32_t>(sequences.size());
    for (const MlaSequence& s : sequences) options.max_queries += s.num_queries;
    SCOPED_TRACE(testing::Message()
                 << "round " << round << ": " << options.num_heads << " heads, " << options.num_sms
                 << " SMs, " << sequences.size() << " sequences");
    CheckPlan(options, sequences);
    if (HasFatalFailure()) return;
  }
}

// Blocks of the worker with the most to do.
int MostBlocks(const Plan& plan) {
  int most = 0;
  for (const std::vector<MlaPlanItem>& items : plan.workers) {
    int blocks = 0;
    for (const MlaPlanItem& item : items) blocks += item.block_end - item.block_begin;
    most = std::max(most, blocks);
  }
  return most;
}

TEST(MlaPlanTest, WorkersGetEqualShares) {
  std::mt19937 random(2);
  for (int round = 0; round < 200; ++round) {
    MlaDecodePlanner::Options options;
    options.num_heads = 128;
    options.num_sms = 132;
    options.max_sequences = options.max_queries = 64;
    std::vector<MlaSequence> sequences;
    int blocks = 0;
    for (int i = 0; i < 64; ++i) {
      const int keys = std::uniform_int_distribution<int>(256, 4096)(random);
      sequences.push_back({1, keys});
      blocks += (keys + kMlaBlockKeys - 1) / kMlaBlockKeys;
    }
    std::vector<int32_t> words;
    MlaDecodePlanner(options).Plan(sequences, &words);
    EXPECT_LE(MostBlocks(Decode(words)), blocks / 66 + 8) << "of " << blocks;
  }
}

TEST(MlaPlanTest, AFewSequencesUseTheWholeGpu) {
  for (int count : {1, 2, 4, 8, 32}) {
    MlaDecodePlanner::Options options;
    options.num_heads = 128;
    options.num_sms = 132;
    options.max_sequences = options.max_queries = count;
    std::vector<int32_t> words;
    MlaDecodePlanner(options).Plan(std::vector<MlaSequence>(count, {1, 8192}), &words);
    const int blocks = count * 8192 / kMlaBlockKeys;
    EXPECT_LE(MostBlocks(Decode(words)), (blocks + 65) / 66 + 2) << count << " sequences";
  }
}

TEST(MlaPlanTest, BatchInvariantPartsAreTheSequencesOwn) {
  std::mt19937 random(3);
  MlaDecodePlanner::Options options;
  options.num_heads = 128;
  options.num_sms = 132;
  options.max_sequences = options.max_queries = 65;
  options.batch_invariant = true;
  const MlaDecodePlanner planner(options);
  const auto parts = [&](const std::vector<MlaSequence>& sequences, int sequence) {
    std::vector<int32_t> words;
    planner.Plan(sequences, &words);
    std::vector<std::pair<int, int>> found;
    for (const std::vector<MlaPlanItem>& items : Decode(words).workers) {
      for (const MlaPlanItem& item : items) {
        if (item.sequence == sequence) found.emplace_back(item.block_begin, item.block_end);
      }
    }
    std::sort(found.begin(), found.end());
    return found;
  };
  for (int round = 0; round < 100; ++round) {
    std::vector<MlaSequence> others = Draw(random, 64, 1, 8192);
    const MlaSequence one = {1, std::uniform_int_distribution<int>(1, 100000)(random)};
    const auto alone = parts({one}, 0);
    others.push_back(one);
    EXPECT_EQ(parts(others, static_cast<int>(others.size()) - 1), alone);
  }
}

TEST(MlaPlanTest, AnEmptyStep) {
  MlaDecodePlanner::Options options;
  options.num_heads = 128;
  options.num_sms = 132;
  options.max_sequences = options.max_queries = 4;
  CheckPlan(options, {});
  CheckPlan(options, {{1, 0}, {2, 0}});
}

}  // namespace
}  // namespace latentd
