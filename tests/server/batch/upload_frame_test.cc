#include "server/batch/upload_frame.h"

#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "server/status.h"

namespace latentd {
namespace {

using Kind = UploadFrame::Kind;
using testing::ElementsAre;

std::vector<std::string> ItemsOf(UploadFrame frame) {
  std::vector<std::string> items;
  while (const auto item = frame.NextItem()) items.emplace_back(*item);
  return items;
}

std::string Reason(std::string_view bytes) { return ErrorReason(UploadFrame::Cut(bytes).status()); }

TEST(UploadFrameTest, ItemsAreTheBytesThatWereSent) {
  v1::CreateJobRequest request;
  std::vector<std::string> sent;
  for (int i = 0; i < 100; ++i) {
    auto* item = request.mutable_items()->add_items();
    item->set_custom_id(std::to_string(i));
    item->mutable_complete()->set_text(std::string(i * 7, 'x'));
    sent.push_back(item->SerializeAsString());
  }
  const std::string bytes = request.SerializeAsString();
  const auto frame = UploadFrame::Cut(bytes);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->kind(), Kind::kItems);
  EXPECT_EQ(ItemsOf(*frame), sent);
}

TEST(UploadFrameTest, AnItemIsNotWrittenAgain) {
  // custom_id "b" twice, the length as a varint of two bytes: no serializer writes this.
  const std::string item("\x0a\x81\x00z\x0a\x01g", 7);
  std::string bytes("\x12\x09\x0a\x07", 4);
  bytes += item;
  const auto frame = UploadFrame::Cut(bytes);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_THAT(ItemsOf(*frame), ElementsAre(item));
}

TEST(UploadFrameTest, ItemsInSeveralPartsGoOn) {
  v1::CreateJobRequest one, other;
  one.mutable_items()->add_items()->set_custom_id("a");
  other.mutable_items()->add_items()->set_custom_id("b");
  // An unknown field between them, and one within.
  std::string bytes = one.SerializeAsString() + std::string("\x78\x05", 2) +
                      other.SerializeAsString() + std::string("\x12\x02\x10\x01", 4);
  const auto frame = UploadFrame::Cut(bytes);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(ItemsOf(*frame).size(), 2u);
}

TEST(UploadFrameTest, HeaderAndCommit) {
  v1::CreateJobRequest request;
  request.mutable_header()->set_request_id("key");
  request.mutable_header()->set_first_item(7);
  std::string bytes = request.SerializeAsString();
  auto frame = UploadFrame::Cut(bytes);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->kind(), Kind::kHeader);
  EXPECT_EQ(frame->header().request_id(), "key");
  EXPECT_EQ(frame->header().first_item(), 7);

  v1::CreateJobRequest commit;
  commit.mutable_commit()->set_item_count(3);
  bytes = commit.SerializeAsString();
  frame = UploadFrame::Cut(bytes);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->kind(), Kind::kCommit);
  EXPECT_EQ(frame->commit().item_count(), 3);

  EXPECT_EQ(Reason(request.SerializeAsString() + bytes), "BAD_FRAME");
  EXPECT_EQ(Reason(bytes + bytes), "BAD_FRAME");
}

TEST(UploadFrameTest, WhatIsNoFrameIsRefused) {
  EXPECT_EQ(Reason(""), "BAD_FRAME");
  EXPECT_EQ(Reason(std::string("\x78\x05", 2)), "BAD_FRAME");  // an unknown field alone
  EXPECT_EQ(Reason("\x12"), "MALFORMED_MESSAGE");              // no length
  EXPECT_EQ(Reason("\x12\x05zz"), "MALFORMED_MESSAGE");        // cut short
  EXPECT_EQ(Reason("\x12\x02\x0a\x07"),
            "MALFORMED_MESSAGE");  // an item that is longer than its frame
  EXPECT_EQ(Reason("\x0a\x03\x0a\x01\xff"), "MALFORMED_MESSAGE");  // a request_id that is no UTF-8
  EXPECT_EQ(Reason("\x13\x14"), "MALFORMED_MESSAGE");              // a group
  EXPECT_EQ(Reason("\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"), "MALFORMED_MESSAGE");
  EXPECT_EQ(Reason(std::string("\x02\x00", 2)), "MALFORMED_MESSAGE");  // field 0
}

// Every prefix of a frame, and random changes of it, are refused or have the items that protobuf
// finds.
TEST(UploadFrameTest, AgreesWithProtobufOnDamagedFrames) {
  v1::CreateJobRequest request;
  for (int i = 0; i < 5; ++i) {
    auto* item = request.mutable_items()->add_items();
    item->set_custom_id("item" + std::to_string(i));
    item->mutable_chat()->add_messages()->set_content("Hello");
  }
  const std::string bytes = request.SerializeAsString();
  std::mt19937 random(7);
  int num_cut = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string damaged = bytes;
    if (round < static_cast<int>(bytes.size())) {
      damaged.resize(round);
    } else {
      for (unsigned i = 0; i <= random() % 3; ++i) {
        damaged[random() % damaged.size()] = static_cast<char>(random() % 256);
      }
    }
    auto frame = UploadFrame::Cut(damaged);
    v1::CreateJobRequest parsed;
    const bool parses = parsed.ParseFromString(damaged);
    if (!frame.ok()) continue;
    if (frame->kind() != Kind::kItems) {
      EXPECT_TRUE(parses);
      continue;
    }
    const std::vector<std::string> items = ItemsOf(*frame);
    if (!parses) continue;  // an item is damaged, which the cutter does not look into
    ++num_cut;
    ASSERT_EQ(static_cast<int>(items.size()), parsed.items().items_size());
    for (size_t i = 0; i < items.size(); ++i) {
      v1::BatchItem item;
      ASSERT_TRUE(item.ParseFromString(items[i]));
      EXPECT_EQ(item.SerializeAsString(),
                parsed.items().items(static_cast<int>(i)).SerializeAsString());
    }
  }
  EXPECT_GT(num_cut, 1000);
}

}  // namespace
}  // namespace latentd
