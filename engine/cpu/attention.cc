#include "engine/cpu/attention.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace latentd {
namespace {

constexpr int kSegmentBlocks = 4;
constexpr int kSegmentKeys = kSegmentBlocks * kBlockSize;
constexpr size_t kMaxPartialFloats = size_t{16} << 20;

static_assert(kAttentionKeys == kBlockSize);

int RoundUp(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

int LatentCache::ValueDim(const ModelConfig& config) {
  return RoundUp(config.kv_lora_rank, kRowPadding);
}
int LatentCache::Dim(const ModelConfig& config) {
  return ValueDim(config) + RoundUp(config.qk_rope_head_dim, 16);
}
uint64_t LatentCache::NumBytes(const ModelConfig& config, int32_t num_blocks) {
  return uint64_t{sizeof(float)} * static_cast<uint64_t>(config.num_hidden_layers) *
         static_cast<uint64_t>(num_blocks) * kBlockSize * static_cast<uint64_t>(Dim(config));
}

LatentCache::LatentCache(const ModelConfig& config, int32_t num_blocks, bool rounds_to_fp8)
    : num_blocks_(num_blocks),
      rounds_to_fp8_(rounds_to_fp8),
      value_dim_(ValueDim(config)),
      dim_(Dim(config)),
      num_bytes_(NumBytes(config, num_blocks)) {
  void* memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;
  madvise(memory, num_bytes_, MADV_HUGEPAGE);
  data_ = static_cast<float*>(memory);
}

LatentCache::~LatentCache() {
  if (data_ != nullptr) munmap(data_, num_bytes_);
}

Attention::Attention(const LatentCache& cache, int num_heads, const Kernels& kernels,
                     ThreadPool& pool)
    : cache_(cache), num_heads_(num_heads), kernels_(kernels), pool_(pool) {
  const size_t floats = size_t{kAttentionRows} * cache.value_dim();
  for (int i = 0; i < pool.num_threads(); ++i) {
    auto scratch = std::make_unique<Scratch>();
    scratch->storage.resize(2 * floats);
    scratch->segment.out = scratch->storage.data();
    scratch->total.out = scratch->storage.data() + floats;
    scratch_.push_back(std::move(scratch));
  }
}

void Attention::MakeTiles(absl::Span<const AttentionSpan> spans) {
  tiles_.clear();
  first_segments_.clear();
  int64_t num_segments = 0;
  for (const AttentionSpan& span : spans) {
    const int rows = span.num_rows * num_heads_;
    for (int first = 0; first < rows; first += kAttentionRows) {
      Tile tile{.span = &span,
                .first = first,
                .rows = std::min(rows - first, kAttentionRows),
                .num_segments = 0};
      const int last_position = span.first_position + (first + tile.rows - 1) / num_heads_;
      tile.num_segments = last_position / kSegmentKeys + 1;
      first_segments_.push_back(num_segments);
      num_segments += tile.num_segments;
      tiles_.push_back(tile);
    }
  }
}

void Attention::Run(int layer, absl::Span<const AttentionSpan> spans, const float* q, float* out) {
  MakeTiles(spans);
  if (tiles_.empty()) return;
  const int64_t num_tiles = static_cast<int64_t>(tiles_.size());
  const int64_t num_segments = first_segments_.back() + tiles_.back().num_segments;

  // Few tiles: spread their segments over the threads and merge afterwards.
  int64_t num_partial_rows = 0;
  for (const Tile& tile : tiles_) num_partial_rows += int64_t{tile.rows} * tile.num_segments;
  const bool apart = num_tiles < 4 * pool_.num_threads() && num_segments > num_tiles &&
                     pool_.num_threads() > 1 &&
                     num_partial_rows * cache_.value_dim() <= int64_t{kMaxPartialFloats};
  if (!apart) {
    // Later tiles of a sequence see more keys: taken last to first, the threads end together.
    pool_.For(num_tiles, 1, [&](int64_t begin, int64_t, int thread) {
      const Tile& tile = tiles_[num_tiles - 1 - begin];
      Scratch& scratch = *scratch_[thread];
      Reset(tile, scratch.total);
      for (int segment = 0; segment < tile.num_segments; ++segment) {
        ComputeSegment(layer, tile, segment, q, scratch, scratch.segment);
        Merge(tile, scratch.segment, scratch.total);
      }
      Finish(tile, scratch.total, out);
    });
    return;
  }

  partials_.resize(num_segments);
  if (partial_storage_.size() < static_cast<size_t>(num_partial_rows * cache_.value_dim())) {
    partial_storage_.resize(num_partial_rows * cache_.value_dim());
  }
  float* next = partial_storage_.data();
  for (int64_t i = 0; i < num_tiles; ++i) {
    for (int s = 0; s < tiles_[i].num_segments; ++s) {
      partials_[first_segments_[i] + s].out = next;
      next += tiles_[i].rows * cache_.value_dim();
    }
  }
  pool_.For(num_segments, 1, [&](int64_t begin, int64_t, int thread) {
    const size_t i = std::upper_bound(first_segments_.begin(), first_segments_.end(), begin) -
                     first_segments_.begin() - 1;
    ComputeSegment(layer, tiles_[i], static_cast<int>(begin - first_segments_[i]), q,
                   *scratch_[thread], partials_[begin]);
  });
  pool_.For(num_tiles, 1, [&](int64_t begin, int64_t, int thread) {
    const Tile& tile = tiles_[begin];
    Partial& total = scratch_[thread]->total;
    Reset(tile, total);
    for (int s = 0; s < tile.num_segments; ++s) {
      Merge(tile, partials_[first_segments_[begin] + s], total);
    }
    Finish(tile, total, out);
  });
}

void Attention::Reset(const Tile& tile, Partial& part) const {
  std::fill_n(part.max, tile.rows, -INFINITY);
  std::fill_n(part.sum, tile.rows, 0.0f);
  std::fill_n(part.out, tile.rows * cache_.value_dim(), 0.0f);
}

void Attention::ComputeSegment(int layer, const Tile& tile, int segment, const float* q,
                               Scratch& scratch, Partial& part) const {
  Reset(tile, part);
  const AttentionSpan& span = *tile.span;
  const int last_position = span.first_position + (tile.first + tile.rows - 1) / num_heads_;
  const int first_block = segment * kSegmentBlocks;
  const int last_block = std::min(first_block + kSegmentBlocks - 1, last_position / kBlockSize);
  int valid[kAttentionRows];
  const int64_t first_row = int64_t{span.first_row} * num_heads_ + tile.first;
  for (int block = first_block; block <= last_block; ++block) {
    for (int r = 0; r < tile.rows; ++r) {
      const int position = span.first_position + (tile.first + r) / num_heads_;
      valid[r] = std::clamp(position + 1 - block * kBlockSize, 0, kBlockSize);
    }
    kernels_.attend_block({.q = q + first_row * cache_.dim(),
                           .keys = cache_.block(layer, span.blocks[block]),
                           .rows = tile.rows,
                           .dim = cache_.dim(),
                           .value_dim = cache_.value_dim(),
                           .valid = valid,
                           .max = part.max,
                           .sum = part.sum,
                           .out = part.out,
                           .scores = scratch.scores});
  }
}

void Attention::Merge(const Tile& tile, const Partial& part, Partial& total) const {
  const int dim = cache_.value_dim();
  for (int r = 0; r < tile.rows; ++r) {
    if (part.max[r] == -INFINITY) continue;  // the row lies before the segment
    kernels_.merge(part.max[r], part.sum[r], part.out + r * dim, dim, &total.max[r], &total.sum[r],
                   total.out + r * dim);
  }
}

void Attention::Finish(const Tile& tile, const Partial& total, float* out) const {
  const int dim = cache_.value_dim();
  const int64_t first_row = int64_t{tile.span->first_row} * num_heads_ + tile.first;
  for (int r = 0; r < tile.rows; ++r) {
    kernels_.scale(total.out + r * dim, 1.0f / total.sum[r], dim, out + (first_row + r) * dim);
  }
}

}  // namespace latentd
