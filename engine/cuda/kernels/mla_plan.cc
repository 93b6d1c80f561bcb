#include "engine/cuda/kernels/mla_plan.h"

#include <algorithm>
#include <cstring>
#include <queue>
#include <utility>

#include "engine/cuda/kernels/mla_decode.h"

namespace latentd {
namespace {

// Costs in units of a key block's time: what an item costs beside its blocks (queries in, results
// out), and what it costs more when it is a part.
constexpr int kItemCost = 2;
constexpr int kPartCost = 1;
constexpr int kMinPart = 2;  // blocks

// batch_invariant: parts of at least this many blocks, at most so many of them.
constexpr int kInvariantBlocks = 8;
constexpr int kInvariantParts = 16;

// Up to so many parts on average, those who have them merge them while others still compute; more
// are merged sooner by a kernel of its own, which has all multiprocessors.
constexpr int kPartsMergedByWorkers = 12;

struct Unit {
  MlaPlanItem item;  // with all its blocks

  int num_blocks() const { return item.block_end; }
};

// A range of a unit's blocks for one worker.
struct Part {
  int unit;
  int block_begin;
  int block_end;
  int worker;
};

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

std::vector<Unit> MakeUnits(absl::Span<const MlaSequence> sequences, int num_heads) {
  const int unit_rows = kMlaTileRows * MlaTilesPerUnit(num_heads);
  std::vector<Unit> units;
  int row = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const MlaSequence& sequence = sequences[s];
    const int rows = sequence.num_queries * num_heads;
    for (int first = 0; first < rows && sequence.num_keys > 0; first += unit_rows) {
      Unit unit;
      unit.item.sequence = static_cast<int32_t>(s);
      unit.item.row = row + first;
      unit.item.sequence_row = first;
      unit.item.num_rows = std::min(unit_rows, rows - first);
      unit.item.first_limit = sequence.num_keys - sequence.num_queries + 1;
      const int last_query = (first + unit.item.num_rows - 1) / num_heads;
      // A caller's mistake, more queries than keys, is kept from being more than wrong.
      unit.item.num_keys = std::max(unit.item.first_limit + last_query, 1);
      unit.item.block_end = CeilDiv(unit.item.num_keys, kMlaBlockKeys);
      units.push_back(unit);
    }
    row += rows;
  }
  return units;
}

// Walks the units in order and fills one worker after the other with up to `room`; false when there
// are too few workers.
bool Fill(const std::vector<Unit>& units, int num_workers, int room, std::vector<Part>* parts) {
  parts->clear();
  int worker = 0, left = room;
  for (size_t u = 0; u < units.size(); ++u) {
    const int num_blocks = units[u].num_blocks();
    for (int done = 0; done < num_blocks;) {
      int take = num_blocks - done;
      if (done > 0 || take + kItemCost > left) take = std::min(take, left - kItemCost - kPartCost);
      if (take < std::min(kMinPart, num_blocks - done)) {
        if (++worker == num_workers) return false;
        left = room;
        continue;
      }
      parts->push_back({static_cast<int>(u), done, done + take, worker});
      left -= take + kItemCost + (take < num_blocks ? kPartCost : 0);
      done += take;
    }
  }
  return true;
}

// The least room that suffices: all workers end at about the same time.
std::vector<Part> Balance(const std::vector<Unit>& units, int num_workers) {
  int total = 0, low = 0;
  for (const Unit& unit : units) total += unit.num_blocks() + kItemCost;
  int high = total + kItemCost;
  low = std::max(total / num_workers, kItemCost + kPartCost + kMinPart);
  std::vector<Part> parts;
  while (low < high) {
    const int room = low + (high - low) / 2;
    if (Fill(units, num_workers, room, &parts)) {
      high = room;
    } else {
      low = room + 1;
    }
  }
  Fill(units, num_workers, high, &parts);
  return parts;
}

// Parts by the unit's length alone, the longest first to the worker with the least to do.
std::vector<Part> SplitByLength(const std::vector<Unit>& units, int num_workers) {
  std::vector<Part> parts;
  for (size_t u = 0; u < units.size(); ++u) {
    const int num_blocks = units[u].num_blocks();
    const int size = std::max(kInvariantBlocks, CeilDiv(num_blocks, kInvariantParts));
    for (int begin = 0; begin < num_blocks; begin += size) {
      parts.push_back({static_cast<int>(u), begin, std::min(begin + size, num_blocks), 0});
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
    return a.block_end - a.block_begin > b.block_end - b.block_begin;
  });
  using Load = std::pair<int, int>;  // blocks so far, worker
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int w = 0; w < num_workers; ++w) loads.emplace(0, w);
  for (Part& part : parts) {
    auto [load, worker] = loads.top();
    loads.pop();
    part.worker = worker;
    loads.emplace(load + part.block_end - part.block_begin + kItemCost, worker);
  }
  return parts;
}

void Append(const void* record, int words, std::vector<int32_t>* plan) {
  const size_t at = plan->size();
  plan->resize(at + words);
  std::memcpy(plan->data() + at, record, words * sizeof(int32_t));
}

int NumWorkers(const MlaDecodePlanner::Options& options) {
  return std::clamp(options.num_sms / MlaTilesPerUnit(options.num_heads), 1, kMlaMaxParts);
}

// A sequence's last unit may be partly empty: all but one row, at worst.
int64_t MaxUnits(const MlaDecodePlanner::Options& options) {
  const int64_t unit_rows = kMlaTileRows * MlaTilesPerUnit(options.num_heads);
  const int64_t spare = options.num_heads % unit_rows == 0 ? 0 : unit_rows - 1;
  return (int64_t{options.max_queries} * options.num_heads + spare * options.max_sequences) /
         unit_rows;
}

int64_t MaxItems(const MlaDecodePlanner::Options& options) {
  return options.batch_invariant ? MaxUnits(options) * kInvariantParts
                                 : MaxUnits(options) + NumWorkers(options);
}

// Of a worker's items only the first and the last can be parts when the units are cut in order.
int64_t MaxSlots(const MlaDecodePlanner::Options& options) {
  return options.batch_invariant ? MaxItems(options) : 2 * NumWorkers(options);
}

}  // namespace

MlaDecodePlanner::MlaDecodePlanner(const Options& options) : options_(options) {}

size_t MlaDecodePlanner::plan_capacity() const {
  return kMlaHeaderWords + (NumWorkers(options_) + MaxItems(options_)) * kMlaItemWords +
         MaxSlots(options_) / 2 * kMlaMergeWords;
}

size_t MlaDecodePlanner::workspace_bytes() const {
  return MaxSlots(options_) * MlaTilesPerUnit(options_.num_heads) * size_t{kMlaPartBytes};
}

void MlaDecodePlanner::Plan(absl::Span<const MlaSequence> sequences,
                            std::vector<int32_t>* plan) const {
  const std::vector<Unit> units = MakeUnits(sequences, options_.num_heads);
  const int num_workers = NumWorkers(options_);
  std::vector<Part> parts =
      options_.batch_invariant ? SplitByLength(units, num_workers) : Balance(units, num_workers);

  // Slots go to the parts of a unit in the order of their blocks.
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
    return std::pair(a.unit, a.block_begin) < std::pair(b.unit, b.block_begin);
  });
  std::vector<int> num_parts(units.size());
  for (const Part& part : parts) ++num_parts[part.unit];
  const bool merge_apart =
      !options_.batch_invariant && parts.size() > units.size() * kPartsMergedByWorkers;
  std::vector<MlaPlanItem> items(num_workers);
  std::vector<MlaPlanMerge> merges;
  std::vector<int> last(num_workers, -1);  // item of each worker
  int num_slots = 0, part_of_unit = 0;
  for (const Part& part : parts) {
    MlaPlanItem item = units[part.unit].item;
    item.block_begin = part.block_begin;
    item.block_end = part.block_end;
    if (num_parts[part.unit] > 1) {
      part_of_unit = part.block_begin == 0 ? 0 : part_of_unit + 1;
      item.slot = num_slots++;
      item.part = part_of_unit;
      if (!merge_apart) {
        item.num_parts = num_parts[part.unit];
      } else if (item.part == 0) {
        merges.push_back({item.row, item.num_rows, item.slot, num_parts[part.unit]});
      }
    }
    int& previous = last[part.worker];
    if (previous < 0) {
      previous = part.worker;
      items[previous] = item;
    } else {
      items[previous].next = static_cast<int32_t>(items.size());
      previous = items[previous].next;
      items.push_back(item);
    }
  }

  plan->clear();
  plan->reserve(plan_capacity());
  const MlaPlanHeader header = {num_workers, static_cast<int32_t>(items.size()),
                                static_cast<int32_t>(MaxSlots(options_)),
                                static_cast<int32_t>(merges.size())};
  Append(&header, kMlaHeaderWords, plan);
  for (const MlaPlanItem& item : items) Append(&item, kMlaItemWords, plan);
  for (const MlaPlanMerge& merge : merges) Append(&merge, kMlaMergeWords, plan);
}

}  // namespace latentd
