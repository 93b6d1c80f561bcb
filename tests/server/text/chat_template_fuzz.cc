// A chat template of arbitrary bytes, rendered over a conversation of arbitrary JSON. The input is
// the template, a zero byte, then {"messages": ..., "tools": ..., "kwargs": ...}.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "server/text/utf8.h"
#include "tests/server/text/text_data.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace latentd;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = input.find('\0');
  const auto chat_template = ChatTemplate::Compile(input.substr(0, end), DemoTokenizer());
  if (!chat_template.ok()) return 0;
  ChatInput chat;
  chat.messages = {{{"role", "user"}, {"content", "<｜User｜>hello"}}};
  if (end != input.npos) {
    const Json json = Json::parse(input.substr(end + 1), nullptr, /*allow_exceptions=*/false);
    if (json.is_object()) {
      if (json.contains("messages")) chat.messages = json["messages"];
      if (json.contains("tools")) chat.tools = json["tools"];
      if (json.contains("kwargs")) chat.kwargs = json["kwargs"];
    }
  }
  for (const bool parse : {false, true}) {
    chat.parse_control_tokens = parse;
    for (const bool go_on : {false, true}) {
      chat.continue_final_message = go_on;
      chat.add_generation_prompt = !go_on;
      const auto rendered = (*chat_template)->Render(chat);
      if (rendered.status().code() == absl::StatusCode::kInternal) std::abort();  // a panic
      if (rendered.ok() && !IsUtf8(rendered->text)) std::abort();
    }
  }
  return 0;
}
