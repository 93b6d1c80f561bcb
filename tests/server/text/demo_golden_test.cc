// The demo model's tokenizer and chat template against Transformers.

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "server/text/detokenizer.h"
#include "tests/server/text/text_data.h"

namespace latentd {
namespace {

const Json& Golden() {
  static const auto* const golden = new Json(ReadJson(std::string(kGolden) + "demo.json"));
  return *golden;
}

TEST(DemoGoldenTest, Tokenizer) {
  ASSERT_GT(Golden()["tokenizer"].size(), 60);
  for (const Json& c : Golden()["tokenizer"]) {
    const auto ids = DemoTokenizer()->Encode(c["text"].get<std::string>(), true);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, c["ids"].get<std::vector<int32_t>>()) << c["text"];
    EXPECT_EQ(DemoTokenizer()->Decode(*ids, false), c["decode"].get<std::string>());
    EXPECT_EQ(DemoTokenizer()->Decode(*ids, true), c["decode_skip_special"].get<std::string>());
  }
}

TEST(DemoGoldenTest, Streaming) {
  ASSERT_GT(Golden()["streaming"].size(), 30);
  for (const Json& c : Golden()["streaming"]) {
    Detokenizer detokenizer(DemoTokenizer(), c["skip_special_tokens"]);
    std::vector<std::string> pieces;
    for (const int32_t id : c["ids"]) pieces.push_back(detokenizer.Push(id));
    EXPECT_EQ(pieces, c["pieces"].get<std::vector<std::string>>()) << c["kind"];
    EXPECT_EQ(detokenizer.Flush(), c["final"].get<std::string>()) << c["kind"];
  }
}

TEST(DemoGoldenTest, Chat) {
  ASSERT_GT(Golden()["chat"].size(), 100);
  const auto chat_template = MustCompile(DemoTokenizer()->chat_template(), DemoTokenizer());
  for (const Json& c : Golden()["chat"]) {
    SCOPED_TRACE(c.dump());
    ChatInput input = ToChatInput(c);
    input.parse_control_tokens = true;
    const absl::StatusOr<RenderedChat> got = chat_template->Render(input);
    const Json& want = c["results"]["demo"];
    if (want.contains("error")) {
      EXPECT_EQ(got.status().code(), absl::StatusCode::kInvalidArgument);
      continue;
    }
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(got->text, want["text"].get<std::string>());
    EXPECT_EQ(got->tokens, want["ids"].get<std::vector<int32_t>>());
  }
}

}  // namespace
}  // namespace latentd
