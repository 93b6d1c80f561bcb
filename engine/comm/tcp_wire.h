#ifndef LATENTD_ENGINE_COMM_TCP_WIRE_H_
#define LATENTD_ENGINE_COMM_TCP_WIRE_H_

#include <bit>
#include <cstddef>
#include <cstdint>

namespace latentd {

// What TCP ranks say to each other. Two ranks have two connections: one for data, one on which a
// rank says nothing but why it ends the group, so that it need not wait behind data for that.
//
//   the dialling rank: Hello; the other: Welcome; then in both directions
//   data:    MessageHeader and `size` bytes, one of them for each call
//   control: Note and `length` bytes of text, once at most

static_assert(std::endian::native == std::endian::little);

inline constexpr uint32_t kWireVersion = 1;

enum class Channel : uint32_t { kData = 0, kControl = 1 };

struct Hello {
  static constexpr uint64_t kMagic = 0x314f4c4c45484c44;  // "DLHELLO1"
  uint64_t magic = kMagic;
  uint32_t version = kWireVersion;
  Channel channel = Channel::kData;
  int64_t epoch = 0;
  uint64_t token = 0;  // of the addresses of all ranks: another leader's group has others
  int32_t from = 0;    // rank
  int32_t to = 0;      // rank
};
static_assert(sizeof(Hello) == 40);

enum class Answer : uint32_t { kWelcome = 0, kOtherGroup = 1, kOtherVersion = 2 };

struct Welcome {
  static constexpr uint64_t kMagic = 0x31434c4557444c44;  // "DLDWELC1"
  uint64_t magic = kMagic;
  uint32_t version = kWireVersion;
  Answer answer = Answer::kWelcome;
  int64_t epoch = 0;  // that the answering rank joins
};
static_assert(sizeof(Welcome) == 24);

struct MessageHeader {
  static constexpr uint32_t kMagic = 0x3147534d;  // "MSG1"
  uint32_t magic = kMagic;
  uint32_t kind = 0;    // CallKind
  uint64_t number = 0;  // of the call
  uint64_t size = 0;    // bytes that follow
};
static_assert(sizeof(MessageHeader) == 24);

struct Note {
  static constexpr uint32_t kMagic = 0x31444e45;  // "END1"
  static constexpr size_t kMaxLength = 1024;
  uint32_t magic = kMagic;
  int32_t origin = 0;  // the rank that ended the group
  int32_t code = 0;    // absl::StatusCode
  uint32_t length = 0;
};
static_assert(sizeof(Note) == 16);

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_TCP_WIRE_H_
