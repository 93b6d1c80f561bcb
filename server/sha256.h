#ifndef LATENTD_SERVER_SHA256_H_
#define LATENTD_SERVER_SHA256_H_

#include <memory>
#include <string>
#include <string_view>

namespace latentd {

// The SHA-256 of what is added, piece by piece. One thread at a time.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Add(std::string_view bytes);
  // The 32 bytes of what was added; the next Add begins anew.
  std::string Finish();

  // Of `bytes` alone.
  static std::string Of(std::string_view bytes);

 private:
  struct Context;
  const std::unique_ptr<Context> context_;
};

// Lower-case hexadecimal digits.
std::string HexOf(std::string_view bytes);

}  // namespace latentd

#endif  // LATENTD_SERVER_SHA256_H_
