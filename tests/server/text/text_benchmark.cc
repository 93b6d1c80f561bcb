// Speed of the text layer, in CPU time of one thread. Run from the source root; the tokenizer is
// the demo model's, or DeepSeek-V3's where LATENTD_DEEPSEEK_TOKENIZERS tells its folder.

#include <string>
#include <string_view>
#include <vector>

#include "benchmark/benchmark.h"
#include "server/text/detokenizer.h"
#include "server/text/reasoning_parser.h"
#include "server/text/stop_matcher.h"
#include "tests/server/text/text_data.h"

namespace latentd {
namespace {

std::shared_ptr<const Tokenizer> BenchmarkTokenizer() {
  static const auto* const tokenizer = [] {
    auto deepseek = DeepSeekTokenizer("deepseek-v3");
    return new std::shared_ptr<const Tokenizer>(deepseek == nullptr ? DemoTokenizer() : deepseek);
  }();
  return *tokenizer;
}

// 0.9 MB of English, code, Chinese and Japanese: the texts of the golden cases, over and over.
const std::string& MixedText() {
  static const auto* const text = [] {
    auto* mixed = new std::string();
    std::string round;
    const Json cases = ReadJson(std::string(kGolden) + "tokenizer.json")["cases"];
    for (const Json& c : cases) {
      const std::string kind = c["kind"];
      if (kind == "english" || kind == "code" || kind == "chinese" || kind == "japanese" ||
          kind == "mixed_script") {
        round += c["text"].get<std::string>() + "\n";
      }
    }
    while (mixed->size() < 900'000) *mixed += round;
    return mixed;
  }();
  return *text;
}

// `text` in pieces of about `size` bytes, cut between characters.
std::vector<std::string_view> Chunks(std::string_view text, size_t size) {
  std::vector<std::string_view> chunks;
  while (!text.empty()) {
    size_t end = std::min(size, text.size());
    while (end < text.size() && (text[end] & 0xC0) == 0x80) ++end;
    chunks.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
  return chunks;
}

void Encode(benchmark::State& state, size_t chunk_size) {
  const std::vector<std::string_view> chunks = Chunks(MixedText(), chunk_size);
  for (auto _ : state) {
    for (const std::string_view chunk : chunks) {
      benchmark::DoNotOptimize(BenchmarkTokenizer()->Encode(chunk, state.range(0) != 0));
    }
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(MixedText().size()));
}
BENCHMARK_CAPTURE(Encode, whole, SIZE_MAX)->ArgName("parse")->Arg(0)->Arg(1);
BENCHMARK_CAPTURE(Encode, chunks_4kB, 4096)->ArgName("parse")->Arg(0)->Arg(1);

void DetokenizeToken(benchmark::State& state) {
  const std::vector<int32_t> ids = *BenchmarkTokenizer()->Encode(MixedText(), false);
  Detokenizer detokenizer(BenchmarkTokenizer(), true);
  size_t i = 0;
  for (auto _ : state) benchmark::DoNotOptimize(detokenizer.Push(ids[i++ % ids.size()]));
}
BENCHMARK(DetokenizeToken);

void StopMatchToken(benchmark::State& state) {
  const std::vector<std::string> stops(state.range(0), "\n\nObservation:");
  StopMatcher matcher(stops, false);
  for (auto _ : state) benchmark::DoNotOptimize(matcher.Push(" token"));
}
BENCHMARK(StopMatchToken)->ArgName("stops")->Arg(1)->Arg(16);

void ReasoningToken(benchmark::State& state) {
  ReasoningParser parser("<think>\n");
  for (auto _ : state) benchmark::DoNotOptimize(parser.Push(" token"));
}
BENCHMARK(ReasoningToken);

void RenderChat(benchmark::State& state) {
  const auto chat_template = MustCompile(
      ReadText(std::string(kGolden) + "templates/deepseek_r1.jinja"), BenchmarkTokenizer());
  ChatInput input;
  for (int64_t i = 0; i < state.range(0); ++i) {
    input.messages.push_back({{"role", i % 2 == 0 ? "user" : "assistant"},
                              {"content", "What is the capital of France, and how do you know?"}});
  }
  input.parse_control_tokens = state.range(1) != 0;
  for (auto _ : state) benchmark::DoNotOptimize(chat_template->Render(input));
}
BENCHMARK(RenderChat)->ArgNames({"messages", "parse"})->ArgsProduct({{1, 5, 51, 501}, {0, 1}});

}  // namespace
}  // namespace latentd

BENCHMARK_MAIN();
