#include "engine/cuda/mla_prefill_plan.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/cuda/kernels/mla_prefill.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int kWordsOfKeys = sizeof(PrefillKeys) / sizeof(int32_t);
constexpr int kWordsOfWork = 6;  // arrays of PrefillWork, `begin` aside

int32_t NumTiles(int64_t count) {
  return static_cast<int32_t>((count + kPrefillTile - 1) / kPrefillTile);
}

// Queries of a sequence and the keys of it that a part holds.
struct Segment {
  int32_t query_begin = 0, num_queries = 0;
  PrefillKeys keys;
};

// A tile of queries of a segment, without its head.
struct Tile {
  int32_t segment = 0;
  int32_t index = 0;
  int64_t cost = 0;  // in keys; a tile's fixed cost is that of 256
};

std::vector<Tile> MakeTiles(absl::Span<const Segment> segments, bool causal) {
  std::vector<Tile> tiles;
  for (size_t s = 0; s < segments.size(); ++s) {
    const Segment& segment = segments[s];
    for (int32_t i = 0; i < NumTiles(segment.num_queries); ++i) {
      const int64_t unseen = causal ? std::max(segment.num_queries - (i + 1) * kPrefillTile, 0) : 0;
      tiles.push_back(
          {static_cast<int32_t>(s), i, 2 * kPrefillTile + segment.keys.num_keys - unseen});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
  return tiles;
}

class Planner {
 public:
  Planner(const MlaPrefill::Options& options, int num_sms, MlaPrefillPlan* plan)
      : options_(options), num_sms_(num_sms), plan_(*plan) {}

  void AddPacked(absl::Span<const Segment> segments);
  void AddLong(const Segment& all);

 private:
  void AddSegments(absl::Span<const Segment> segments, MlaPrefillPart* part);
  void AddWork(absl::Span<const Segment> segments, MlaPrefillPart* part);

  const MlaPrefill::Options& options_;
  const int num_sms_;
  MlaPrefillPlan& plan_;
};

void Planner::AddPacked(absl::Span<const Segment> segments) {
  if (segments.empty()) return;
  MlaPrefillPart part;
  part.causal = true;
  AddSegments(segments, &part);
  plan_.parts.push_back(part);
}

void Planner::AddLong(const Segment& all) {
  // Full parts of the context and a last one that holds all of the chunk: the kernel's causal mask
  // is that of queries whose last one sees the last key.
  const int32_t size = MlaPrefillPartRows(options_);
  const int32_t num_keys = all.keys.num_keys;
  int32_t last = (num_keys - 1) % size + 1;
  if (last < all.num_queries) last = all.num_queries;
  const int32_t context = num_keys - last;

  Segment segment = all;
  segment.keys.first_key = context;
  segment.keys.num_keys = last;
  MlaPrefillPart part;
  part.causal = true;
  part.more = true;
  AddSegments({&segment, 1}, &part);
  plan_.parts.push_back(part);

  // Parts of equal size share their words.
  part = {};
  for (int32_t begin = 0; begin < context; begin += size) {
    const int32_t count = std::min(size, context - begin);
    if (begin == 0 || count != segment.keys.num_keys) {
      segment.keys.first_key = 0;
      segment.keys.num_keys = count;
      AddSegments({&segment, 1}, &part);
    }
    part.merge = true;
    part.key_offset = begin;
    part.more = begin + count < context;
    plan_.parts.push_back(part);
  }
}

void Planner::AddSegments(absl::Span<const Segment> segments, MlaPrefillPart* part) {
  std::vector<int32_t>& words = plan_.words;
  part->sequences = words.size();
  part->num_sequences = static_cast<int32_t>(segments.size());
  for (const Segment& segment : segments) {
    const PrefillKeys& keys = segment.keys;
    words.insert(words.end(), {keys.row_begin, keys.num_keys, keys.block_begin, keys.first_key});
  }
  const Segment& last = segments.back();
  part->num_rows = last.keys.row_begin + NumTiles(last.keys.num_keys) * kPrefillTile;
  part->query_begin = segments.front().query_begin;
  part->num_queries = last.query_begin + last.num_queries - part->query_begin;
  AddWork(segments, part);
}

// The longest tiles first, each to the multiprocessor that would be free first; heads one after the
// other, so that those under way share keys in the L2 cache.
void Planner::AddWork(absl::Span<const Segment> segments, MlaPrefillPart* part) {
  const std::vector<Tile> tiles = MakeTiles(segments, part->causal);
  part->num_work = static_cast<int32_t>(tiles.size()) * options_.num_heads;
  // Loads of the multiprocessors, as a heap with the least on top: cost, then index.
  std::vector<std::pair<int64_t, int32_t>> loads;
  for (int32_t sm = 0; sm < num_sms_; ++sm) loads.emplace_back(0, sm);
  std::vector<int32_t> sm_of_work;
  sm_of_work.reserve(part->num_work);
  std::vector<int32_t> next(num_sms_ + 1, 0);  // counts, then where each one's next work goes
  for (int32_t head = 0; head < options_.num_heads; ++head) {
    for (const Tile& tile : tiles) {
      std::pop_heap(loads.begin(), loads.end(), std::greater<>());
      auto& [load, sm] = loads.back();
      load += tile.cost;
      sm_of_work.push_back(sm);
      ++next[sm + 1];
      std::push_heap(loads.begin(), loads.end(), std::greater<>());
    }
  }
  std::partial_sum(next.begin(), next.end(), next.begin());

  part->work = plan_.words.size();
  plan_.words.resize(part->work + next.size() + size_t{kWordsOfWork} * part->num_work);
  int32_t* arrays = std::copy(next.begin(), next.end(), plan_.words.data() + part->work);
  for (int32_t i = 0; i < part->num_work; ++i) {
    const Tile& tile = tiles[i % tiles.size()];
    const Segment& segment = segments[tile.segment];
    int32_t* at = arrays + next[sm_of_work[i]]++;
    for (const int32_t word :
         {static_cast<int32_t>(i / tiles.size()), tile.index, segment.query_begin,
          segment.num_queries, segment.keys.row_begin, segment.keys.num_keys}) {
      *at = word;
      at += part->num_work;
    }
  }
}

absl::Status Check(const MlaPrefill::Options& options,
                   absl::Span<const MlaPrefillSequence> sequences) {
  if (sequences.size() > static_cast<size_t>(options.max_sequences)) {
    return absl::InvalidArgumentError(absl::StrCat(
        sequences.size(), " sequences; the limit is max_sequences ", options.max_sequences));
  }
  int64_t num_queries = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const MlaPrefillSequence& sequence = sequences[i];
    if (sequence.num_queries < 1 || sequence.num_keys < sequence.num_queries ||
        sequence.block_begin < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("sequence ", i, ": num_queries ", sequence.num_queries, ", num_keys ",
                       sequence.num_keys, ", block_begin ", sequence.block_begin,
                       "; needed is 1 <= num_queries <= num_keys and block_begin >= 0"));
    }
    num_queries += sequence.num_queries;
    if (num_queries > options.max_queries) {
      return absl::InvalidArgumentError(absl::StrCat(
          "sequence ", i, ": ", num_queries,
          " queries with those before it; the limit is max_queries ", options.max_queries));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int32_t MlaPrefillPartRows(const MlaPrefill::Options& options) {
  return NumTiles(options.expand_tokens) * kPrefillTile;
}

size_t MaxMlaPrefillWords(const MlaPrefill::Options& options, int num_sms) {
  // A sequence has at most three lists of work: its chunk's part, full parts and the rest of its
  // context.
  const size_t sequences = static_cast<size_t>(options.max_sequences);
  const size_t tiles = static_cast<size_t>(NumTiles(options.max_queries)) + sequences;
  return 3 * (sequences * (kWordsOfKeys + num_sms + 1) +
              tiles * static_cast<size_t>(options.num_heads) * kWordsOfWork);
}

absl::Status PlanMlaPrefill(const MlaPrefill::Options& options, int num_sms,
                            absl::Span<const MlaPrefillSequence> sequences, MlaPrefillPlan* plan) {
  RETURN_IF_ERROR(Check(options, sequences));
  plan->parts.clear();
  plan->words.clear();
  Planner planner(options, num_sms, plan);
  const int32_t part_rows = MlaPrefillPartRows(options);
  std::vector<Segment> packed;
  int32_t query = 0, row = 0;
  for (const MlaPrefillSequence& sequence : sequences) {
    const Segment segment = {
        .query_begin = query,
        .num_queries = sequence.num_queries,
        .keys = {.row_begin = 0,
                 .num_keys = sequence.num_keys,
                 .block_begin = sequence.block_begin,
                 .first_key = 0},
    };
    query += sequence.num_queries;
    const int64_t rows = int64_t{NumTiles(sequence.num_keys)} * kPrefillTile;
    if (row + rows > part_rows) {
      planner.AddPacked(packed);
      packed.clear();
      row = 0;
    }
    if (rows > part_rows) {
      planner.AddLong(segment);
      continue;
    }
    packed.push_back(segment);
    packed.back().keys.row_begin = row;
    row += static_cast<int32_t>(rows);
  }
  planner.AddPacked(packed);
  return absl::OkStatus();
}

}  // namespace latentd
