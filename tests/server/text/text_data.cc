#include "tests/server/text/text_data.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

namespace latentd {
namespace {

[[noreturn]] void Die(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

std::shared_ptr<const Tokenizer> MustLoad(const std::string& dir) {
  absl::StatusOr<std::shared_ptr<const Tokenizer>> tokenizer = Tokenizer::Load(dir);
  if (!tokenizer.ok()) Die(tokenizer.status().ToString());
  return *tokenizer;
}

}  // namespace

std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Die(path + ": cannot be read (tests run from the source root)");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

Json ReadJson(const std::string& path) { return Json::parse(ReadText(path)); }

std::shared_ptr<const Tokenizer> DemoTokenizer() {
  static const auto* const tokenizer = new std::shared_ptr<const Tokenizer>(MustLoad(kDemoModel));
  return *tokenizer;
}

std::shared_ptr<const ChatTemplate> MustCompile(const std::string& source,
                                                std::shared_ptr<const Tokenizer> tokenizer) {
  absl::StatusOr<std::shared_ptr<const ChatTemplate>> compiled =
      ChatTemplate::Compile(source, std::move(tokenizer));
  if (!compiled.ok()) Die(compiled.status().ToString());
  return *compiled;
}

std::shared_ptr<const Tokenizer> DeepSeekTokenizer(const std::string& name) {
  const char* dir = std::getenv("LATENTD_DEEPSEEK_TOKENIZERS");
  if (dir == nullptr || *dir == '\0') return nullptr;
  return MustLoad(std::string(dir) + "/" + name);
}

ChatInput ToChatInput(const Json& golden_case) {
  ChatInput input;
  input.messages = golden_case["messages"];
  if (golden_case.contains("tools")) input.tools = golden_case["tools"];
  if (golden_case.contains("kwargs")) input.kwargs = golden_case["kwargs"];
  input.add_generation_prompt = golden_case["add_generation_prompt"];
  input.continue_final_message = golden_case.value("continue_final_message", false);
  return input;
}

}  // namespace latentd
