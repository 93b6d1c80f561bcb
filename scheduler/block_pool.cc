#include "scheduler/block_pool.h"

#include <algorithm>
#include <utility>

#include "engine/status.h"

namespace latentd {

BlockPool::BlockPool(int32_t num_blocks, int32_t block_size)
    : block_size_(block_size),
      blocks_(static_cast<size_t>(num_blocks) + 1),
      tokens_(static_cast<size_t>(num_blocks) * block_size),
      ends_(num_blocks) {
  LATENTD_CHECK(num_blocks >= 0 && block_size > 0);
  blocks_[ends_].previous_free = blocks_[ends_].next_free = ends_;
  for (BlockId block = 0; block < num_blocks; ++block) LinkBefore(ends_, block);
  cache_.reserve(num_blocks);
}

std::optional<BlockId> BlockPool::Allocate(bool background) {
  if (num_free_ == 0) return std::nullopt;
  const BlockId block = blocks_[ends_].next_free;
  Unlink(block);
  Forget(block);
  Count(&blocks_[block], 1, background);
  return block;
}

std::optional<BlockPool::CachedBlock> BlockPool::Find(const BlockContent& content) const {
  const auto it = cache_.find(content.hash);
  if (it == cache_.end() || !Holds(it->second, content)) return std::nullopt;
  return CachedBlock{it->second, blocks_[it->second].content};
}

void BlockPool::Acquire(BlockId block, bool background) {
  LATENTD_CHECK(blocks_[block].content != kNoContent);
  if (blocks_[block].num_references == 0) Unlink(block);
  Count(&blocks_[block], 1, background);
}

void BlockPool::Count(Block* block, int32_t num_references, bool background) {
  const auto is_background = [block] {
    return block->num_references > 0 && block->num_references == block->num_background_references;
  };
  num_background_ -= is_background();
  block->num_references += num_references;
  if (background) block->num_background_references += num_references;
  num_background_ += is_background();
}

ContentId BlockPool::Cache(BlockId id, const BlockContent& content) {
  Block& block = blocks_[id];
  LATENTD_CHECK(block.num_references > 0 && block.content == kNoContent);
  if (const auto it = cache_.find(content.hash); it != cache_.end()) {
    if (Holds(it->second, content)) return blocks_[it->second].content;
    const BlockId displaced = it->second;
    Forget(displaced);
    if (blocks_[displaced].num_references == 0) {
      Unlink(displaced);
      LinkBefore(blocks_[ends_].next_free, displaced);
    }
  }
  cache_.emplace(content.hash, id);
  block.content = ++last_content_;
  block.previous = content.previous;
  block.hash = content.hash;
  block.salt = content.salt;
  std::copy(content.tokens.begin(), content.tokens.end(),
            tokens_.begin() + static_cast<int64_t>(id) * block_size_);
  return block.content;
}

void BlockPool::Release(absl::Span<const BlockId> blocks, bool background) {
  for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) {
    Block& block = blocks_[*it];
    LATENTD_CHECK(block.num_references > 0);
    Count(&block, -1, background);
    if (block.num_references > 0) continue;
    LinkBefore(block.content == kNoContent ? blocks_[ends_].next_free : ends_, *it);
  }
}

void BlockPool::DropCache() {
  for (BlockId block = 0; block < num_blocks(); ++block) Forget(block);
}

bool BlockPool::Holds(BlockId id, const BlockContent& content) const {
  const Block& block = blocks_[id];
  return block.previous == content.previous && block.salt == content.salt &&
         TokensOf(id) == content.tokens;
}

void BlockPool::Forget(BlockId id) {
  Block& block = blocks_[id];
  if (block.content == kNoContent) return;
  cache_.erase(block.hash);
  block.content = kNoContent;
}

void BlockPool::Unlink(BlockId id) {
  const Block& block = blocks_[id];
  blocks_[block.previous_free].next_free = block.next_free;
  blocks_[block.next_free].previous_free = block.previous_free;
  --num_free_;
}

void BlockPool::LinkBefore(BlockId next, BlockId id) {
  const BlockId previous = blocks_[next].previous_free;
  blocks_[id].previous_free = previous;
  blocks_[id].next_free = next;
  blocks_[previous].next_free = blocks_[next].previous_free = id;
  ++num_free_;
}

absl::Span<const TokenId> BlockPool::TokensOf(BlockId block) const {
  return absl::MakeConstSpan(tokens_).subspan(static_cast<size_t>(block) * block_size_,
                                              block_size_);
}

void BlockPool::CheckInvariants() const {
  std::vector<bool> is_free(num_blocks());
  int32_t num_listed = 0;
  for (BlockId id = blocks_[ends_].next_free; id != ends_; id = blocks_[id].next_free) {
    LATENTD_CHECK(!is_free[id]);
    LATENTD_CHECK(blocks_[blocks_[id].next_free].previous_free == id);
    is_free[id] = true;
    ++num_listed;
  }
  LATENTD_CHECK(num_listed == num_free_);
  size_t num_cached = 0;
  int32_t num_background = 0;
  for (BlockId id = 0; id < num_blocks(); ++id) {
    const Block& block = blocks_[id];
    LATENTD_CHECK(0 <= block.num_background_references);
    LATENTD_CHECK(block.num_background_references <= block.num_references);
    num_background +=
        block.num_references > 0 && block.num_references == block.num_background_references;
    LATENTD_CHECK(is_free[id] == (block.num_references == 0));
    if (block.content == kNoContent) continue;
    ++num_cached;
    const auto it = cache_.find(block.hash);
    LATENTD_CHECK(it != cache_.end() && it->second == id);
  }
  LATENTD_CHECK(num_cached == cache_.size());
  LATENTD_CHECK(num_background == num_background_);
}

BlockTable::BlockTable(BlockTable&& other) noexcept
    : background_(other.background_),
      pool_(std::exchange(other.pool_, nullptr)),
      blocks_(std::exchange(other.blocks_, {})) {}

BlockTable& BlockTable::operator=(BlockTable&& other) noexcept {
  if (this == &other) return *this;
  Clear();
  background_ = other.background_;
  pool_ = std::exchange(other.pool_, nullptr);
  blocks_ = std::exchange(other.blocks_, {});
  return *this;
}

void BlockTable::AppendCached(BlockPool* pool, BlockId block) {
  pool->Acquire(block, background_);
  Append(pool, block);
}

void BlockTable::AppendNew(BlockPool* pool, int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    const std::optional<BlockId> block = pool->Allocate(background_);
    LATENTD_CHECK(block.has_value());
    Append(pool, *block);
  }
}

void BlockTable::Append(BlockPool* pool, BlockId block) {
  LATENTD_CHECK(blocks_.empty() || pool == pool_);
  pool_ = pool;
  blocks_.push_back(block);
}

void BlockTable::Clear() {
  if (pool_ != nullptr) pool_->Release(blocks_, background_);
  blocks_.clear();
}

}  // namespace latentd
