#include "server/text/tokenizer.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/text/text_data.h"

namespace latentd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// A folder with a copy of the demo tokenizer to damage.
class TokenizerLoadTest : public testing::Test {
 protected:
  TokenizerLoadTest()
      : dir_(std::filesystem::path(testing::TempDir()) /
             testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  ~TokenizerLoadTest() override { std::filesystem::remove_all(dir_); }

  void Write(const std::string& name, const std::string& text) {
    std::ofstream(dir_ / name) << text;
  }
  absl::Status Load() { return Tokenizer::Load(dir_).status(); }
  // Loads the demo tokenizer with a change.
  template <typename Change>
  absl::Status LoadChanged(Change change) {
    Json json = ReadJson(std::string(kDemoModel) + "/tokenizer.json");
    change(json);
    Write("tokenizer.json", json.dump());
    return Load();
  }

  std::filesystem::path dir_;
};

// The id of the vocabulary's last token.
Json& LastEntry(Json& tokenizer) { return std::prev(tokenizer["model"]["vocab"].end()).value(); }

void ExpectRefused(const absl::Status& status, const std::string& part) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("tokenizer"), HasSubstr(part)));
}

TEST_F(TokenizerLoadTest, AMissingFileIsNamed) {
  const absl::Status status = Load();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("tokenizer.json"));
}

TEST_F(TokenizerLoadTest, GarbageIsRefused) {
  for (const std::string text : {"", "{", "[]", "{}", "\xFF\xFE", R"({"model": {}})",
                                 R"({"model": {"type": "BPE", "vocab": {}, "merges": []}})"}) {
    Write("tokenizer.json", text);
    ExpectRefused(Load(), "tokenizer.json: ");
  }
  Write("tokenizer.json", "{\"a\": " + std::string(100000, '['));
  ExpectRefused(Load(), "tokenizer.json: ");
}

TEST_F(TokenizerLoadTest, AHugeFileIsRefusedUnread) {
  Write("tokenizer.json", "{}");
  std::filesystem::resize_file(dir_ / "tokenizer.json", uintmax_t{1} << 33);  // sparse
  ExpectRefused(Load(), "has 8589934592 bytes; the limit is 268435456");
}

TEST_F(TokenizerLoadTest, WhatIsNotSupportedIsNamed) {
  ExpectRefused(LoadChanged([](Json& json) { json["model"]["type"] = "WordPiece"; }),
                "model.type is WordPiece; supported is BPE");
  ExpectRefused(LoadChanged([](Json& json) { json["model"]["dropout"] = 0.5; }),
                "model.dropout is 0.5");
  ExpectRefused(LoadChanged([](Json& json) { json["decoder"] = nullptr; }), "decoder");
  ExpectRefused(LoadChanged([](Json& json) { LastEntry(json) = 1 << 24; }),
                "the largest id is 16777216");
  ExpectRefused(LoadChanged([](Json& json) { json["added_tokens"].back()["id"] = 5000; }),
                "has id 5000, but the vocabulary puts it at");
  ExpectRefused(LoadChanged([](Json& json) { json["model"]["merges"].push_back("no such"); }), "");
}

TEST_F(TokenizerLoadTest, IdsMayHaveGaps) {
  int32_t moved = 0;
  ASSERT_TRUE(LoadChanged([&](Json& json) { moved = std::exchange(LastEntry(json), 9000); }).ok());
  const auto tokenizer = *Tokenizer::Load(dir_);
  const std::string text(DemoTokenizer()->TokenBytes(moved));
  EXPECT_EQ(tokenizer->vocab_size(), 9001);
  EXPECT_EQ(tokenizer->TokenBytes(moved), "");
  EXPECT_EQ(tokenizer->TokenBytes(9000), text);
  EXPECT_EQ(tokenizer->Decode({moved, 8999, 9000, -1, 9001, INT32_MAX}, false), text);
}

TEST_F(TokenizerLoadTest, SettingsOfWhoSavedItAreReset) {
  ASSERT_TRUE(
      LoadChanged([](Json& json) {
        json["truncation"] = {
            {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}, {"direction", "Right"}};
      }).ok());
  EXPECT_EQ((*Tokenizer::Load(dir_))->Encode("one two three four", true)->size(),
            DemoTokenizer()->Encode("one two three four", true)->size());
}

TEST_F(TokenizerLoadTest, ReadsEachFormOfTheConfig) {
  std::filesystem::copy(std::string(kDemoModel) + "/tokenizer.json", dir_ / "tokenizer.json");
  auto tokenizer = *Tokenizer::Load(dir_);
  EXPECT_EQ(tokenizer->bos_token(), "");
  EXPECT_EQ(tokenizer->chat_template(), "");
  Write("tokenizer_config.json",
        R"({"bos_token": {"content": "<b>", "special": true}, "eos_token": null,
    "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})");
  tokenizer = *Tokenizer::Load(dir_);
  EXPECT_EQ(tokenizer->bos_token(), "<b>");
  EXPECT_EQ(tokenizer->eos_token(), "");
  EXPECT_EQ(tokenizer->chat_template(), "d");
  Write("chat_template.jinja", "from the file");
  EXPECT_EQ((*Tokenizer::Load(dir_))->chat_template(), "from the file");
  Write("tokenizer_config.json", "[");
  ExpectRefused(Load(), "tokenizer_config.json: not a JSON object");
}

TEST(TokenizerTest, KnowsItsTokens) {
  const auto& tokenizer = *DemoTokenizer();
  EXPECT_EQ(tokenizer.vocab_size(), 4096);
  const int32_t eos = *tokenizer.TokenId("<｜end▁of▁sentence｜>");
  const int32_t user = *tokenizer.TokenId("<｜User｜>");
  EXPECT_TRUE(tokenizer.IsSpecial(eos) && tokenizer.IsAdded(eos));
  EXPECT_TRUE(!tokenizer.IsSpecial(user) && tokenizer.IsAdded(user));
  EXPECT_FALSE(tokenizer.IsAdded(100) || tokenizer.IsAdded(-1) || tokenizer.IsAdded(4096));
  EXPECT_EQ(tokenizer.TokenBytes(user), "<｜User｜>");
  EXPECT_EQ(tokenizer.TokenId("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer.TokenId("\xFF"), std::nullopt);
}

TEST(TokenizerTest, RefusesTextThatIsNotUtf8) {
  for (const bool parse : {false, true}) {
    EXPECT_THAT(std::string(DemoTokenizer()->Encode("ab\xFF", parse).status().message()),
                HasSubstr("not UTF-8 at byte 2"));
    EXPECT_TRUE(DemoTokenizer()->Encode("", parse)->empty());
  }
}

// The regular expressions backtrack; long runs must not make them quadratic or fail.
TEST(TokenizerTest, LongRunsOfOneCharacter) {
  for (const std::string unit : {" ", "a", "1", "!", "\n", "哈", "<", "\u0301", " \n", "a "}) {
    std::string text;
    while (text.size() < (unit == " " ? 1'500'000 : 200'000)) text += unit;
    const auto ids = DemoTokenizer()->Encode(text + "x", true);
    ASSERT_TRUE(ids.ok()) << "of '" << unit << "': " << ids.status();
    EXPECT_EQ(DemoTokenizer()->Decode(*ids, false), text + "x");
  }
}

TEST(TokenizerTest, ManyThreadsMayUseIt) {
  const std::vector<int32_t> want = *DemoTokenizer()->Encode("What is MLA? <think>", true);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&want] {
      for (int run = 0; run < 200; ++run) {
        ASSERT_EQ(*DemoTokenizer()->Encode("What is MLA? <think>", true), want);
        ASSERT_EQ(DemoTokenizer()->Decode(want, false), "What is MLA? <think>");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace latentd
