#include "engine/cuda/graph_cache.h"

#include <algorithm>
#include <utility>

#include "engine/cuda/cuda_status.h"
#include "engine/status.h"

namespace latentd {

std::vector<int> GraphSizes(int most) {
  std::vector<int> sizes;
  const auto step = [](int size) {
    if (size < 4) return size;
    if (size < 8) return 4;
    if (size < 64) return 8;
    if (size < 128) return 16;
    return size < 256 ? 32 : 64;
  };
  for (int size = 1; size < most; size += step(size)) sizes.push_back(size);
  if (most > 0) sizes.push_back(most);
  return sizes;
}

std::vector<int> GraphCuts(int num_hidden_layers) {
  // A layer runs for eight times as long as it takes to launch, and longer.
  std::vector<int> cuts = {0};
  for (int size = 1; cuts.back() + 3 * size <= num_hidden_layers && cuts.size() < 3; size *= 8)
    cuts.push_back(cuts.back() + size);
  cuts.push_back(num_hidden_layers);
  return cuts;
}

uint64_t EstimatedGraphBytes(int32_t num_hidden_layers) {
  constexpr uint64_t kBytesPerLayer = 64 << 10;
  return (uint64_t{2} << 20) + kBytesPerLayer * num_hidden_layers;
}

absl::StatusOr<CudaGraphExec> CaptureGraph(cudaStream_t stream,
                                           const std::function<absl::Status()>& enqueue) {
  RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const absl::Status enqueued = enqueue();
  cudaGraph_t captured = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &captured);  // whatever has happened
  const CudaGraph graph(captured);
  if (!enqueued.ok()) cudaGetLastError();
  RETURN_IF_ERROR(enqueued);
  RETURN_IF_ERROR(CudaStatus(ended, "cudaStreamEndCapture"));
  cudaGraphExec_t exec = nullptr;
  RETURN_IF_CUDA_ERROR(cudaGraphInstantiate(&exec, graph.get(), 0));
  CudaGraphExec owned(exec);
  RETURN_IF_CUDA_ERROR(cudaGraphUpload(exec, stream));
  return owned;
}

absl::Status GraphCache::Capture(cudaStream_t stream, const std::vector<int>& sizes, int num_parts,
                                 const std::function<absl::Status(int rows, int part)>& enqueue) {
  for (int rows : sizes) {
    std::vector<CudaGraphExec> parts(num_parts);
    for (int part = 0; part < num_parts; ++part) {
      ASSIGN_OR_RETURN(parts[part], CaptureGraph(stream, [&] { return enqueue(rows, part); }));
    }
    graphs_[rows] = std::move(parts);
  }
  return absl::OkStatus();
}

int GraphCache::RowsFor(size_t sequences) const {
  const auto at = graphs_.lower_bound(sequences);
  return at == graphs_.end() ? 0 : static_cast<int>(at->first);
}

absl::Status GraphCache::Launch(int rows, cudaStream_t stream) const {
  for (const CudaGraphExec& part : graphs_.at(rows))
    RETURN_IF_CUDA_ERROR(cudaGraphLaunch(part.get(), stream));
  return absl::OkStatus();
}

}  // namespace latentd
