#ifndef LATENTD_SCHEDULER_BLOCK_POOL_H_
#define LATENTD_SCHEDULER_BLOCK_POOL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "engine/step.h"
#include "scheduler/block_hash.h"

namespace latentd {

// Names what one cached block holds, everything before it included. Given out once, never again: an
// entry whose predecessor was evicted can no longer be reached, let alone be mistaken.
using ContentId = uint64_t;
inline constexpr ContentId kNoContent = 0;

// What a full block holds. The hash finds it; the other fields are compared, so that a collision
// costs a hit and never shows one client the cache of another.
struct BlockContent {
  BlockHash hash;
  ContentId previous = kNoContent;   // of the block before; kNoContent for the first
  std::string_view salt;             // the first block's; empty for the others
  absl::Span<const TokenId> tokens;  // [block_size]
};

// The books of one rank's KV cache: who uses which block, and what the blocks hold. It keeps ids,
// never device memory. Not thread-safe.
//
// A reference is of the background or not: what background sequences alone refer to can be had for
// the others, by preempting them.
//
// Invariants:
// (1) A block is free, or its reference count is the number of tables that list it.
// (2) Only full, computed blocks are cached. A cached block may be free: it keeps its contents
// until
//     it is allocated again.
// (3) Free blocks that hold nothing are allocated first, then cached ones, the longest unused
// first.
class BlockPool {
 public:
  struct CachedBlock {
    BlockId block = 0;
    ContentId content = kNoContent;
  };

  explicit BlockPool(int32_t num_blocks, int32_t block_size = kBlockSize);

  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // Takes a free block with one reference, forgetting what it cached. Returns nullopt if none is
  // free.
  std::optional<BlockId> Allocate(bool background = false);

  // Returns the cached block that holds `content`, or nullopt. Adds no reference.
  std::optional<CachedBlock> Find(const BlockContent& content) const;

  // Adds a reference to a cached block, which may be free until now.
  void Acquire(BlockId block, bool background = false);

  // Caches a full, computed block for later Find()s and returns the content's id. Where the content
  // is cached already the first copy stays; of two contents with one hash, the later one does.
  // REQUIRES: the caller holds a reference to `block`, and it is not cached.
  ContentId Cache(BlockId block, const BlockContent& content);

  // Drops one reference to each block, the last block first, so that a prefix outlives its tail.
  // REQUIRES: the caller holds a reference to each block, all of them of the background or none.
  void Release(absl::Span<const BlockId> blocks, bool background = false);

  // Forgets all that is cached. The references stay.
  void DropCache();

  int32_t num_blocks() const { return static_cast<int32_t>(blocks_.size()) - 1; }
  int32_t num_free() const { return num_free_; }
  // With references, all of them of the background.
  int32_t num_background() const { return num_background_; }
  int32_t num_references(BlockId block) const { return blocks_[block].num_references; }
  int32_t num_background_references(BlockId block) const {
    return blocks_[block].num_background_references;
  }

  // Aborts unless the invariants hold that the pool can see. O(num_blocks); for tests.
  void CheckInvariants() const;

 private:
  struct Block {
    int32_t num_references = 0;
    int32_t num_background_references = 0;  // of those
    // Neighbours in the list of free blocks, while free.
    BlockId previous_free = 0;
    BlockId next_free = 0;
    // What it caches; kNoContent: nothing. The tokens are in tokens_.
    ContentId content = kNoContent;
    ContentId previous = kNoContent;
    BlockHash hash;
    std::string salt;
  };

  // Adds to a block's references, or takes from them.
  void Count(Block* block, int32_t num_references, bool background);
  bool Holds(BlockId block, const BlockContent& content) const;
  void Forget(BlockId block);
  void Unlink(BlockId block);
  void LinkBefore(BlockId next, BlockId block);
  absl::Span<const TokenId> TokensOf(BlockId block) const;

  int32_t block_size_;
  std::vector<Block> blocks_;    // [num_blocks + 1]; the last one is the ends of the free list
  std::vector<TokenId> tokens_;  // [num_blocks, block_size]
  BlockId ends_;                 // its next_free is allocated first, its previous_free last
  int32_t num_free_ = 0;
  int32_t num_background_ = 0;
  ContentId last_content_ = kNoContent;
  absl::flat_hash_map<BlockHash, BlockId> cache_;
};

// The blocks of one sequence, in order: its block table. It owns one reference to each, and giving
// them back is its destructor's business, whichever way the sequence ends.
//
// Append-only until Clear(). The pool must outlive it.
class BlockTable {
 public:
  explicit BlockTable(bool background = false) : background_(background) {}
  ~BlockTable() { Clear(); }

  BlockTable(BlockTable&& other) noexcept;
  BlockTable& operator=(BlockTable&& other) noexcept;

  // Appends a cached block, adding a reference.
  // REQUIRES: all blocks of a table are of one pool.
  void AppendCached(BlockPool* pool, BlockId block);

  // Appends `count` newly allocated blocks.
  // REQUIRES: the pool, the one of all blocks of the table, has as many free.
  void AppendNew(BlockPool* pool, int32_t count);

  // Releases all blocks.
  void Clear();

  int32_t size() const { return static_cast<int32_t>(blocks_.size()); }
  BlockId operator[](int32_t i) const { return blocks_[i]; }
  absl::Span<const BlockId> blocks() const { return blocks_; }

 private:
  void Append(BlockPool* pool, BlockId block);

  bool background_;  // its references are
  BlockPool* pool_ = nullptr;
  std::vector<BlockId> blocks_;
};

}  // namespace latentd

#endif  // LATENTD_SCHEDULER_BLOCK_POOL_H_
