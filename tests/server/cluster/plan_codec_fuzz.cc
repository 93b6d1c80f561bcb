// What the decoders make of any bytes: they refuse them, or they are what encoding would give.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/status.h"
#include "server/cluster/plan_codec.h"
#include "tests/server/cluster/random_plan.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  static latentd::StepPlan* plan = new latentd::StepPlan;
  if (latentd::DecodePlan(bytes, plan).ok()) LATENTD_CHECK(latentd::Encoded(*plan) == bytes);
  latentd::StepResult result;
  if (latentd::DecodeResult(bytes, &result).ok()) LATENTD_CHECK(latentd::Encoded(result) == bytes);
  return 0;
}
