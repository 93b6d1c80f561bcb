#ifndef LATENTD_ENGINE_TRACE_SINK_H_
#define LATENTD_ENGINE_TRACE_SINK_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace latentd {

// Receives the named tensors of a forward pass, for tests against Transformers and for hunting
// numerical bugs. Names and meanings are those of scripts/demo_model/golden.py. A step that is
// computed in several tiles calls once for each tile, rows in order.
class TraceSink {
 public:
  virtual ~TraceSink() = default;

  // `layer`: -1 for tensors outside the layers. `data` [rows, stride], `columns` of it valid; only
  // during the call.
  virtual void Rows(std::string_view name, int layer, const float* data, int rows, int columns,
                    ptrdiff_t stride) = 0;
  virtual void Rows(std::string_view name, int layer, const int32_t* data, int rows,
                    int columns) = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_TRACE_SINK_H_
