#include <algorithm>
#include <cctype>
#include <string>
#include <string_view>
#include <vector>

#include "server/config.h"

namespace latentd {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;
constexpr int64_t kDay = 24 * 3600 * 1000;  // milliseconds

// A key of which all processes of a group must have the same value.
ConfigKey Shared(ConfigKey key) {
  key.shared = true;
  return key;
}

const std::vector<ConfigKey>& Table() {
  using C = ServeConfig;
  using T = ConfigType;
  static const auto* const kTable = new std::vector<ConfigKey>{
      {"model", T::kString, &C::model,
       "Directory of the checkpoint: config.json, *.safetensors, tokenizer.json. Empty: the demo "
       "model."},
      {"served_model_name", T::kString, &C::served_model_name,
       "Name that clients may ask for. Empty: the last part of the model's path."},
      Shared(
          {"load_format",
           T::kString,
           &C::load_format,
           "Where weights come from: auto and safetensors read the checkpoint, dummy draws random "
           "ones.",
           0,
           0,
           "",
           {"auto", "safetensors", "dummy"}}),
      Shared({"engine",
              T::kString,
              &C::engine,
              "What computes the model: auto is cuda where a Hopper GPU is, else cpu.",
              0,
              0,
              "",
              {"auto", "cpu", "cuda"}}),
      Shared({"world_size", T::kInt, &C::world_size,
              "Ranks of the expert-parallel group, one GPU each; the experts are dealt out to "
              "them. 1: the engine is in the daemon's own process.",
              1, 1024, "ranks"}),
      Shared({"num_nodes", T::kInt, &C::num_nodes,
              "Machines that the ranks are on, world_size / num_nodes on each. Unset: "
              "LWS_GROUP_SIZE of a LeaderWorkerSet, else 1.",
              1, 1024, "nodes"}),
      {"node", T::kInt, &C::node,
       "Which of the nodes this one is; the daemon is on node 0, `latentd node` on each other. "
       "Unset: LWS_WORKER_INDEX, else 0.",
       0, 1023, "node"},
      {"leader", T::kAddress, &C::leader,
       "host:port of the daemon's cluster_listen, which ranks and agents dial. Empty: "
       "LWS_LEADER_ADDRESS with the port of cluster_listen; on node 0 cluster_listen itself."},
      {"cluster_listen", T::kAddress, &C::cluster_listen,
       "Address at which the daemon listens for ranks and agents, without authentication: for a "
       "network of their own. Empty: 0.0.0.0:50052 when num_nodes > 1, else a free port of "
       "127.0.0.1."},
      {"isolate", T::kBool, &C::isolate,
       "Run the engine of world_size 1 in a process of its own too: a GPU that fails costs its "
       "process, not the daemon."},
      {"group_timeout", T::kDuration, &C::group_timeout,
       "How long forming the group may take once its ranks have loaded; then it is tried again.",
       1000, kDay},
      {"max_recoveries", T::kInt, &C::max_recoveries,
       "Losses of a rank that a request survives: it is computed again and its stream goes on. "
       "The next one ends it with UNAVAILABLE.",
       0, 1000, "losses"},
      {"recovery_timeout", T::kDuration, &C::recovery_timeout,
       "How long requests wait for the group to be whole again before they end with UNAVAILABLE.",
       0, kDay},
      {"listen", T::kAddress, &C::listen,
       "Address of the gRPC listener, host:port; port 0 takes a free one."},
      {"http_listen", T::kAddress, &C::http_listen,
       "Address of the HTTP listener (/metrics /healthz /livez /readyz), ip:port. Empty: none."},
      {"threads", T::kInt, &C::threads,
       "Threads that compute, of the CPU engine. 0: one per core; the ranks of a node share them.",
       0, 4096, "threads"},
      {"device", T::kInt, &C::device,
       "The GPU of the CUDA engine, as the driver counts them; the ranks of a node have this one "
       "and those after it.",
       0, 1023, "GPU"},
      Shared(
          {"kv_cache_memory", T::kSize, &C::kv_cache_memory,
           "Memory of the latent KV cache, of each rank; rounded down to whole blocks of 64 "
           "tokens. 0: 1 GiB on the CPU; on a GPU all that is left beside weights and workspace.",
           0, int64_t{1} << 50}),
      Shared({"kv_cache_tokens", T::kInt, &C::kv_cache_tokens,
              "Size of the KV cache, of each rank, in tokens instead of bytes; rounded up to whole "
              "blocks. 0: as kv_cache_memory says.",
              0, kMaxTokens, "tokens"}),
      Shared({"kv_cache_dtype",
              T::kString,
              &C::kv_cache_dtype,
              "How the CUDA engine holds the KV cache: fp8 has room for 1.79 times the tokens of "
              "bf16, held less exactly; auto is bf16. The CPU engine's cache is f32; fp8 rounds it "
              "alike, for comparisons.",
              0,
              0,
              "",
              {"auto", "bf16", "fp8"}}),
      Shared({"max_model_len", T::kInt, &C::max_model_len,
              "Longest prompt and completion together. 0: the model's max_position_embeddings, or "
              "what "
              "the KV "
              "cache holds if that is less.",
              0, kMaxTokens, "tokens"}),
      Shared({"max_step_tokens", T::kInt, &C::max_step_tokens,
              "Tokens computed in one step, at most, by each rank; longer prompts are computed in "
              "chunks.",
              1, 1 << 20, "tokens"}),
      Shared({"max_running", T::kInt, &C::max_running,
              "Sequences computed in one step, at most, by each rank.", 1, 65536, "sequences"}),
      {"max_waiting", T::kInt, &C::max_waiting,
       "Requests that may wait for a place; one more is refused with RESOURCE_EXHAUSTED.", 1,
       1 << 20, "requests"},
      {"prefix_caching", T::kBool, &C::prefix_caching,
       "Keep the KV cache of finished prompts and reuse it where a prompt begins alike."},
      Shared({"max_graph_sequences", T::kInt, &C::max_graph_sequences,
              "Decode steps of up to so many sequences are launched as one CUDA graph. 0: none.", 0,
              65536, "sequences"}),
      Shared(
          {"batch_invariant", T::kBool, &C::batch_invariant,
           "On the CUDA engine too a sequence's tokens do not depend, bit for bit, on what else is "
           "computed; slower. The CPU engine is so always."}),
      {"step_deadline", T::kDuration, &C::step_deadline,
       "A step that lasts longer is an engine that is lost: streams end with UNAVAILABLE and the "
       "daemon exits. A loading that moves nothing for so long makes liveness fail.",
       1000, kDay},
      {"chat_template", T::kString, &C::chat_template,
       "File of a Jinja chat template to use instead of the model's own. Empty: the model's."},
      {"allow_request_chat_template", T::kBool, &C::allow_request_chat_template,
       "Let requests bring their own chat template; for trusted clients only."},
      {"batch_dir", T::kString, &C::batch_dir,
       "Directory in which batch jobs and their results are stored, for this daemon alone; made "
       "when it is not there. Empty: no batch jobs."},
      {"batch_max_running", T::kInt, &C::batch_max_running,
       "Items of batch jobs that are in the engine at once. 0: as many as it has seats for, and an "
       "eighth.",
       0, 65536, "items"},
      {"batch_step_tokens", T::kInt, &C::batch_step_tokens,
       "Tokens that one rank computes for batch jobs in a step that other requests take part in, "
       "at "
       "most: what a longer step would cost these in latency. 0: whatever they leave.",
       0, kMaxTokens, "tokens"},
      {"batch_max_item_bytes", T::kSize, &C::batch_max_item_bytes,
       "Largest item of a batch job; a job with a larger one is refused.", 1024, int64_t{1} << 30},
      {"batch_max_job_items", T::kInt, &C::batch_max_job_items,
       "Items of a batch job, at most; a longer one is refused.", 1, kMaxTokens, "items"},
      {"batch_max_jobs", T::kInt, &C::batch_max_jobs,
       "Batch jobs of a client that have not ended, uploads among them; one more is refused with "
       "RESOURCE_EXHAUSTED.",
       1, 1 << 20, "jobs"},
      {"batch_max_items", T::kInt, &C::batch_max_items,
       "Items of those jobs, all together, without a result; a job that would bring more is "
       "refused with RESOURCE_EXHAUSTED.",
       1, kMaxTokens, "items"},
      {"batch_result_ttl", T::kDuration, &C::batch_result_ttl,
       "How long after its end a batch job is deleted with its results, when it does not say so "
       "itself.",
       60 * 1000, 365 * kDay},
      {"batch_upload_ttl", T::kDuration, &C::batch_upload_ttl,
       "An upload of a batch job to which nothing was added for so long is deleted.", 60 * 1000,
       365 * kDay},
      {"max_message_bytes", T::kSize, &C::max_message_bytes,
       "Largest request message; a larger one is refused with RESOURCE_EXHAUSTED.", 1024,
       int64_t{1} << 30},
      {"max_concurrent_requests", T::kInt, &C::max_concurrent_requests,
       "Generating calls that may be open at once; one more is refused with RESOURCE_EXHAUSTED.", 1,
       1 << 20, "calls"},
      {"drain_timeout", T::kDuration, &C::drain_timeout,
       "How long after SIGTERM running answers may go on; what is left then ends with UNAVAILABLE.",
       0, kDay},
      {"max_connection_age", T::kDuration, &C::max_connection_age,
       "Age at which a connection is asked to reconnect, so that load spreads over new servers; "
       "its "
       "calls may still run for drain_timeout. 0: never.",
       0, kDay},
      {"keepalive_time", T::kDuration, &C::keepalive_time,
       "A connection silent for so long is pinged.", 1000, kDay},
      {"keepalive_timeout", T::kDuration, &C::keepalive_timeout,
       "A ping unanswered for so long ends the connection and frees what its calls hold.", 1000,
       kDay},
      {"min_ping_interval", T::kDuration, &C::min_ping_interval,
       "Clients that ping more often than this are disconnected (too_many_pings).", 1000, kDay},
      {"log_level",
       T::kString,
       &C::log_level,
       "Least level that is logged.",
       0,
       0,
       "",
       {"debug", "info", "warning", "error"}},
      {"log_format",
       T::kString,
       &C::log_format,
       "One line a record, as key=value text or as JSON.",
       0,
       0,
       "",
       {"text", "json"}},
      {"termination_log", T::kString, &C::termination_log,
       "File that gets the reason when the daemon fails (Kubernetes: /dev/termination-log). Empty: "
       "none."},
  };
  return *kTable;
}

std::string WithUnderscores(std::string_view name) {
  std::string text(name);
  std::replace(text.begin(), text.end(), '-', '_');
  return text;
}

int EditDistance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row[b.size()];
}

}  // namespace

absl::Span<const ConfigKey> ConfigKeys() { return Table(); }

const ConfigKey* FindConfigKey(std::string_view name) {
  const std::string normalized = WithUnderscores(name);
  for (const ConfigKey& key : Table()) {
    if (key.name == normalized) return &key;
  }
  return nullptr;
}

std::string NearestConfigKey(std::string_view name) {
  std::string normalized = WithUnderscores(name);
  for (char& c : normalized) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  std::string nearest;
  int best = std::max<int>(2, static_cast<int>(normalized.size()) / 3) + 1;
  for (const ConfigKey& key : Table()) {
    const int distance = EditDistance(normalized, key.name);
    if (distance < best) {
      best = distance;
      nearest = key.name;
    }
  }
  return nearest;
}

}  // namespace latentd
