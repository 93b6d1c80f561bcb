// A tokenizer.json of arbitrary bytes, or the demo model's with a text of arbitrary bytes.

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "server/text/detokenizer.h"
#include "server/text/utf8.h"
#include "tests/server/text/text_data.h"

namespace latentd {
namespace {

void Check(bool holds) {
  if (!holds) std::abort();
}

void EncodeAndDecode(const std::shared_ptr<const Tokenizer>& tokenizer, const std::string& text,
                     bool is_demo) {
  for (const bool parse : {false, true}) {
    const auto ids = tokenizer->Encode(text, parse);
    if (!ids.ok()) {
      Check(!IsUtf8(text) || !is_demo);
      continue;
    }
    const std::string decoded = tokenizer->Decode(*ids, false);
    Check(IsUtf8(decoded));
    Check(!is_demo || decoded == text);
    Detokenizer detokenizer(tokenizer, false);
    std::string pieces;
    for (const int32_t id : *ids) {
      Check(!is_demo || parse || !tokenizer->IsAdded(id));
      pieces += detokenizer.Push(id);
    }
    Check(pieces + detokenizer.Flush() == decoded);
  }
}

// A folder of this process's own, for Tokenizer::Load() reads files.
const std::filesystem::path& Folder() {
  static const auto* const folder = [] {
    std::string name = (std::filesystem::temp_directory_path() / "tokenizer_fuzz_XXXXXX").string();
    Check(mkdtemp(name.data()) != nullptr);
    return new std::filesystem::path(name);
  }();
  return *folder;
}

}  // namespace
}  // namespace latentd

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace latentd;
  if (size == 0) return 0;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 2 == 0) {
    EncodeAndDecode(DemoTokenizer(), text, /*is_demo=*/true);
    return 0;
  }
  std::ofstream(Folder() / "tokenizer.json") << text;
  const auto tokenizer = Tokenizer::Load(Folder());
  if (tokenizer.ok()) EncodeAndDecode(*tokenizer, "a b<x> 12 \xE4\xBD\xA0", /*is_demo=*/false);
  return 0;
}
