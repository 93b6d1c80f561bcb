#ifndef LATENTD_SCHEDULER_SEQUENCE_H_
#define LATENTD_SCHEDULER_SEQUENCE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "scheduler/block_hash.h"
#include "scheduler/block_pool.h"
#include "scheduler/request.h"

namespace latentd {

// How the hash of a block is made; HashBlock, but for tests that want collisions.
using BlockHashFunction = BlockHash (*)(const BlockHash& parent, absl::Span<const TokenId> tokens);

// How far one admitted request is: its tokens, how many of them are in the cache, and where.
//
//   [0, num_computed_tokens)             in the blocks of the table
//   [num_computed_tokens, num_tokens)    to be computed, by the next step or the ones after
//
// While it waits nothing is computed and the table is empty. Not thread-safe.
class Sequence {
 public:
  // `arrival` orders requests by age.
  Sequence(Request request, int64_t arrival, int32_t block_size, BlockHashFunction hash_block);

  RequestId id() const { return request_.id; }
  int32_t priority() const { return request_.priority; }
  bool background() const { return request_.background; }
  int64_t arrival() const { return arrival_; }
  const Request& request() const { return request_; }  // its prompt is empty: see tokens()

  absl::Span<const TokenId> tokens() const { return tokens_; }  // the prompt, then what was drawn
  int32_t num_tokens() const { return static_cast<int32_t>(tokens_.size()); }
  int32_t num_prompt_tokens() const { return num_prompt_tokens_; }
  int32_t num_new_tokens() const { return num_tokens() - num_prompt_tokens_; }
  int32_t num_computed_tokens() const { return num_computed_tokens_; }
  int32_t dp_rank() const { return dp_rank_; }
  const BlockTable& table() const { return table_; }

  // Blocks that the table lacks to hold the first `num_tokens` tokens.
  int32_t BlocksFor(int32_t num_tokens) const;

  // Counts the leading blocks that `pool` has cached, and how many of those nobody holds that a
  // sequence of this class does not displace: free ones, and for all but background sequences those
  // that background ones alone hold.
  // Never the one with the last token: something must be left to compute.
  struct PrefixHit {
    int32_t num_blocks = 0;
    int32_t num_available_blocks = 0;
  };
  PrefixHit FindPrefix(const BlockPool& pool);

  // Takes the cached prefix of `pool` into the table, which is empty, and belongs to `dp_rank` from
  // now on.
  void TakePrefix(BlockPool* pool, int32_t dp_rank);

  // Allocates the blocks that the first `num_tokens` tokens lack.
  // REQUIRES: `pool` is that of its dp_rank and has as many free.
  void Reserve(BlockPool* pool, int32_t num_tokens) {
    table_.AppendNew(pool, BlocksFor(num_tokens));
  }

  // Notes that the next `num_tokens` tokens are computed, and caches the blocks that they filled in
  // `pool`, unless that is null.
  void Advance(int32_t num_tokens, BlockPool* pool);

  void AppendToken(TokenId token) { tokens_.push_back(token); }

  // Gives all blocks back; every token is to be computed again.
  void Restart();

  // Aborts unless the invariants of one sequence hold; for tests.
  void CheckInvariants() const;

  // The scheduler's notes; nothing here acts on them.
  bool running = false;
  bool started = false;    // was admitted at least once
  bool scheduled = false;  // is in the plan of the step under way
  bool cancelled = false;  // while that step ran
  int32_t num_lost = 0;    // lost steps that it was running in

 private:
  BlockContent ContentOf(int32_t block_index, ContentId previous);

  Request request_;
  int64_t arrival_;
  int32_t block_size_;
  BlockHashFunction hash_block_;
  int32_t num_prompt_tokens_;
  std::vector<TokenId> tokens_;
  std::vector<BlockHash> hashes_;  // of the leading full blocks, as far as they were needed
  BlockHash salt_hash_;
  int32_t num_computed_tokens_ = 0;
  int32_t dp_rank_ = 0;
  BlockTable table_;
  ContentId last_content_ = kNoContent;  // of the last full block in [0, num_computed_tokens)
};

}  // namespace latentd

#endif  // LATENTD_SCHEDULER_SEQUENCE_H_
