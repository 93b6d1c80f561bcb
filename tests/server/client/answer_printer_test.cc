#include "server/client/answer_printer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

#include "tests/server/client/scripted_server.h"

namespace latentd {
namespace {

constexpr PrintStyle kTerminal = {
    .reasoning = true, .color = true, .escape = true, .final_newline = true};
constexpr PrintStyle kPipe = {.final_newline = true};
constexpr PrintStyle kPipeWithReasoning = {.reasoning = true, .final_newline = true};

std::string Printed(PrintStyle style, const std::vector<v1::GenerationEvent>& events) {
  std::ostringstream out;
  AnswerPrinter printer(style, out);
  for (const v1::GenerationEvent& event : events) printer.Print(event, absl::Now());
  printer.End();
  return out.str();
}

const std::vector<v1::GenerationEvent> kThoughtAndAnswer = {
    StartedEvent(),        ReasoningEvent("347 + 285"), ReasoningEvent(" = 632"),
    ContentEvent("It is"), ContentEvent(" 632."),       FinishedEvent()};

TEST(AnswerPrinterTest, DimsReasoningOnATerminal) {
  EXPECT_EQ(Printed(kTerminal, kThoughtAndAnswer), "\x1b[2m347 + 285 = 632\x1b[0m\n\nIt is 632.\n");
}

TEST(AnswerPrinterTest, MarksReasoningWithoutColor) {
  EXPECT_EQ(Printed(kPipeWithReasoning, kThoughtAndAnswer),
            "<think>\n347 + 285 = 632\n</think>\n\nIt is 632.\n");
}

TEST(AnswerPrinterTest, LeavesReasoningOut) {
  EXPECT_EQ(Printed(kPipe, kThoughtAndAnswer), "It is 632.\n");
}

TEST(AnswerPrinterTest, RawIsTheAnswerAlone) {
  EXPECT_EQ(Printed(PrintStyle{}, kThoughtAndAnswer), "It is 632.");
  EXPECT_EQ(Printed(PrintStyle{}, {ContentEvent("a\x1b[31mb\n")}), "a\x1b[31mb\n");
}

TEST(AnswerPrinterTest, OneEmptyLineBetweenThePartsWhateverTheModelWrote) {
  for (const char* reasoning : {"x", "x\n", "x\n\n"}) {
    for (const char* content : {"y", "\ny", "\n\ny"}) {
      const std::string printed =
          Printed(kTerminal, {ReasoningEvent(reasoning), ContentEvent(content)});
      const size_t newlines = std::count(printed.begin(), printed.end(), '\n');
      const size_t given = std::string(reasoning).size() + std::string(content).size() - 2;
      EXPECT_EQ(newlines, std::max<size_t>(given, 2) + 1) << printed;
    }
  }
}

TEST(AnswerPrinterTest, EndsAStreamThatBreaksWithinReasoning) {
  EXPECT_EQ(Printed(kTerminal, {ReasoningEvent("hm")}), "\x1b[2mhm\x1b[0m\n");
  EXPECT_EQ(Printed(kPipeWithReasoning, {ReasoningEvent("hm")}), "<think>\nhm\n</think>\n");
}

TEST(AnswerPrinterTest, NothingForAnEmptyAnswer) {
  EXPECT_EQ(Printed(kTerminal, {StartedEvent(), FinishedEvent(), UsageEvent(3, 0, 1)}), "");
}

TEST(AnswerPrinterTest, AnAnswerDoesNotDriveTheTerminal) {
  EXPECT_EQ(Printed(kTerminal, {ContentEvent("a\x1b]0;title\x07\r\tb\x7f\n")}),
            "a^[]0;title^G^M\tb^?\n");
  EXPECT_EQ(EscapeControls("\xc2\x9b"
                           "2J"),
            "^[[2J");
  EXPECT_EQ(EscapeControls("Grüße, 你好 🙂\n"), "Grüße, 你好 🙂\n");
  EXPECT_EQ(EscapeControls("\xc2"), "\xc2");
}

TEST(AnswerPrinterTest, PrintsToolCalls) {
  v1::GenerationEvent call;
  auto& fragment = *call.mutable_delta()->mutable_tool_call();
  fragment.set_name("weather");
  fragment.set_arguments("{\"city\":");
  v1::GenerationEvent rest;
  rest.mutable_delta()->mutable_tool_call()->set_arguments(" \"Rome\"}");
  EXPECT_EQ(Printed(kPipe, {ContentEvent("Let me see."), call, rest}),
            "Let me see.\n\nweather {\"city\": \"Rome\"}\n");
}

TEST(AnswerPrinterTest, JsonIsOneEventALine) {
  EXPECT_EQ(Printed(PrintStyle{.json = true},
                    {ReasoningEvent("a\n", 0), ContentEvent("b"), UsageEvent(5, 4, 3)}),
            "{\"delta\":{\"reasoning\":\"a\\n\"}}\n"
            "{\"delta\":{\"content\":\"b\",\"token_ids\":[100000]}}\n"
            "{\"usage\":{\"prompt_tokens\":5,\"cached_tokens\":4,\"completion_tokens\":3}}\n");
}

TEST(AnswerPrinterTest, StatsTellTokensSpeedAndFirstToken) {
  std::ostringstream out;
  AnswerPrinter printer(kPipe, out);
  const absl::Time sent = absl::Now();
  EXPECT_EQ(printer.Stats(sent), "");
  printer.Print(ReasoningEvent("a"), sent + absl::Milliseconds(40));
  printer.Print(ContentEvent("b"), sent + absl::Milliseconds(140));
  printer.Print(ContentEvent("c"), sent + absl::Milliseconds(540));
  printer.Print(FinishedEvent(v1::FINISH_REASON_LENGTH), sent + absl::Milliseconds(540));
  printer.Print(UsageEvent(12, 8, 11, 4), sent + absl::Milliseconds(540));
  // 10 tokens after the first in half a second.
  EXPECT_EQ(printer.Stats(sent),
            "12 prompt tokens (8 cached), 11 completion tokens (4 reasoning), 20.0 tokens/s, first "
            "token after 40 ms, finish: length");
  EXPECT_EQ(printer.content(), "bc");
}

}  // namespace
}  // namespace latentd
