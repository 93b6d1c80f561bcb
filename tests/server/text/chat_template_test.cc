#include "server/text/chat_template.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/text/text_data.h"

namespace latentd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

ChatInput Hello() {
  ChatInput input;
  input.messages = {{{"role", "user"}, {"content", "hello"}}};
  return input;
}

// The text, or the error's message.
std::string Render(const std::string& source, const ChatInput& input = Hello()) {
  const auto compiled = ChatTemplate::Compile(source, DemoTokenizer());
  if (!compiled.ok()) return std::string(compiled.status().message());
  const absl::StatusOr<RenderedChat> rendered = (*compiled)->Render(input);
  return rendered.ok() ? rendered->text : std::string(rendered.status().message());
}

TEST(ChatTemplateTest, OffersWhatTransformersOffers) {
  EXPECT_EQ(Render("{{ bos_token }}{{ eos_token }}"),
            "<｜begin▁of▁sentence｜><｜end▁of▁sentence｜>");
  EXPECT_EQ(Render("{{ tools is defined and tools is none }} {{ documents is none }}"),
            "True True");
  EXPECT_EQ(Render("{{ add_generation_prompt }} {{ thinking is defined }}"), "True False");
  EXPECT_THAT(Render("{{ strftime_now('%Y-%m-%d') }}"),
              MatchesRegex("20[0-9][0-9]-[0-9][0-9]-[0-9][0-9]"));
  EXPECT_EQ(
      Render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
      "1");
  EXPECT_EQ(Render("{%- generation -%} a {%- endgeneration %} b"), "a b");
  EXPECT_EQ(Render("{{ messages[0].content.upper().startswith('HE') }}"), "True");
}

TEST(ChatTemplateTest, PrintsAsPythonDoes) {
  ChatInput input = Hello();
  input.kwargs = Json::parse(R"({"v": {"b": [1, 2.0, 1e16, 1e-7, -0.0, 123456789.5, null, true],
                                       "a": "<é> & \"'\n"}})");
  EXPECT_EQ(
      Render("{{ v | tojson }}", input),
      "{\"b\": [1, 2.0, 1e+16, 1e-07, -0.0, 123456789.5, null, true], \"a\": \"<é> & \\\"'\\n\"}");
  EXPECT_EQ(Render("{{ v.a | tojson(ensure_ascii=true) }}", input), R"("<\u00e9> & \"'\n")");
  EXPECT_EQ(Render("{{ {'b': [1, {}], 'a': []} | tojson(indent=2) }}"),
            "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": []\n}");
  EXPECT_EQ(Render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}"),
            R"({"a":2,"b":1})");
  EXPECT_EQ(Render("{{ v.b }}", input), "[1, 2.0, 1e+16, 1e-07, -0.0, 123456789.5, None, True]");
  EXPECT_EQ(Render("{{ missing }}{{ none }}"), "None");
}

TEST(ChatTemplateTest, ToolCallsThatAreNoneAreDropped) {
  ChatInput input = Hello();
  for (const Json& none : {Json(nullptr), Json::array()}) {
    input.messages[0]["tool_calls"] = none;
    EXPECT_EQ(Render("{{ 'tool_calls' in messages[0] }}", input), "False");
  }
  input.messages[0]["content"] = nullptr;  // never dropped: templates test for it
  EXPECT_EQ(Render("{{ messages[0]['content'] is none }}", input), "True");
}

TEST(ChatTemplateTest, ReasoningIsFoundUnderEachOfItsNames) {
  for (const char* name : {"reasoning_content", "thinking", "reasoning"}) {
    ChatInput input = Hello();
    input.messages[0][name] = "why";
    EXPECT_EQ(Render("{{ messages[0].reasoning_content }} {{ messages[0].thinking }}", input),
              "why why");
  }
}

TEST(ChatTemplateTest, ContinuesTheFinalMessage) {
  ChatInput input;
  input.messages = {{{"role", "user"}, {"content", "a"}},
                    {{"role", "assistant"}, {"content", " b "}}};
  input.add_generation_prompt = false;
  input.continue_final_message = true;
  const std::string each = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
  EXPECT_EQ(Render(each, input), "[a][ b ");
  EXPECT_EQ(Render("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", input), "[a][b");
  EXPECT_THAT(Render("{{ messages[0].content }}", input), HasSubstr("continue_final_message"));
  input.add_generation_prompt = true;
  EXPECT_THAT(Render(each, input), HasSubstr("exclude one another"));
  input.add_generation_prompt = false;
  input.messages[1]["content"] = nullptr;
  EXPECT_THAT(Render(each, input), HasSubstr("no content to continue"));
  input.messages = Json::array();
  EXPECT_THAT(Render(each, input), HasSubstr("no messages"));
}

TEST(ChatTemplateTest, ErrorsSayWhatAndWhere) {
  EXPECT_THAT(Render("\n{% if %}"),
              AllOf(HasSubstr("chat template: syntax error"), HasSubstr("line 2")));
  EXPECT_EQ(Render("\n\n{{ raise_exception('Only user roles!') }}"),
            "chat template: Only user roles! (template line 3)");
  EXPECT_THAT(Render("{{ messages[0].nope.deep }}"), HasSubstr("undefined"));
  EXPECT_THAT(Render("{{ no_such() }}"), HasSubstr("no_such"));
  EXPECT_THAT(Render(std::string(65 << 10, ' ')), HasSubstr("has 66560 bytes; the limit is 65536"));
  EXPECT_THAT(Render("\xFF"), HasSubstr("not UTF-8 at byte 0"));
  // A name of the user's own, as it was written.
  ChatInput input = Hello();
  input.messages[0]["content"] = "<｜User｜>";
  EXPECT_EQ(Render("{{ raise_exception(messages[0].content) }}", input),
            "chat template: <｜User｜> (template line 1)");
}

TEST(ChatTemplateTest, BadInputIsRefused) {
  ChatInput input = Hello();
  input.messages = "x";
  EXPECT_EQ(Render("", input), "messages: not an array");
  input.messages = Json::array({1});
  EXPECT_THAT(Render("", input), HasSubstr("not an object"));
  input = Hello();
  input.tools = Json::object();
  EXPECT_EQ(Render("", input), "tools: not an array");
  input = Hello();
  input.kwargs = Json::array();
  EXPECT_EQ(Render("", input), "kwargs: not an object");
  input.kwargs = {{"messages", 1}};
  EXPECT_THAT(Render("", input), HasSubstr("`messages` is a field of its own"));
  input = Hello();
  input.messages[0]["content"] = "\xFF";
  EXPECT_THAT(Render("", input), HasSubstr("UTF-8"));
  input = Hello();
  Json* leaf = &input.messages[0]["content"];
  for (int i = 0; i < 100000; ++i) leaf = &(*leaf = Json::array({nullptr}))[0];
  EXPECT_EQ(Render("", input), "messages: nests more than 64 levels deep");
}

std::string Repeat(const std::string& text, int n) {
  std::string repeated;
  for (int i = 0; i < n; ++i) repeated += text;
  return repeated;
}

// No template hangs, crashes, or eats the memory.
TEST(ChatTemplateTest, HostileTemplatesRunOutOfFuel) {
  const std::string grow =
      "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set ns.s = ";
  const std::string nest =
      "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = ";
  const std::string sources[] = {
      "{% for i in range(10 ** 9) %}x{% endfor %}",
      "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
      "{{ 'x' * 10 ** 9 }}",
      "{{ '%1000000000d' | format(5) }}",
      "{{ '{:1000000000d}'.format(5) }}",
      "{{ ('a\n' * 1000) | indent(100000000) }}",
      "{{ ('x' * 10000000) | list | length }}",
      grow + "ns.s + ns.s %}{% endfor %}",
      grow + "ns.s ~ ns.s %}{% endfor %}",
      grow + "[ns.s, ns.s] | join %}{% endfor %}",
      grow + "ns.s.replace('x', 'xxxxxxxxxxxxxxxx') %}{% endfor %}",
      grow + "ns.s.join([ns.s, ns.s, ns.s]) %}{% endfor %}",
      nest + "[ns.x] %}{% endfor %}{{ ns.x }}",
      nest + "{'a': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
      "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
      "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
      "{% include 'chat_template' %}",
      "{{ " + Repeat("(", 20000) + "1" + Repeat(")", 20000) + " }}",
  };
  for (const std::string& source : sources) {
    const auto compiled = ChatTemplate::Compile(source, DemoTokenizer());
    const absl::Status status =
        compiled.ok() ? (*compiled)->Render(Hello()).status() : compiled.status();
    EXPECT_EQ(status.code(), kInvalid) << source.substr(0, 200) << ": " << status;
  }
}

// What fuel does not see is refused when compiling.
TEST(ChatTemplateTest, TemplatesThatNestWithoutBoundAreRefused) {
  const std::string forty = Repeat("{% set a = [a, a] %}", 40);
  const std::string sources[] = {
      "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns ~ '' }}",
      "{% set ns = namespace() %}{% for n in [ns] %}{% for m in [ns] %}{% set n.x = m %}{% endfor "
      "%}{% endfor %}",
      "{% macro f(p) %}{% set p.x = [p] %}{% endmacro %}{{ f(namespace()) }}",
      "{% set ns = namespace(x=0) %}{% for i in range(9) %}{% set ns.x = namespace(x=ns.x) %}{% "
      "endfor %}",
      "{% set a = [1] %}{% set b = [1] %}" + forty + "{{ a == b }}",
      "{% set a = [1] %}" + forty + "{{ a ~ '' }}",
      "{% macro f(x) %}{{ f([x, x]) }}{% endmacro %}{{ f(1) }}",
      "{% for x in [[1]] recursive %}{{ loop([[x, x]]) }}{% endfor %}",
      "{% set a = [[[1] * 99999] * 99999] * 99999 %}{% set b = [a] %}{{ a == b }}",
      "{{ [[[1] * 99999] * 99999] ~ '' }}",
      "{{ [[[1] * 99999] * 99999] | join }}",
  };
  for (const std::string& source : sources) {
    const absl::Status status = ChatTemplate::Compile(source, DemoTokenizer()).status();
    EXPECT_EQ(status.code(), kInvalid) << source.substr(0, 200);
  }
}

TEST(ChatTemplateTest, TemplatesThatCollectAndRebuildAreNotRefused) {
  EXPECT_EQ(
      Render("{% set ns = namespace(all=[], last=none) %}{% for m in messages %}"
             "{% set ns.all = ns.all + [{'role': m.role, 'content': m.content}] %}"
             "{% set ns.last = m %}{% endfor %}{% set messages = ns.all + messages[1:] %}"
             "{% set messages = messages | selectattr('role', 'equalto', 'user') | list %}"
             "{% for m in messages %}{% set m = dict(m, name='n') %}{{ m.role ~ m.name }}"
             "{{ m.content | trim }}{{ 'user' in [m.role] }}{{ ns.last == none }}{% endfor %}"),
      "usernhelloTrueFalse");
}

TEST(ChatTemplateTest, DeepExpressionsFitTheStack) {
  EXPECT_EQ(Render("{{ " + Repeat("-", 65000) + "1 }}"), "1");
  EXPECT_EQ(Render("{{ 0" + Repeat("+1", 32000) + " }}"), "32000");
  EXPECT_EQ(Render("{{ " + Repeat("not ", 16000) + "1 }}"), "True");
}

TEST(ChatTemplateTest, LongConversationsHaveFuelEnough) {
  ChatInput input;
  for (int i = 0; i < 5000; ++i) {
    input.messages.push_back({{"role", i % 2 == 0 ? "user" : "assistant"}, {"content", "x"}});
  }
  for (const std::string name : {"v3", "r1", "r1_distill", "v31"}) {
    const auto chat_template = MustCompile(
        ReadText(std::string(kGolden) + "templates/deepseek_" + name + ".jinja"), DemoTokenizer());
    EXPECT_TRUE(chat_template->Render(input).ok()) << name;
  }
}

}  // namespace
}  // namespace latentd
