#include "scheduler/sequence.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "engine/status.h"

namespace latentd {

Sequence::Sequence(Request request, int64_t arrival, int32_t block_size,
                   BlockHashFunction hash_block)
    : request_(std::move(request)),
      arrival_(arrival),
      block_size_(block_size),
      hash_block_(hash_block),
      num_prompt_tokens_(static_cast<int32_t>(request_.prompt.size())),
      tokens_(std::move(request_.prompt)),
      salt_hash_(HashSalt(request_.cache_salt)),
      table_(request_.background) {
  request_.prompt.clear();
}

int32_t Sequence::BlocksFor(int32_t num_tokens) const {
  const int32_t num_blocks = (num_tokens + block_size_ - 1) / block_size_;
  return std::max(num_blocks - table_.size(), 0);
}

Sequence::PrefixHit Sequence::FindPrefix(const BlockPool& pool) {
  PrefixHit hit;
  ContentId previous = kNoContent;
  while ((hit.num_blocks + 1) * block_size_ < num_tokens()) {
    const auto found = pool.Find(ContentOf(hit.num_blocks, previous));
    if (!found) break;
    previous = found->content;
    ++hit.num_blocks;
    const int32_t num_displaced = background() ? 0 : pool.num_background_references(found->block);
    if (pool.num_references(found->block) == num_displaced) ++hit.num_available_blocks;
  }
  return hit;
}

void Sequence::TakePrefix(BlockPool* pool, int32_t dp_rank) {
  LATENTD_CHECK(table_.size() == 0 && num_computed_tokens_ == 0);
  dp_rank_ = dp_rank;
  while (num_computed_tokens_ + block_size_ < num_tokens()) {
    const auto found = pool->Find(ContentOf(table_.size(), last_content_));
    if (!found) break;
    table_.AppendCached(pool, found->block);
    last_content_ = found->content;
    num_computed_tokens_ += block_size_;
  }
}

void Sequence::Advance(int32_t num_tokens, BlockPool* pool) {
  const int32_t first = num_computed_tokens_ / block_size_;
  num_computed_tokens_ += num_tokens;
  if (pool == nullptr) return;
  for (int32_t i = first; i < num_computed_tokens_ / block_size_; ++i) {
    last_content_ = pool->Cache(table_[i], ContentOf(i, last_content_));
  }
}

void Sequence::Restart() {
  table_.Clear();
  num_computed_tokens_ = 0;
  last_content_ = kNoContent;
}

BlockContent Sequence::ContentOf(int32_t block_index, ContentId previous) {
  const auto tokens_of = [this](int32_t i) {
    return absl::MakeConstSpan(tokens_).subspan(static_cast<size_t>(i) * block_size_, block_size_);
  };
  while (static_cast<int32_t>(hashes_.size()) <= block_index) {
    const BlockHash& parent = hashes_.empty() ? salt_hash_ : hashes_.back();
    hashes_.push_back(hash_block_(parent, tokens_of(static_cast<int32_t>(hashes_.size()))));
  }
  return {.hash = hashes_[block_index],
          .previous = previous,
          .salt = block_index == 0 ? std::string_view(request_.cache_salt) : std::string_view(),
          .tokens = tokens_of(block_index)};
}

void Sequence::CheckInvariants() const {
  LATENTD_CHECK(0 <= num_computed_tokens_ && num_computed_tokens_ < num_tokens());
  LATENTD_CHECK(0 < num_prompt_tokens_ && num_prompt_tokens_ <= num_tokens());
  LATENTD_CHECK(num_new_tokens() < request_.max_new_tokens);
  LATENTD_CHECK(BlocksFor(num_computed_tokens_) == 0);
  LATENTD_CHECK(running || (table_.size() == 0 && num_computed_tokens_ == 0 && !scheduled));
  LATENTD_CHECK(!cancelled || scheduled);
}

}  // namespace latentd
