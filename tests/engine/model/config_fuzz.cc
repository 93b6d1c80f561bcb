// config.json and generation_config.json from anywhere: refused or read, and what is read can be
// planned.

#include <cstdint>
#include <string_view>

#include "engine/model/config.h"
#include "engine/model/generation_config.h"
#include "engine/model/memory_plan.h"
#include "engine/status.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = latentd::ParseModelConfig(text);
  if (config.ok() && config->num_hidden_layers * int64_t{config->n_routed_experts} < 1000) {
    const latentd::MemoryPlan plan = latentd::MakeMemoryPlan(*config, {.num_blocks = 1});
    LATENTD_CHECK(plan.weights().parameters > 0 && plan.weights().memory_bytes > 0);
    LATENTD_CHECK(!plan.ToString().empty());
  }
  latentd::ParseGenerationConfig(text, 1000).IgnoreError();
  return 0;
}
