#ifndef LATENTD_SCHEDULER_BLOCK_HASH_H_
#define LATENTD_SCHEDULER_BLOCK_HASH_H_

#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>

#include "absl/types/span.h"
#include "engine/step.h"

namespace latentd {

// The name under which a full block is looked up: SHA-256 over the hash of the block before it and
// its own tokens, so that it stands for the whole prefix.
//
// SHA-256 because nobody can make two prefixes that meet under one name, and because OpenSSL, which
// gRPC needs anyway, runs it on the CPU's SHA instructions: 64 tokens cost about 0.3 us, once.
struct BlockHash {
  std::array<uint8_t, 32> bytes{};

  friend bool operator==(const BlockHash&, const BlockHash&) = default;

  // The bytes are a hash already: any eight of them do.
  template <typename H>
  friend H AbslHashValue(H state, const BlockHash& hash) {
    uint64_t word;
    std::memcpy(&word, hash.bytes.data(), sizeof(word));
    return H::combine(std::move(state), word);
  }
};

// The start of a chain: what the first block of a sequence takes for the hash before it. Sequences
// of different salts share nothing.
BlockHash HashSalt(std::string_view salt);

// The hash of a full block of `tokens` that follows `parent`.
BlockHash HashBlock(const BlockHash& parent, absl::Span<const TokenId> tokens);

}  // namespace latentd

#endif  // LATENTD_SCHEDULER_BLOCK_HASH_H_
