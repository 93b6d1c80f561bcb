#include "server/client/event_scan.h"

#include <google/protobuf/stubs/logging.h>
#include <google/protobuf/util/message_differencer.h>
#include <grpcpp/support/slice.h>
#include <gtest/gtest.h>

#include "server/client/random.h"
#include "tests/server/client/scripted_server.h"

namespace latentd {
namespace {

grpc::ByteBuffer Buffer(const std::string& bytes, size_t num_slices = 1) {
  std::vector<grpc::Slice> slices;
  for (size_t i = 0; i < num_slices; ++i) {
    const size_t begin = bytes.size() * i / num_slices;
    slices.emplace_back(bytes.substr(begin, bytes.size() * (i + 1) / num_slices - begin));
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

v1::GenerationEvent RandomEvent(Random& random) {
  v1::GenerationEvent event;
  switch (random.Below(5)) {
    case 0:
      return StartedEvent();
    case 1:
      return FinishedEvent();
    case 2:
      return UsageEvent(static_cast<int>(random.Below(1 << 20)), 3, 9);
    default:
      event = random.Below(2) == 0 ? ContentEvent(std::string(random.Below(300), 'x'), 0)
                                   : ReasoningEvent(std::string(random.Below(300), '\x03'), 0);
  }
  for (uint64_t i = random.Below(6); i > 0; --i) {
    // One to ten bytes each; negative ones take ten.
    event.mutable_delta()->add_token_ids(static_cast<int32_t>(random.Next() >> random.Below(64)));
  }
  if (random.Below(2) == 0) event.mutable_delta()->add_logprobs()->set_token("half \xe4");
  event.mutable_delta()->set_index(static_cast<int>(random.Below(3)));
  return event;
}

TEST(ScanEventTest, AgreesWithTheGeneratedParser) {
  Random random(1);
  for (int i = 0; i < 5000; ++i) {
    const v1::GenerationEvent event = RandomEvent(random);
    const auto scanned = ScanEvent(Buffer(event.SerializeAsString(), 1 + random.Below(3)));
    ASSERT_TRUE(scanned.has_value()) << event.DebugString();
    using Kind = ScannedEvent::Kind;
    EXPECT_EQ(scanned->kind == Kind::kStarted, event.has_started());
    EXPECT_EQ(scanned->kind == Kind::kDelta, event.has_delta());
    EXPECT_EQ(scanned->kind == Kind::kFinished, event.has_finished());
    EXPECT_EQ(scanned->num_token_ids, event.delta().token_ids_size()) << event.DebugString();
    ASSERT_EQ(scanned->usage.has_value(), event.has_usage());
    if (event.has_usage()) {
      EXPECT_TRUE(
          google::protobuf::util::MessageDifferencer::Equals(*scanned->usage, event.usage()));
    }
  }
}

TEST(ScanEventTest, CountsUnpackedIds) {
  // delta (2) { token_ids (5): 7, then 300, each with its own tag }
  const auto scanned = ScanEvent(Buffer(std::string("\x12\x05\x28\x07\x28\xac\x02", 7)));
  ASSERT_TRUE(scanned.has_value());
  EXPECT_EQ(scanned->num_token_ids, 2);
}

TEST(ScanEventTest, SkipsFieldsOfALaterVersion) {
  std::string bytes = ContentEvent("a", 2).SerializeAsString();
  bytes += "\xfa\x01\x03xyz";                   // field 31, length-delimited
  bytes += "\xf0\x01\x05";                      // field 30, varint
  bytes += std::string("\xed\x01\0\0\0\0", 6);  // field 29, fixed32
  const auto scanned = ScanEvent(Buffer(bytes));
  ASSERT_TRUE(scanned.has_value());
  EXPECT_EQ(scanned->num_token_ids, 2);
}

TEST(ScanEventTest, BrokenBytesAreRefusedAsTheGeneratedParserDoes) {
  Random random(2);
  const google::protobuf::LogSilencer silencer;  // of invalid UTF-8
  int refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string bytes = RandomEvent(random).SerializeAsString();
    if (random.Below(2) == 0) {
      bytes.resize(random.Below(bytes.size() + 1));
    } else if (!bytes.empty()) {
      bytes[random.Below(bytes.size())] = static_cast<char>(random.Next());
    }
    const auto scanned = ScanEvent(Buffer(bytes));
    v1::GenerationEvent event;
    // Nested messages are not looked into: the scan may accept more, never less.
    if (event.ParseFromString(bytes)) {
      EXPECT_TRUE(scanned.has_value());
    }
    refused += !scanned.has_value();
  }
  EXPECT_GT(refused, 2000);
}

TEST(ScanEventTest, EmptyIsNoEventOfInterest) {
  const auto scanned = ScanEvent(Buffer(""));
  ASSERT_TRUE(scanned.has_value());
  EXPECT_EQ(scanned->kind, ScannedEvent::Kind::kOther);
}

}  // namespace
}  // namespace latentd
