#include "server/text/reasoning_parser.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace latentd {
namespace {

constexpr char kOpenTail[] = "<｜User｜>hi<｜Assistant｜><think>\n";
constexpr char kPlainTail[] = "<｜User｜>hi<｜Assistant｜>";

struct Case {
  std::string tail;
  std::string answer;
  std::string reasoning;
  std::string content;
};

const std::vector<Case>& Cases() {
  static const auto* const cases = new std::vector<Case>{
      {kOpenTail, "I add.\n</think>\n\n632", "I add.", "632"},
      {kOpenTail, "I add.</think>632", "I add.", "632"},
      {kOpenTail, "a\n\n</think>\n\n\n\nb\n\nc\n", "a\n", "b\n\nc\n"},
      {kOpenTail, "never closed\n</thin", "never closed\n</thin", ""},
      {kOpenTail, "\n</think>\n", "", ""},
      {kOpenTail, "", "", ""},
      {kOpenTail, "a </think a<think>b</think>c</think>d", "a </think a<think>b", "c</think>d"},
      {"<｜Assistant｜><think>", "\nI add.\n</think>\n\n632", "I add.", "632"},
      {"<｜Assistant｜><think>", "\n\nx</think>y", "\nx", "y"},
      {kPlainTail, "632", "", "632"},
      {kPlainTail, "<think>\nI add.\n</think>\n\n632", "I add.", "632"},
      {kPlainTail, "see <think>", "", "see <think>"},  // only at the beginning
      {kPlainTail, "<thin", "", "<thin"},
      {kPlainTail, "<think>", "", ""},
      {kPlainTail, "\n\nkept", "", "\n\nkept"},
      {"<｜Assistant｜><think></think>", "\n\n632", "", "632"},
      {"<think>a</think>b<｜end▁of▁sentence｜><｜User｜>x<｜Assistant｜>", "632", "", "632"},
      {"<｜User｜>what is <think>?<｜Assistant｜>", "a tag", "", "a tag"},
      // continue_final_message
      {"<｜Assistant｜><think>\nLet me", " see\n</think>\n\n632", " see", "632"},
      {"<｜Assistant｜><think>\na\n</think>\n\n63", "\n2", "", "\n2"},
      {"", "x", "", "x"},
  };
  return *cases;
}

ReasoningParser::Parts Parse(const Case& c, const std::vector<std::string>& pieces) {
  ReasoningParser parser(c.tail);
  ReasoningParser::Parts all;
  for (const std::string& piece : pieces) {
    const ReasoningParser::Parts parts = parser.Push(piece);
    all.reasoning += parts.reasoning;
    all.content += parts.content;
  }
  const ReasoningParser::Parts rest = parser.Flush();
  return {all.reasoning + rest.reasoning, all.content + rest.content};
}

TEST(ReasoningParserTest, SplitsAnswers) {
  for (const Case& c : Cases()) {
    const ReasoningParser::Parts parts = Parse(c, {c.answer});
    EXPECT_EQ(parts.reasoning, c.reasoning) << c.tail << " + " << c.answer;
    EXPECT_EQ(parts.content, c.content) << c.tail << " + " << c.answer;
  }
}

TEST(ReasoningParserTest, AnyCutGivesTheSame) {
  for (const Case& c : Cases()) {
    // Every way to cut it into three, and byte by byte.
    std::vector<std::vector<std::string>> cuts;
    for (size_t i = 0; i <= c.answer.size(); ++i) {
      for (size_t j = i; j <= c.answer.size(); ++j) {
        cuts.push_back({c.answer.substr(0, i), c.answer.substr(i, j - i), c.answer.substr(j)});
      }
    }
    cuts.emplace_back();
    for (const char byte : c.answer) cuts.back().emplace_back(1, byte);
    for (const auto& pieces : cuts) {
      const ReasoningParser::Parts parts = Parse(c, pieces);
      ASSERT_EQ(parts.reasoning, c.reasoning) << c.tail << " + " << c.answer;
      ASSERT_EQ(parts.content, c.content) << c.tail << " + " << c.answer;
    }
  }
}

TEST(ReasoningParserTest, HoldsBackOnlyWhatMayBeATag) {
  ReasoningParser parser(kOpenTail);
  EXPECT_EQ(parser.Push("a < b").reasoning, "a < b");
  EXPECT_EQ(parser.Push("\n").reasoning, "");
  EXPECT_EQ(parser.Push("c</").reasoning, "\nc");
  EXPECT_TRUE(parser.in_reasoning());
  EXPECT_EQ(parser.Push("think>").reasoning, "");
  EXPECT_FALSE(parser.in_reasoning());
  EXPECT_EQ(parser.Push("\n\nd").content, "d");
}

}  // namespace
}  // namespace latentd
