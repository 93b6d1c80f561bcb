#include "server/bench/engine_bench.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <random>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "engine/status.h"
#include "server/bench/roofline.h"

namespace latentd {
namespace {

using Json = nlohmann::ordered_json;

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The value below which `share` of the values lie, between two of them in proportion.
double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = share * static_cast<double>(values.size() - 1);
  const size_t below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}
double Median(const std::vector<double>& values) { return Percentile(values, 0.5); }

// Milliseconds and rates as they are read: four digits.
double Rounded(double value) {
  double number = value;
  [[maybe_unused]] const bool parsed = absl::SimpleAtod(absl::StrFormat("%.4g", value), &number);
  return number;
}

// Loading, in words.
class Shown : public LoadListener {
 public:
  explicit Shown(std::ostream& err) : err_(err) {}

  void OnPhase(std::string_view phase) override { err_ << "loading: " << phase << std::endl; }
  void OnPlan(const std::string& table) override { err_ << table << std::flush; }
  void OnProgress(uint64_t loaded, uint64_t total) override {
    const int tenths = total == 0 ? 10 : static_cast<int>(10 * loaded / total);
    if (tenths == shown_) return;
    shown_ = tenths;
    err_ << absl::StrFormat("loading: %d %% of %.1f GB\n", 10 * tenths, total * 1e-9) << std::flush;
  }

 private:
  std::ostream& err_;
  int shown_ = -1;
};

class Bench {
 public:
  Bench(const ModelConfig& model, const EngineSettings& settings, const EngineBenchOptions& options,
        Engine* engine, std::ostream& out, std::ostream& err)
      : model_(model),
        options_(options),
        roofline_(settings.kind == EngineKind::kCuda),
        cache_(settings.cache_format == CacheFormat::kFp8 ? CacheFormat::kFp8 : CacheFormat::kBf16),
        engine_(engine),
        info_(engine->info()),
        out_(out),
        err_(err) {}

  // Gives every sequence its blocks and tokens. RESOURCE_EXHAUSTED when a scenario is too large for
  // the engine.
  absl::Status Prepare() {
    std::vector<int32_t> lengths;
    for (const auto& [count, length] : options_.decode) {
      const int32_t end = DecodeBegin(length) + options_.warmup_steps + options_.steps;
      RETURN_IF_ERROR(Reserve("decode", count, length, end, &lengths));
      if (count > info_.max_step_tokens || count > info_.max_sequences) {
        return absl::InvalidArgumentError(
            absl::StrFormat("--decode %d:%d: the engine takes %d sequences and %d tokens a step",
                            count, length, info_.max_sequences, info_.max_step_tokens));
      }
    }
    for (const auto& [count, length] : options_.prefill) {
      RETURN_IF_ERROR(Reserve("prefill", count, length, length, &lengths));
    }
    std::mt19937 random(1);
    std::uniform_int_distribution<TokenId> token(0, info_.vocab_size - 1);
    BlockId next = 0;
    for (const int32_t length : lengths) {
      Slot& slot = slots_.emplace_back();
      slot.tokens.resize(length);
      for (TokenId& t : slot.tokens) t = token(random);
      slot.blocks.resize((length + kBlockSize - 1) / kBlockSize);
      for (BlockId& block : slot.blocks) block = next++;
    }
    return absl::OkStatus();
  }

  // One short step: what is lazy happens here.
  absl::Status FirstStep() {
    StepPlan plan;
    Add({&slots_.front(), 0, 0, 1}, true, &plan);
    return Execute(plan).status();
  }

  absl::Status Decode(CountAndLength scenario) {
    const auto [batch, context] = scenario;
    const int32_t begin = DecodeBegin(context);
    RETURN_IF_ERROR(ComputeContexts(batch, begin));
    err_ << absl::StrFormat("decode %d sequences, context %d\n", batch, context) << std::flush;
    StepTimes times;
    StepPlan plan;
    double last = Seconds();
    for (int32_t step = 0; step < options_.warmup_steps + options_.steps; ++step) {
      const int32_t position = begin + step;
      plan = {};
      for (int32_t i = 0; i < batch; ++i) Add({&slots_[i], 0, position, position + 1}, true, &plan);
      ASSIGN_OR_RETURN(const StepResult result, Execute(plan));
      const double now = Seconds();
      for (int32_t i = 0; i < batch; ++i) {
        Slot& slot = slots_[i];
        slot.computed = std::max(slot.computed, position + 1);
        if (position + 1 < static_cast<int32_t>(slot.tokens.size())) {
          slot.tokens[position + 1] = result.sampled[i];
        }
      }
      if (step >= options_.warmup_steps) times.Add(now - last, result.device);
      last = now;
    }
    StepPlan middle;
    for (int32_t i = 0; i < batch; ++i) Add({&slots_[i], 0, context - 1, context}, true, &middle);
    const double median = Median(times.seconds);
    Json line = {{"name", absl::StrFormat("decode %d:%d", batch, context)},
                 {"batch", batch},
                 {"context", context},
                 {"synthetic_context", options_.synthetic_context},
                 {"steps", times.seconds.size()},
                 {"ms_per_step",
                  {{"median", Rounded(1e3 * median)},
                   {"p10", Rounded(1e3 * Percentile(times.seconds, 0.1))},
                   {"p90", Rounded(1e3 * Percentile(times.seconds, 0.9))}}},
                 {"tok_s", Rounded(batch / median)}};
    AddRoofline(RooflineSeconds(middle, kH100Peak), RooflineSeconds(middle, kH100Reached), median,
                &line);
    AddDevice(times, &line);
    return Finish(plan, std::move(line));
  }

  absl::Status Prefill(CountAndLength scenario) {
    const auto [prompts, length] = scenario;
    err_ << absl::StrFormat("prefill %d prompts of %d tokens\n", prompts, length) << std::flush;
    std::vector<double> seconds;
    StepTimes times;
    StepPlan first;
    double floor = 0, reached = 0;
    int64_t steps = 0;
    for (int32_t repeat = 0; repeat < options_.repeats; ++repeat) {
      std::vector<Piece> pieces;
      for (int32_t i = 0; i < prompts; ++i) pieces.push_back({&slots_[i], 0, 0, length});
      const std::vector<StepPlan> plans = MakeSteps(std::move(pieces));
      if (repeat == 0) {
        first = plans.front();
        steps = static_cast<int64_t>(plans.size());
        for (const StepPlan& plan : plans) {
          floor += RooflineSeconds(plan, kH100Peak);
          reached += RooflineSeconds(plan, kH100Reached);
        }
      }
      const double start = Seconds();
      double last = start;
      for (const StepPlan& plan : plans) {
        ASSIGN_OR_RETURN(const StepResult result, Execute(plan));
        const double now = Seconds();
        times.Add(now - last, result.device);
        last = now;
      }
      seconds.push_back(last - start);
    }
    for (int32_t i = 0; i < prompts; ++i) {
      slots_[i].computed = std::max(slots_[i].computed, length);
    }
    const double median = Median(seconds);
    Json line = {{"name", absl::StrFormat("prefill %d:%d", prompts, length)},
                 {"prompts", prompts},
                 {"tokens", length},
                 {"max_step_tokens", info_.max_step_tokens},
                 {"repeats", seconds.size()},
                 {"steps", steps},
                 {"ms", Rounded(1e3 * median)},
                 {"tok_s", Rounded(static_cast<double>(prompts) * length / median)}};
    AddRoofline(floor, reached, median, &line);
    AddDevice(times, &line);
    return Finish(first, std::move(line));
  }

  void Write(const Json& line) { out_ << line.dump() << std::endl; }

 private:
  // A sequence that is always in the same place of the cache.
  struct Slot {
    std::vector<TokenId> tokens;
    std::vector<BlockId> blocks;
    int32_t computed = 0;  // its first tokens are in the cache
  };

  struct StepTimes {
    std::vector<double> seconds, idle, busy;  // the last two where the engine tells them

    void Add(double step, const std::optional<DeviceTimes>& device) {
      seconds.push_back(step);
      if (!device) return;
      idle.push_back(device->idle_seconds);
      busy.push_back(device->busy_seconds);
    }
  };

  double RooflineSeconds(const StepPlan& plan, const DeviceRates& rates) const {
    return StepRoofline(model_, plan, rates, cache_).seconds();
  }

  // Tokens in the cache before the first step, so that the middle one has `context`.
  int32_t DecodeBegin(int32_t context) const {
    return std::max(1, context - 1 - options_.warmup_steps - options_.steps / 2);
  }

  // Makes the first `count` sequences `end` tokens long at least.
  absl::Status Reserve(const char* what, int32_t count, int32_t length, int32_t end,
                       std::vector<int32_t>* lengths) const {
    if (end > info_.max_model_len) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("--%s %d:%d: sequences reach %d tokens; max_model_len is %d", what, count,
                          length, end, info_.max_model_len));
    }
    if (static_cast<int32_t>(lengths->size()) < count) lengths->resize(count, 1);
    int64_t blocks = 0;
    for (size_t i = 0; i < lengths->size(); ++i) {
      int32_t& n = (*lengths)[i];
      if (static_cast<int32_t>(i) < count) n = std::max(n, end);
      blocks += (n + kBlockSize - 1) / kBlockSize;
    }
    if (blocks > info_.num_blocks) {
      return absl::ResourceExhaustedError(absl::StrFormat(
          "--%s %d:%d: the scenarios so far need %d blocks of %d tokens; the KV cache has %d", what,
          count, length, blocks, kBlockSize, info_.num_blocks));
    }
    return absl::OkStatus();
  }

  // Tokens [begin, end) of what begins with a sequence's block `first_block`.
  struct Piece {
    const Slot* slot = nullptr;
    int32_t first_block = 0;
    int32_t begin = 0;
    int32_t end = 0;
  };

  // Adds a piece to a step; it draws, greedily, if wanted.
  static void Add(const Piece& piece, bool sample, StepPlan* plan) {
    const int32_t num_blocks = (piece.end + kBlockSize - 1) / kBlockSize;
    SequenceStep& s = plan->sequences.emplace_back();
    s.id = plan->sequences.size();
    s.num_computed_tokens = piece.begin;
    s.num_tokens = piece.end - piece.begin;
    s.num_blocks = num_blocks;
    s.sample = sample;
    s.sampling.temperature = 0;
    const auto tokens = piece.slot->tokens.begin() + piece.first_block * kBlockSize;
    const auto blocks = piece.slot->blocks.begin() + piece.first_block;
    plan->tokens.insert(plan->tokens.end(), tokens + piece.begin, tokens + piece.end);
    plan->blocks.insert(plan->blocks.end(), blocks, blocks + num_blocks);
  }

  // The steps that compute the pieces in their order, as many tokens a step as it takes.
  std::vector<StepPlan> MakeSteps(std::vector<Piece> pieces) const {
    std::vector<StepPlan> plans;
    for (Piece& piece : pieces) {
      while (piece.begin < piece.end) {
        if (plans.empty() ||
            static_cast<int32_t>(plans.back().tokens.size()) == info_.max_step_tokens ||
            static_cast<int32_t>(plans.back().sequences.size()) == info_.max_sequences) {
          plans.emplace_back();
        }
        const int32_t left =
            info_.max_step_tokens - static_cast<int32_t>(plans.back().tokens.size());
        Piece now = piece;
        now.end = std::min(piece.end, piece.begin + left);
        Add(now, now.end == piece.end, &plans.back());
        piece.begin = now.end;
      }
    }
    return plans;
  }

  // Fills the cache for the first `length` tokens of the first `count` sequences, as far as it
  // lacks them.
  absl::Status ComputeContexts(int32_t count, int32_t length) {
    std::vector<Piece> pieces;
    for (int32_t i = 0; i < count; ++i) {
      Slot& slot = slots_[i];
      if (slot.computed >= length) continue;
      if (options_.synthetic_context) {
        const int32_t first = slot.computed / kBlockSize;
        for (int32_t block = first; block * kBlockSize < length; ++block) {
          const int32_t end = static_cast<int32_t>(slot.tokens.size()) - block * kBlockSize;
          pieces.push_back({&slot, block, 0, std::min(end, kBlockSize)});
        }
      } else {
        pieces.push_back({&slot, 0, slot.computed, length});
      }
      slot.computed = length;
    }
    if (pieces.empty()) return absl::OkStatus();
    err_ << absl::StrFormat("computing %d contexts of %d tokens%s\n", count, length,
                            options_.synthetic_context ? ", block by block" : "")
         << std::flush;
    for (const StepPlan& plan : MakeSteps(std::move(pieces))) {
      RETURN_IF_ERROR(Execute(plan).status());
    }
    return absl::OkStatus();
  }

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) {
    absl::StatusOr<StepResult> result = engine_->Execute(plan);
    if (result.ok()) {
      ++num_steps_;
      return result;
    }
    return absl::Status(
        result.status().code(),
        absl::StrCat("step ", num_steps_, ", of ", plan.sequences.size(), " sequences and ",
                     plan.tokens.size(), " tokens: ", result.status().message()));
  }

  void AddRoofline(double floor, double reached, double measured, Json* line) const {
    if (!roofline_) return;
    (*line)["roofline_ms"] = Rounded(1e3 * floor);
    (*line)["percent_of_roofline"] = Rounded(100 * floor / measured);
    (*line)["reached_ms"] = Rounded(1e3 * reached);
  }

  static void AddDevice(const StepTimes& times, Json* line) {
    if (times.busy.empty()) return;
    (*line)["gpu_busy_ms"] = Rounded(1e3 * Median(times.busy));
    (*line)["gpu_idle_ms"] = Rounded(1e3 * Median(times.idle));
  }

  // Writes the line, with where the time of `plan` goes.
  absl::Status Finish(const StepPlan& plan, Json line) {
    if (options_.profile) {
      ASSIGN_OR_RETURN(const std::vector<KernelFamily> families, ProfileStep(engine_, plan));
      for (const KernelFamily& family : families) {
        line["families"][family.name] = {{"ms", Rounded(1e3 * family.seconds)},
                                         {"kernels", family.num_kernels}};
      }
    }
    Write(line);
    return absl::OkStatus();
  }

  const ModelConfig& model_;
  const EngineBenchOptions& options_;
  const bool roofline_;
  const CacheFormat cache_;
  Engine* const engine_;
  const EngineInfo info_;
  std::ostream& out_;
  std::ostream& err_;
  std::vector<Slot> slots_;
  int64_t num_steps_ = 0;
};

absl::Status CheckOptions(const EngineBenchOptions& options) {
  if (options.decode.empty() && options.prefill.empty()) {
    return absl::InvalidArgumentError("nothing to run: give --decode, --prefill or --table");
  }
  for (const auto& [name, value, least] : {std::tuple("--steps", options.steps, 1),
                                           std::tuple("--warmup-steps", options.warmup_steps, 0),
                                           std::tuple("--repeats", options.repeats, 1)}) {
    if (value >= least && value <= 100000) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("%s is %d; it must lie in [%d, 100000]", name, value, least));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CountAndLength> ParseCountAndLength(const std::string& option,
                                                   const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  CountAndLength value;
  if (parts.size() == 2 && absl::SimpleAtoi(parts[0], &value.count) &&
      absl::SimpleAtoi(parts[1], &value.length) && value.count >= 1 && value.count <= 65536 &&
      value.length >= 1 && value.length <= (1 << 24)) {
    return value;
  }
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is '", text,
                   "'; it must be COUNT:TOKENS, such as 8:2048, with up to 65536 : 16777216"));
}

EngineBenchOptions TableScenarios() {
  EngineBenchOptions options;
  options.decode = {{1, 2048}, {8, 2048}, {32, 1800}, {64, 800}, {64, 2048}};
  options.prefill = {{16, 2048}};
  return options;
}

absl::Status RunEngineBench(const ModelConfig& model, const std::filesystem::path& dir,
                            LoadFormat format, const EngineSettings& settings,
                            const EngineBenchOptions& options, std::ostream& out,
                            std::ostream& err) {
  RETURN_IF_ERROR(CheckOptions(options));
  const double start = Seconds();
  Shown shown(err);
  ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                   MakeEngine(model, dir, format, settings, &shown));
  const double loaded = Seconds();
  Bench bench(model, settings, options, engine.get(), out, err);
  RETURN_IF_ERROR(bench.Prepare());
  RETURN_IF_ERROR(bench.FirstStep());
  const EngineInfo info = engine->info();
  bench.Write({{"name", "start"},
               {"engine", EngineName(settings.kind)},
               {"load_seconds", Rounded(loaded - start)},
               {"start_seconds", Rounded(Seconds() - start)},
               {"kv_cache_tokens", int64_t{info.num_blocks} * kBlockSize},
               {"max_model_len", info.max_model_len},
               {"max_step_tokens", info.max_step_tokens}});
  // Prompts first: decoding finds its contexts in the cache.
  for (const CountAndLength& scenario : options.prefill) {
    RETURN_IF_ERROR(bench.Prefill(scenario));
  }
  for (const CountAndLength& scenario : options.decode) {
    RETURN_IF_ERROR(bench.Decode(scenario));
  }
  return absl::OkStatus();
}

}  // namespace latentd
