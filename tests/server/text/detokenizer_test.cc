#include "server/text/detokenizer.h"

#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "server/text/utf8.h"
#include "tests/server/text/text_data.h"

namespace latentd {
namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";

// A token whose bytes are just `byte`.
int32_t ByteToken(uint8_t byte) {
  for (int32_t id = 0; id < DemoTokenizer()->vocab_size(); ++id) {
    const std::string_view bytes = DemoTokenizer()->TokenBytes(id);
    if (bytes.size() == 1 && static_cast<uint8_t>(bytes[0]) == byte) return id;
  }
  ADD_FAILURE() << "no token for byte " << int{byte};
  return -1;
}

TEST(DetokenizerTest, GivesACharacterWhenItIsWhole) {
  Detokenizer detokenizer(DemoTokenizer(), true);
  EXPECT_EQ(detokenizer.Push(ByteToken(0xF0)), "");
  EXPECT_EQ(detokenizer.Push(ByteToken(0x9F)), "");
  EXPECT_EQ(detokenizer.Push(ByteToken(0x98)), "");
  EXPECT_EQ(detokenizer.Push(ByteToken(0x80)), "😀");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(DetokenizerTest, AnUnfinishedCharacterIsFlushedAsOneReplacement) {
  Detokenizer detokenizer(DemoTokenizer(), true);
  EXPECT_EQ(detokenizer.Push(ByteToken(0xE4)), "");
  EXPECT_EQ(detokenizer.Push(ByteToken(0xB8)), "");
  EXPECT_EQ(detokenizer.Flush(), kReplacement);
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(DetokenizerTest, SpecialTokensAreSkippedOrWritten) {
  const int32_t eos = *DemoTokenizer()->TokenId("<｜end▁of▁sentence｜>");
  const int32_t user = *DemoTokenizer()->TokenId("<｜User｜>");
  Detokenizer skipping(DemoTokenizer(), true);
  EXPECT_EQ(skipping.Push(eos), "");
  EXPECT_EQ(skipping.Push(user), "<｜User｜>");  // special: false
  Detokenizer writing(DemoTokenizer(), false);
  EXPECT_EQ(writing.Push(eos), "<｜end▁of▁sentence｜>");
}

TEST(DetokenizerTest, IdsWithoutATokenAreNothing) {
  Detokenizer detokenizer(DemoTokenizer(), false);
  EXPECT_EQ(detokenizer.Push(-1), "");
  EXPECT_EQ(detokenizer.Push(DemoTokenizer()->vocab_size()), "");
  EXPECT_EQ(detokenizer.Push(INT32_MAX), "");
}

TEST(DetokenizerTest, PiecesAndFlushAreTheDecodedWhole) {
  std::mt19937 random(1);
  for (int run = 0; run < 3000; ++run) {
    const bool skip = run % 2 == 0;
    // Mostly single bytes: most sequences of them are no UTF-8.
    std::vector<int32_t> ids(random() % 40);
    for (int32_t& id : ids) {
      id = random() % 4 == 0 ? static_cast<int32_t>(random() % 5000)
                             : static_cast<int32_t>(random() % 260);
    }
    Detokenizer detokenizer(DemoTokenizer(), skip);
    std::string text;
    for (const int32_t id : ids) {
      const std::string piece = detokenizer.Push(id);
      ASSERT_TRUE(IsUtf8(piece));
      text += piece;
    }
    ASSERT_EQ(text + detokenizer.Flush(), DemoTokenizer()->Decode(ids, skip));
  }
}

// As Python's bytes.decode("utf-8", "replace").
TEST(Utf8Test, ReplacesMaximalParts) {
  const struct {
    std::string bytes;
    std::string text;
  } kCases[] = {
      {"a\x80"
       "b",
       std::string("a") + kReplacement + "b"},
      {"\xE4\xB8"
       "a",
       std::string(kReplacement) + "a"},                       // a cut character is one
      {"\xF0\x9F\x98", kReplacement},                          // so at the end
      {"\xC0\x80", std::string(kReplacement) + kReplacement},  // overlong
      {"\xED\xA0\x80", std::string(kReplacement) + kReplacement + kReplacement},  // surrogate
      {"\xF4\x90\x80\x80",
       std::string(kReplacement) + kReplacement + kReplacement + kReplacement},  // > U+10FFFF
      {"\xF5", kReplacement},
      {"\xEF\xBF\xBD", kReplacement},
      {std::string("\0", 1), std::string("\0", 1)},
  };
  for (const auto& c : kCases) {
    std::string bytes = c.bytes;
    std::string text;
    TakeUtf8(bytes, true, text);
    EXPECT_EQ(text, c.text);
    EXPECT_EQ(bytes, "");
  }
}

}  // namespace
}  // namespace latentd
