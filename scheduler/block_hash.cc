#include "scheduler/block_hash.h"

#include <openssl/evp.h>

#include <memory>

#include "engine/status.h"

namespace latentd {
namespace {

// A SHA-256 context of this thread, made once: fetching the algorithm from OpenSSL costs more than
// hashing a block.
class Sha256 {
 public:
  static Sha256& OfThread() {
    static thread_local Sha256 sha256;
    return sha256;
  }

  BlockHash Hash(absl::Span<const uint8_t> head, absl::Span<const uint8_t> tail) {
    BlockHash hash;
    LATENTD_CHECK(EVP_DigestInit_ex2(context_.get(), algorithm_.get(), nullptr) == 1);
    LATENTD_CHECK(EVP_DigestUpdate(context_.get(), head.data(), head.size()) == 1);
    LATENTD_CHECK(EVP_DigestUpdate(context_.get(), tail.data(), tail.size()) == 1);
    LATENTD_CHECK(EVP_DigestFinal_ex(context_.get(), hash.bytes.data(), nullptr) == 1);
    return hash;
  }

 private:
  Sha256()
      : algorithm_(EVP_MD_fetch(nullptr, "SHA256", nullptr), EVP_MD_free),
        context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    LATENTD_CHECK(algorithm_ != nullptr && context_ != nullptr);
  }

  std::unique_ptr<EVP_MD, decltype(&EVP_MD_free)> algorithm_;
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

// Keeps the hash of a salt apart from that of a block, whatever the salt spells.
constexpr uint8_t kSaltTag[] = {'s', 'a', 'l', 't'};

}  // namespace

BlockHash HashSalt(std::string_view salt) {
  return Sha256::OfThread().Hash(kSaltTag,
                                 {reinterpret_cast<const uint8_t*>(salt.data()), salt.size()});
}

BlockHash HashBlock(const BlockHash& parent, absl::Span<const TokenId> tokens) {
  return Sha256::OfThread().Hash(parent.bytes, {reinterpret_cast<const uint8_t*>(tokens.data()),
                                                tokens.size() * sizeof(TokenId)});
}

}  // namespace latentd
