#ifndef LATENTD_ENGINE_CUDA_GRAPH_CACHE_H_
#define LATENTD_ENGINE_CUDA_GRAPH_CACHE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/cuda_handles.h"

namespace latentd {

// The numbers of sequences that decode steps are padded to, ascending: 1, 2, 4, then steps of 8,
// 16, 32 and 64 that grow with the size, and `most` itself. Empty for 0.
std::vector<int> GraphSizes(int most);

// Where the layers of a step are cut into graphs: the first layers of the parts, then
// num_hidden_layers. 0, 1, 9, 61.
std::vector<int> GraphCuts(int num_hidden_layers);

// What a graph takes of the GPU's memory, by measurement. An estimate: the driver rounds and
// shares.
uint64_t EstimatedGraphBytes(int32_t num_hidden_layers);

// Runs `enqueue` on `stream` in capture and makes a graph that can be launched.
absl::StatusOr<CudaGraphExec> CaptureGraph(cudaStream_t stream,
                                           const std::function<absl::Status()>& enqueue);

// Captured decode steps by their number of rows.
//
// A step is a few graphs, launched one after the other: launching takes the host a microsecond a
// kernel, in which a step that is one graph leaves the GPU idle. The first graph is short, and each
// runs longer than the next takes to launch. Not thread-safe.
class GraphCache {
 public:
  // Captures the parts [0, num_parts) of a step for each of `sizes`. `enqueue(rows, part)`: that
  // part of a step of so many rows on `stream`; it has run once outside of capture.
  absl::Status Capture(cudaStream_t stream, const std::vector<int>& sizes, int num_parts,
                       const std::function<absl::Status(int rows, int part)>& enqueue);

  void Clear() { graphs_.clear(); }

  // Rows of the smallest graph for `sequences` sequences; 0 when there is none.
  int RowsFor(size_t sequences) const;
  // REQUIRES: a number that RowsFor() gave.
  absl::Status Launch(int rows, cudaStream_t stream) const;

 private:
  std::map<size_t, std::vector<CudaGraphExec>> graphs_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GRAPH_CACHE_H_
