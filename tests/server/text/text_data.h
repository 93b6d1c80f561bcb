#ifndef LATENTD_TESTS_SERVER_TEXT_TEXT_DATA_H_
#define LATENTD_TESTS_SERVER_TEXT_TEXT_DATA_H_

#include <memory>
#include <string>

#include "nlohmann/json.hpp"
#include "server/text/chat_template.h"
#include "server/text/tokenizer.h"

namespace latentd {

using Json = nlohmann::ordered_json;

// Paths are relative to the source root, where ctest runs the tests.
inline constexpr char kDemoModel[] = "deploy/demo-model";
inline constexpr char kGolden[] = "tests/golden/text/";

// Both end the program when the file is not there.
std::string ReadText(const std::string& path);
Json ReadJson(const std::string& path);

// The demo model's tokenizer.
std::shared_ptr<const Tokenizer> DemoTokenizer();
std::shared_ptr<const ChatTemplate> MustCompile(const std::string& source,
                                                std::shared_ptr<const Tokenizer> tokenizer);

// `name` in the folder that LATENTD_DEEPSEEK_TOKENIZERS tells; null when that is not set.
std::shared_ptr<const Tokenizer> DeepSeekTokenizer(const std::string& name);

// A conversation of a golden file.
ChatInput ToChatInput(const Json& golden_case);

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_TEXT_TEXT_DATA_H_
