#include "server/sha256.h"

#include <openssl/evp.h>

#include "absl/strings/escaping.h"
#include "engine/status.h"

namespace latentd {

struct Sha256::Context {
  EVP_MD_CTX* evp = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(evp); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  LATENTD_CHECK(EVP_DigestInit_ex(context_->evp, EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() = default;

void Sha256::Add(std::string_view bytes) {
  LATENTD_CHECK(EVP_DigestUpdate(context_->evp, bytes.data(), bytes.size()) == 1);
}

std::string Sha256::Finish() {
  std::string digest(32, '\0');
  LATENTD_CHECK(EVP_DigestFinal_ex(context_->evp, reinterpret_cast<unsigned char*>(digest.data()),
                                   nullptr) == 1);
  // Without a type: the algorithm that is there already is not fetched again.
  LATENTD_CHECK(EVP_DigestInit_ex(context_->evp, nullptr, nullptr) == 1);
  return digest;
}

std::string Sha256::Of(std::string_view bytes) {
  static thread_local Sha256 sha256;
  sha256.Add(bytes);
  return sha256.Finish();
}

std::string HexOf(std::string_view bytes) {
  return absl::BytesToHexString(absl::string_view(bytes.data(), bytes.size()));
}

}  // namespace latentd
