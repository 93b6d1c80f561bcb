#include <unistd.h>

#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/synchronization/mutex.h"
#include "engine/status.h"
#include "fmt/format.h"
#include "server/bench/cluster_bench.h"
#include "server/bench/engine_bench.h"
#include "server/check.h"
#include "server/client/batch.h"
#include "server/client/bench.h"
#include "server/client/chat.h"
#include "server/cluster/node_process.h"
#include "server/cluster/process_supervisor.h"
#include "server/cluster/rank_process.h"
#include "server/config.h"
#include "server/model_loader.h"
#include "server/serve.h"
#include "server/version.h"

namespace latentd {
namespace {

// A command that takes the whole configuration: --config and one flag for each key.
struct ConfigFlags {
  std::string file;
  std::vector<std::pair<std::string, std::string>> values;  // in the order in which they were given
};

std::shared_ptr<ConfigFlags> AddConfigFlags(CLI::App* command) {
  auto flags = std::make_shared<ConfigFlags>();
  command->add_option("--config", flags->file, "YAML file with the keys below; flags win over it")
      ->type_name("FILE");
  const ServeConfig defaults;
  for (const ConfigKey& key : ConfigKeys()) {
    const std::string name(key.name);
    std::string names = ConfigFlag(key);
    if (names != "--" + name) names += ",--" + name;
    const std::string value = ConfigValue(key, defaults);
    const std::string range = ConfigRange(key);
    CLI::Option* option = command->add_option_function<std::string>(
        names, [flags, name](const std::string& value) { flags->values.emplace_back(name, value); },
        fmt::format("{}{}", key.help, range.empty() ? "" : " [" + range + "]"));
    option->type_name(ConfigUnit(key))->group("Configuration");
    option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    if (!value.empty()) option->default_str(value);
  }
  command->allow_extras();  // so that an unknown flag is answered with the one that was meant
  return flags;
}

absl::Status RefuseExtras(const CLI::App& command) {
  for (const std::string& extra : command.remaining()) {
    if (!extra.starts_with("--")) {
      return absl::InvalidArgumentError(fmt::format("unexpected argument '{}'", extra));
    }
    const std::string name = extra.substr(2, extra.find('=') - 2);
    const std::string nearest = NearestConfigKey(name);
    return absl::InvalidArgumentError(fmt::format(
        "unknown flag '--{}'{}", name,
        nearest.empty()
            ? ""
            : fmt::format("; did you mean '{}'?", ConfigFlag(*FindConfigKey(nearest)))));
  }
  return absl::OkStatus();
}

struct Invocation {
  ServeConfig config;
  ModelPath model;
};

absl::StatusOr<Invocation> ReadInvocation(const CLI::App& command, const ConfigFlags& flags) {
  RETURN_IF_ERROR(RefuseExtras(command));
  Invocation invocation;
  ASSIGN_OR_RETURN(invocation.config, LoadServeConfig(flags.file, flags.values));
  std::error_code code;
  const std::filesystem::path executable = std::filesystem::read_symlink("/proc/self/exe", code);
  ASSIGN_OR_RETURN(invocation.model, ModelPath::Resolve(invocation.config, executable));
  return invocation;
}

int Report(std::string_view command, const absl::Status& status, int exit_code) {
  if (status.ok()) return kServeOk;
  std::cerr << "latentd " << command << ": " << status.message() << std::endl;
  return exit_code;
}

// Of the nodes of a group one has the daemon.
absl::Status CheckServesHere(const ServeConfig& config) {
  if (config.node == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format(
      "node is {}; the daemon is on node 0, and this one runs `latentd node`", config.node));
}

void RegisterServeCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand("serve", "Serve a model over gRPC");
  const auto flags = AddConfigFlags(command);
  command->callback([command, flags, exit_code] {
    const auto invocation = ReadInvocation(*command, *flags);
    const absl::Status status =
        invocation.ok() ? CheckServesHere(invocation->config) : invocation.status();
    *exit_code = status.ok() ? RunServe(invocation->config, invocation->model)
                             : Report("serve", status, kServeUsage);
  });
}

void RegisterNodeCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand(
      "node", "Run the ranks of a node for a daemon on another one, and for the next when it ends");
  const auto flags = AddConfigFlags(command);
  command->callback([command, flags, exit_code] {
    const auto invocation = ReadInvocation(*command, *flags);
    *exit_code = invocation.ok() ? RunNode(invocation->config, invocation->model)
                                 : Report("node", invocation.status(), kServeUsage);
  });
}

// Started by `latentd serve` and `latentd node`, seldom by hand.
void RegisterRankCommand(CLI::App& app, int* exit_code) {
  CLI::App* command =
      app.add_subcommand("rank", "Compute as one rank of a group, for the daemon that leads it");
  const auto flags = AddConfigFlags(command);
  const auto rank = std::make_shared<int32_t>(0);
  const auto parent_pid = std::make_shared<int32_t>(0);
  command->add_option("--rank", *rank, "Which rank")->required();
  command->add_option("--parent-pid", *parent_pid,
                      "The process that started this one, to end with; 0: none");
  command->callback([command, flags, rank, parent_pid, exit_code] {
    if (*parent_pid != 0 && !EndWithParent(*parent_pid)) {
      *exit_code = kServeFailed;
      return;
    }
    const auto invocation = ReadInvocation(*command, *flags);
    *exit_code = invocation.ok() ? RunRank(invocation->config, invocation->model, *rank)
                                 : Report("rank", invocation.status(), kServeUsage);
  });
}

void RegisterCheckCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand(
      "check", "Check configuration and checkpoint, print the memory plan, load nothing");
  const auto flags = AddConfigFlags(command);
  const auto gpu_memory = std::make_shared<std::string>("79GiB");
  command
      ->add_option("--gpu-memory", *gpu_memory,
                   "What the GPU has free for which the CUDA engine is planned; an H100 of 80 GB "
                   "has 79 GiB")
      ->type_name("bytes")
      ->capture_default_str();
  command->callback([command, flags, gpu_memory, exit_code] {
    const auto invocation = ReadInvocation(*command, *flags);
    const std::optional<int64_t> gpu_bytes = ParseSize(*gpu_memory);
    if (!invocation.ok() || !gpu_bytes) {
      const absl::Status bad_size = absl::InvalidArgumentError(fmt::format(
          "--gpu-memory is '{}'; it must be a number of bytes such as 79GiB", *gpu_memory));
      *exit_code = Report("check", invocation.ok() ? bad_size : invocation.status(), kServeUsage);
      return;
    }
    *exit_code =
        Report("check", RunCheck(invocation->config, invocation->model, *gpu_bytes, std::cout),
               kServeFailed);
  });
}

// `bench` has `serve` already, which is a client.
void RegisterBenchEngineCommand(CLI::App& bench, int* exit_code) {
  CLI::App* command = bench.add_subcommand(
      "engine", "Run an engine alone, without server and scheduler, and measure its steps");
  const auto flags = AddConfigFlags(command);
  struct Scenarios {
    std::vector<std::string> decode, prefill;
    bool table = false, no_profile = false;
    EngineBenchOptions options;
  };
  const auto given = std::make_shared<Scenarios>();
  EngineBenchOptions& options = given->options;
  command
      ->add_option("--decode", given->decode,
                   "Decode with so many sequences of so many tokens; may be given again")
      ->type_name("COUNT:TOKENS");
  command
      ->add_option("--prefill", given->prefill,
                   "Compute so many prompts of so many tokens; may be given again")
      ->type_name("COUNT:TOKENS");
  command->add_flag("--table", given->table, "The scenarios of README's table");
  command->add_option("--steps", options.steps, "Measured steps of a decode scenario")
      ->capture_default_str();
  command->add_option("--warmup-steps", options.warmup_steps, "Steps before those")
      ->capture_default_str();
  command->add_option("--repeats", options.repeats, "How often a prefill scenario is run")
      ->capture_default_str();
  command->add_flag("--synthetic-context", options.synthetic_context,
                    "Fill the cache block by block: spares the attention of long prompts");
  command->add_flag("--no-profile", given->no_profile,
                    "Do not run a step once more for where its time goes");
  command->callback([command, flags, given, exit_code] {
    const absl::Status status = [&] {
      ASSIGN_OR_RETURN(const Invocation invocation, ReadInvocation(*command, *flags));
      EngineBenchOptions options = given->options;
      options.profile = !given->no_profile;
      if (given->table) {
        EngineBenchOptions table = TableScenarios();
        options.decode = std::move(table.decode);
        options.prefill = std::move(table.prefill);
      }
      for (const std::string& text : given->decode) {
        ASSIGN_OR_RETURN(options.decode.emplace_back(), ParseCountAndLength("--decode", text));
      }
      for (const std::string& text : given->prefill) {
        ASSIGN_OR_RETURN(options.prefill.emplace_back(), ParseCountAndLength("--prefill", text));
      }
      ASSIGN_OR_RETURN(const ModelConfig model, ReadModelConfig(invocation.model));
      ASSIGN_OR_RETURN(const EngineSettings settings, ResolveEngine(invocation.config, model));
      const LoadFormat format =
          invocation.config.load_format == "dummy" ? LoadFormat::kDummy : LoadFormat::kSafetensors;
      return RunEngineBench(model, invocation.model.dir, format, settings, options, std::cout,
                            std::cerr);
    }();
    *exit_code = Report("bench engine", status,
                        absl::IsInvalidArgument(status) ? kServeUsage : kServeFailed);
  });
}

void RegisterBenchClusterCommand(CLI::App& bench, int* exit_code) {
  CLI::App* command = bench.add_subcommand(
      "cluster",
      "Simulate a cluster of H100s under a load of chats: real scheduler, modelled time");
  struct Given {
    std::string model = "deploy/configs/deepseek-v3.json", gpu_memory = "79GiB";
    ClusterBenchOptions options;
  };
  const auto given = std::make_shared<Given>();
  command->add_option("--model", given->model, "config.json, or the directory that has it")
      ->capture_default_str();
  AddClusterBenchOptions(*command, &given->options);
  command->add_option("--gpu-memory", given->gpu_memory, "What each GPU has free")
      ->type_name("bytes")
      ->capture_default_str()
      ->group("Cluster");
  command->callback([given, exit_code] {
    const absl::Status status = [&] {
      RETURN_IF_ERROR(FinishClusterBenchOptions(&given->options));
      const std::optional<int64_t> memory = ParseSize(given->gpu_memory);
      if (!memory) {
        return absl::InvalidArgumentError(fmt::format(
            "--gpu-memory is '{}'; it must be a number of bytes such as 79GiB", given->gpu_memory));
      }
      given->options.cluster.gpu_memory_bytes = *memory;
      ServeConfig config;
      config.model = given->model;
      ASSIGN_OR_RETURN(const ModelPath path, ModelPath::Resolve(config, {}));
      ASSIGN_OR_RETURN(const ModelConfig model, ReadModelConfig(path));
      return RunClusterBench(model, given->options, std::cout, std::cerr);
    }();
    *exit_code = Report("bench cluster", status,
                        absl::IsInvalidArgument(status) ? kServeUsage : kServeFailed);
  });
}

void RegisterConfigCommand(CLI::App& app) {
  app.add_subcommand("config", "Print a configuration file with every key and its default")
      ->callback([] { std::cout << ExampleYaml(); });
}

int Main(int argc, char** argv) {
  int exit_code = kServeOk;
  CLI::App app("latentd serves DeepSeek-V3 and R1 over gRPC.", "latentd");
  app.set_version_flag("--version", std::string("latentd ") + kVersion);
  app.require_subcommand(1);
  RegisterServeCommand(app, &exit_code);
  RegisterNodeCommand(app, &exit_code);
  RegisterRankCommand(app, &exit_code);
  RegisterChatCommand(app, &exit_code);
  RegisterBatchCommand(app,
                       {.in_fd = STDIN_FILENO,
                        .err_is_terminal = isatty(STDERR_FILENO) != 0,
                        .out = std::cout,
                        .err = std::cerr},
                       &exit_code);
  RegisterBenchCommand(app, &exit_code);
  RegisterBenchEngineCommand(*app.get_subcommand("bench"), &exit_code);
  RegisterBenchClusterCommand(*app.get_subcommand("bench"), &exit_code);
  RegisterCheckCommand(app, &exit_code);
  RegisterConfigCommand(app);
  const auto is_named = [argv](const CLI::App* command) { return command->get_name() == argv[1]; };
  if (argc > 1 && argv[1][0] != '-' && app.get_subcommands(is_named).empty()) {
    std::cerr << "latentd: unknown command '" << argv[1] << "'; see latentd --help" << std::endl;
    return kServeUsage;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kServeOk : kServeUsage;
  }
  return exit_code;
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  // Distributions build absl so that every lock looks for cycles, in a graph under one global lock:
  // a third of what a streamed token costs. The tests run with it on.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  return latentd::Main(argc, argv);
}
