#include "engine/cuda/mla_prefill_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "engine/cuda/kernels/mla_prefill.h"

namespace latentd {
namespace {

// What the kernels would do with a plan: which key each query of each head meets, in which part.
class Walk {
 public:
  Walk(const MlaPrefill::Options& options, int num_sms,
       const std::vector<MlaPrefillSequence>& sequences, const MlaPrefillPlan& plan)
      : options_(options), num_sms_(num_sms), plan_(plan) {
    for (size_t i = 0; i < sequences.size(); ++i) {
      for (int32_t q = 0; q < sequences[i].num_queries; ++q) {
        rows_.push_back({static_cast<int32_t>(i), q});
      }
    }
    seen_.resize(rows_.size() * options.num_heads);
    for (size_t i = 0; i < seen_.size(); ++i) {
      const auto [sequence, query] = rows_[i / options.num_heads];
      const MlaPrefillSequence& s = sequences[sequence];
      seen_[i].assign(s.num_keys - s.num_queries + query + 1, 0);
    }
    for (const MlaPrefillSequence& s : sequences) block_begins_.push_back(s.block_begin);
    for (const MlaPrefillPart& part : plan.parts) Visit(part);
  }

  // Each visible key of each query once, and no other.
  void ExpectComplete() const {
    for (size_t i = 0; i < seen_.size(); ++i) {
      ASSERT_EQ(std::count(seen_[i].begin(), seen_[i].end(), 1),
                static_cast<int64_t>(seen_[i].size()))
          << "query row " << i / options_.num_heads << " head " << i % options_.num_heads;
    }
  }

 private:
  struct Row {
    int32_t sequence, query;
  };

  void Visit(const MlaPrefillPart& part) {
    const int32_t capacity =
        (options_.expand_tokens + kPrefillTile - 1) / kPrefillTile * kPrefillTile;
    ASSERT_LE(part.num_rows, capacity);
    ASSERT_EQ(part.num_rows % kPrefillTile, 0);
    // Key of each row of the part, and of which table.
    std::vector<std::pair<int32_t, int32_t>> keys(part.num_rows, {-1, -1});
    for (int32_t i = 0; i < part.num_sequences; ++i) {
      const int32_t* at = &plan_.words[part.sequences + 4 * i];
      const PrefillKeys segment = {at[0], at[1], at[2], at[3]};
      ASSERT_EQ(segment.row_begin % kPrefillTile, 0);
      ASSERT_LE(segment.row_begin + segment.num_keys, part.num_rows);
      for (int32_t k = 0; k < segment.num_keys; ++k) {
        ASSERT_EQ(keys[segment.row_begin + k].first, -1);
        keys[segment.row_begin + k] = {segment.block_begin,
                                       part.key_offset + segment.first_key + k};
      }
    }
    const int32_t* begin = &plan_.words[part.work];
    const int32_t* arrays = begin + num_sms_ + 1;
    ASSERT_EQ(begin[0], 0);
    ASSERT_EQ(begin[num_sms_], part.num_work);
    ASSERT_TRUE(std::is_sorted(begin, begin + num_sms_ + 1));
    int32_t least = part.num_work, most = 0;
    for (int sm = 0; sm < num_sms_; ++sm) {
      least = std::min(least, begin[sm + 1] - begin[sm]);
      most = std::max(most, begin[sm + 1] - begin[sm]);
    }
    if (!part.causal) {  // all of its tiles cost the same
      ASSERT_LE(most - least, 1);
    }
    std::set<int32_t> written;
    for (int32_t w = 0; w < part.num_work; ++w) {
      const auto word = [&](int array) { return arrays[array * part.num_work + w]; };
      const int32_t head = word(0), tile = word(1), query_begin = word(2), num_queries = word(3),
                    row_begin = word(4), num_keys = word(5);
      ASSERT_LT(tile * kPrefillTile, num_queries);
      for (int32_t q = tile * kPrefillTile; q < std::min((tile + 1) * kPrefillTile, num_queries);
           ++q) {
        const int32_t row = query_begin + q;
        written.insert(row);
        const int32_t seen = part.causal ? num_keys - num_queries + q + 1 : num_keys;
        for (int32_t k = 0; k < seen; ++k) {
          const auto [table, key] = keys[row_begin + k];
          ASSERT_EQ(table, block_begins_[rows_[row].sequence]);
          std::vector<int>& marks = seen_[row * options_.num_heads + head];
          ASSERT_LT(key, static_cast<int32_t>(marks.size())) << "a key after its query";
          ++marks[key];
        }
      }
    }
    // Its queries are what the part says, and whether they were there before.
    ASSERT_EQ(static_cast<int32_t>(written.size()), part.num_queries);
    ASSERT_EQ(*written.begin(), part.query_begin);
    for (const int32_t row : written) {
      ASSERT_EQ(part.merge, begun_.contains(row));
      ASSERT_FALSE(ended_.contains(row));
      begun_.insert(row);
      if (!part.more) ended_.insert(row);
    }
  }

  const MlaPrefill::Options options_;
  const int num_sms_;
  const MlaPrefillPlan& plan_;
  std::vector<Row> rows_;               // of q
  std::vector<int32_t> block_begins_;   // of the sequences
  std::vector<std::vector<int>> seen_;  // [rows * heads][keys] how often
  std::set<int32_t> begun_, ended_;     // rows with a first, a last part
};

TEST(MlaPrefillPlanTest, EachQueryMeetsEachOfItsKeysOnce) {
  std::mt19937 random(5);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int round = 0; round < 200; ++round) {
    MlaPrefill::Options options;
    options.num_heads = pick(1, 5);
    options.max_sequences = pick(1, 6);
    options.max_queries = pick(options.max_sequences, 500);
    options.expand_tokens = options.max_queries + pick(0, 300);
    const int num_sms = pick(1, 12);
    std::vector<MlaPrefillSequence> sequences;
    int32_t room = options.max_queries;
    while (room > 0 && sequences.size() < static_cast<size_t>(options.max_sequences)) {
      MlaPrefillSequence sequence;
      sequence.num_queries = pick(1, room);
      const int context = pick(0, 2) == 0 ? 0 : pick(0, 4 * options.expand_tokens);
      sequence.num_keys = sequence.num_queries + context;
      sequence.block_begin = static_cast<int32_t>(1000 * sequences.size());
      room -= sequence.num_queries;
      sequences.push_back(sequence);
    }
    MlaPrefillPlan plan;
    const absl::Status status = PlanMlaPrefill(options, num_sms, sequences, &plan);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_LE(plan.words.size(), MaxMlaPrefillWords(options, num_sms));
    const Walk walk(options, num_sms, sequences, plan);
    ASSERT_NO_FATAL_FAILURE(walk.ExpectComplete());
    ASSERT_FALSE(HasFatalFailure()) << "round " << round;
  }
}

// Of 16 tiles whose costs are 3 to 18, no multiprocessor gets more than one tile beyond its share.
TEST(MlaPrefillPlanTest, CausalTilesAreBalanced) {
  const MlaPrefill::Options options = {128, 2048, 1, 2048};
  const int num_sms = 132;
  MlaPrefillPlan plan;
  ASSERT_TRUE(PlanMlaPrefill(options, num_sms, {{{2048, 2048, 0}}}, &plan).ok());
  ASSERT_EQ(plan.parts.size(), 1u);
  const MlaPrefillPart& part = plan.parts[0];
  const int32_t* begin = &plan.words[part.work];
  const int32_t* tile = begin + num_sms + 1 + part.num_work;
  int64_t least = INT64_MAX, most = 0;
  for (int sm = 0; sm < num_sms; ++sm) {
    int64_t cost = 0;
    for (int32_t w = begin[sm]; w < begin[sm + 1]; ++w) cost += 2 + tile[w] + 1;
    least = std::min(least, cost);
    most = std::max(most, cost);
  }
  EXPECT_LE(most - least, 18);
}

TEST(MlaPrefillPlanTest, AContextOfEqualPartsSharesItsWork) {
  const MlaPrefill::Options options = {4, 256, 1, 256};
  MlaPrefillPlan plan;
  ASSERT_TRUE(PlanMlaPrefill(options, 8, {{{256, 256 * 6, 0}}}, &plan).ok());
  ASSERT_EQ(plan.parts.size(), 6u);
  for (size_t i = 2; i < plan.parts.size(); ++i) {
    EXPECT_EQ(plan.parts[i].work, plan.parts[1].work);
    EXPECT_EQ(plan.parts[i].key_offset, static_cast<int32_t>(256 * (i - 1)));
  }
}

TEST(MlaPrefillPlanTest, AbsorbedIsPreferredForFewQueriesAfterMuch) {
  EXPECT_FALSE(PreferAbsorbed(100, 100));
  EXPECT_TRUE(PreferAbsorbed(1, 2));
  EXPECT_TRUE(PreferAbsorbed(128, 2048));
  EXPECT_TRUE(PreferAbsorbed(170, 100'000));
  EXPECT_FALSE(PreferAbsorbed(171, 100'000));
  EXPECT_FALSE(PreferAbsorbed(8192, 131072));
}

}  // namespace
}  // namespace latentd
