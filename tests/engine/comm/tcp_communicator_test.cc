// A TCP rank and a peer that speaks nonsense.

#include "engine/comm/tcp_communicator.h"

#include <sys/socket.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/comm/call.h"
#include "engine/comm/tcp_forming.h"
#include "engine/comm/tcp_wire.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/comm/harness.h"
#include "tests/engine/comm/tcp_harness.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

// Rank 1 of two, by hand.
class NonsenseTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::thread join([&] {
      Joined joined = ranks_.Join(1, 0);
      ASSERT_TRUE(joined.ok()) << joined.status();
      communicator_ = *std::move(joined);
    });
    for (const Channel channel : {Channel::kData, Channel::kControl}) {
      Socket& socket = channel == Channel::kData ? data_ : control_;
      socket = Dial(ranks_.addresses[0]);
      SendBytes(socket, Hello{.channel = channel,
                              .epoch = 1,
                              .token = GroupToken(ranks_.addresses),
                              .from = 1,
                              .to = 0});
      EXPECT_EQ(ReceiveWhole<Welcome>(socket)->answer, Answer::kWelcome);
    }
    SendBytes(data_, MessageHeader{.kind = static_cast<uint32_t>(CallKind::kJoin), .number = 1});
    join.join();
  }

  void ExpectCallFails(absl::StatusCode code, const std::string& text) {
    std::vector<std::byte> in(8), out(16);
    const absl::Status status = communicator_->AllGather(in, absl::MakeSpan(out));
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(status.message(), HasSubstr(absl::StrCat("AllGather #1 for rank 1: ", text)));
    // The peer is told.
    const std::optional<Note> note = ReceiveWhole<Note>(control_);
    ASSERT_TRUE(note);
    EXPECT_EQ(note->magic, Note::kMagic);
    EXPECT_EQ(note->origin, 0);
    EXPECT_EQ(note->code, static_cast<int>(code));
    std::string told(note->length, ' ');
    EXPECT_EQ(recv(control_.fd(), told.data(), told.size(), MSG_WAITALL), told.size());
    EXPECT_EQ(told, std::string(status.message()));
  }

  Ranks ranks_{2, {.call_timeout = absl::Seconds(3)}};
  std::unique_ptr<Communicator> communicator_;
  Socket data_, control_;
};

constexpr MessageHeader kGather{
    .kind = static_cast<uint32_t>(CallKind::kAllGather), .number = 1, .size = 8};

TEST_F(NonsenseTest, BytesThatAreNoMessage) {
  SendText(data_, std::string(1000, 'x'));
  ExpectCallFails(absl::StatusCode::kInternal, "rank 1 sent bytes that are no message");
}

TEST_F(NonsenseTest, MoreBytesThanAnybodyHas) {
  MessageHeader header = kGather;
  header.size = uint64_t{1} << 60;
  SendBytes(data_, header);
  ExpectCallFails(absl::StatusCode::kInternal,
                  "rank 1 gives 1152921504606846976 bytes, rank 0 takes 8 bytes");
}

TEST_F(NonsenseTest, AnotherCall) {
  MessageHeader header = kGather;
  header.number = 2;
  SendBytes(data_, header);
  ExpectCallFails(absl::StatusCode::kInternal, "rank 1 calls AllGather #2, rank 0 AllGather #1");
}

TEST_F(NonsenseTest, ACallThatThereIsNot) {
  MessageHeader header = kGather;
  header.kind = 77;
  SendBytes(data_, header);
  ExpectCallFails(absl::StatusCode::kInternal, "rank 1 calls call 77 #1, rank 0 AllGather #1");
}

TEST_F(NonsenseTest, HalfAMessageThenTheEnd) {
  SendBytes(data_, kGather);
  SendText(data_, "half");
  shutdown(data_.fd(), SHUT_WR);
  shutdown(control_.fd(), SHUT_WR);
  ExpectCallFails(absl::StatusCode::kUnavailable, "rank 1 is gone: it closed the connection");
}

TEST_F(NonsenseTest, BytesThatTrickleDoNotKeepACallAlive) {
  std::atomic<bool> over = false;
  std::thread trickle([&] {
    MessageHeader header = kGather;
    header.size = 1 << 20;
    SendBytes(data_, header);
    while (!over) {
      SendText(data_, "x");
      absl::SleepFor(absl::Milliseconds(1));
    }
  });
  std::vector<std::byte> in(1 << 20), out(2 << 20);
  const absl::Status status = communicator_->AllGather(in, absl::MakeSpan(out));
  over = true;
  trickle.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_EQ(std::string(status.message()), "AllGather #1 for rank 1: not there within 3s");
}

TEST_F(NonsenseTest, ControlBytesThatAreNoMessage) {
  SendText(control_, std::string(100, 'x'));
  ExpectCallFails(absl::StatusCode::kInternal, "rank 1 sent bytes that are no message");
}

TEST_F(NonsenseTest, ANoteThatIsLongerThanAny) {
  SendBytes(control_, Note{.origin = 1, .code = 14, .length = 1u << 31});
  ExpectCallFails(absl::StatusCode::kInternal, "rank 1 sent bytes that are no message");
}

TEST_F(NonsenseTest, ANoteOfARankThatThereIsNot) {
  SendBytes(control_, Note{.origin = -1, .code = 14, .length = 0});
  ExpectCallFails(absl::StatusCode::kInternal, "rank 1 sent bytes that are no message");
}

TEST_F(NonsenseTest, ANoteInPiecesIsReadAndItsTextMadePrintable) {
  const std::string text = std::string("over\x01\xff") + std::string(Note::kMaxLength - 6, 'z');
  const Note note{.origin = 1, .code = 14, .length = Note::kMaxLength};
  std::string bytes(reinterpret_cast<const char*>(&note), sizeof(note));
  bytes += text;
  std::thread pieces([&] {
    for (size_t i = 0; i < bytes.size(); i += 100) {
      SendText(control_, bytes.substr(i, 100));
      absl::SleepFor(absl::Milliseconds(2));
    }
  });
  const absl::Status status = communicator_->Barrier();
  pieces.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(status.message(), HasSubstr("Barrier #1 for rank 1: rank 1: over??zzz"));
}

TEST_F(NonsenseTest, TheReasonOfAPeerComesBeforeItsEnd) {
  std::thread end([&] {
    EXPECT_TRUE(Eventually([&] { return communicator_->waiting_in() != ""; }));
    data_.Close();
    absl::SleepFor(absl::Milliseconds(5));
    SendBytes(control_, Note{.origin = 1, .code = 14, .length = 3});
    SendText(control_, "why");
  });
  const absl::Status status = communicator_->Barrier();
  end.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(std::string(status.message()), "Barrier #1 for rank 1: rank 1: why");
}

}  // namespace
}  // namespace latentd
