#ifndef LATENTD_SERVER_TEXT_RUST_FFI_H_
#define LATENTD_SERVER_TEXT_RUST_FFI_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

// The C ABI of rust/src/lib.rs; only this folder includes it. Every call is thread-safe; a handle
// may be used by many threads at once. Calls that can fail return 0, or set `error` and return 1
// (the input is at fault) or 2 (a panic within a library). What an out-parameter was given must be
// freed.
extern "C" {
struct LatentdTokenizer;
struct LatentdTemplate;

struct LatentdBytes {
  uint8_t* data;
  size_t size;
  size_t capacity;
};
struct LatentdIds {
  uint32_t* data;
  size_t size;
  size_t capacity;
};
// Views into a tokenizer, valid as long as it.
struct LatentdTables {
  size_t num_ids;
  const uint8_t* bytes;
  const size_t* offsets;  // [num_ids + 1] into bytes
  const uint8_t* flags;   // [num_ids] bit 0: special, bit 1: added
};

void latentd_bytes_free(LatentdBytes* bytes);
void latentd_ids_free(LatentdIds* ids);

int latentd_tokenizer_new(const uint8_t* json, size_t size, LatentdTokenizer** out,
                          LatentdBytes* error);
void latentd_tokenizer_free(LatentdTokenizer* tokenizer);
LatentdTables latentd_tokenizer_tables(const LatentdTokenizer* tokenizer);
int64_t latentd_tokenizer_token_id(const LatentdTokenizer* tokenizer, const uint8_t* token,
                                   size_t size);  // -1: none
int latentd_tokenizer_encode(const LatentdTokenizer* tokenizer, const uint8_t* text, size_t size,
                             bool parse_control_tokens, LatentdIds* out, LatentdBytes* error);

// Writes the local time in `format` to `out`; returns its size, at most `capacity`.
typedef size_t (*LatentdStrftime)(const uint8_t* format, size_t size, uint8_t* out,
                                  size_t capacity);

int latentd_template_new(const uint8_t* source, size_t size, LatentdStrftime strftime,
                         LatentdTemplate** out, LatentdBytes* error);
void latentd_template_free(LatentdTemplate* chat_template);
// `chat`: JSON, see Template::render.
int latentd_template_render(const LatentdTemplate* chat_template, const LatentdTokenizer* tokenizer,
                            const uint8_t* chat, size_t size, LatentdBytes* text, LatentdIds* ids,
                            LatentdBytes* error);
}  // extern "C"

namespace latentd::rust {

// Owners of what a call returns.
class Bytes {
 public:
  Bytes() = default;
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { latentd_bytes_free(&bytes_); }
  LatentdBytes* out() { return &bytes_; }
  std::string str() const {
    return bytes_.size == 0 ? std::string()
                            : std::string(reinterpret_cast<const char*>(bytes_.data), bytes_.size);
  }

 private:
  LatentdBytes bytes_{};
};

class Ids {
 public:
  Ids() = default;
  Ids(const Ids&) = delete;
  Ids& operator=(const Ids&) = delete;
  ~Ids() { latentd_ids_free(&ids_); }
  LatentdIds* out() { return &ids_; }
  std::vector<int32_t> vector() const { return {ids_.data, ids_.data + ids_.size}; }

 private:
  LatentdIds ids_{};
};

inline const uint8_t* Data(std::string_view text) {
  return reinterpret_cast<const uint8_t*>(text.data());
}

// `what` says what was refused.
inline absl::Status ToStatus(int code, std::string_view what, const Bytes& error) {
  if (code == 0) return absl::OkStatus();
  const std::string message = std::string(what) + ": " + error.str();
  return code == 1 ? absl::InvalidArgumentError(message) : absl::InternalError(message);
}

}  // namespace latentd::rust

#endif  // LATENTD_SERVER_TEXT_RUST_FFI_H_
