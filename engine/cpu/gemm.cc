#include "engine/cpu/gemm.h"

#include <algorithm>

#include "engine/cpu/quantize_row.h"

namespace latentd {
namespace {

int64_t PaddedK(const GemmInput& input) {
  return (input.k + kRowPadding - 1) / kRowPadding * kRowPadding;
}
int64_t NumSplitTiles(const GemmInput& input) {
  return (input.rows + kSplitTokens - 1) / kSplitTokens;
}
int64_t SplitTileElements(const GemmInput& input) { return PaddedK(input) * 3 * kSplitTokens; }
int64_t NumRowRanges(const GemmInput& input) {
  return (input.rows + kMaxGemmRows - 1) / kMaxGemmRows;
}

// The index of the range [first[i], first[i + 1]) that holds `task`.
size_t FindRange(const std::vector<int64_t>& first, int64_t task) {
  return std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
}

}  // namespace

void Gemm::Run(const GemmInput& input, const PackedMatrix& matrix, float* out,
               ptrdiff_t out_stride) {
  const GemmJob job{.input = 0, .matrix = &matrix, .out = out, .out_stride = out_stride};
  Run(absl::MakeConstSpan(&input, 1), absl::MakeConstSpan(&job, 1));
}

void Gemm::Run(absl::Span<const GemmInput> inputs, absl::Span<const GemmJob> jobs) {
  const bool quantize = std::any_of(jobs.begin(), jobs.end(), [](const GemmJob& job) {
    return job.matrix->quantize_input.has_value();
  });
  if (!quantize) return RunProducts(inputs, jobs);
  Quantize(inputs, jobs);
  RunProducts(quantized_inputs_, quantized_jobs_);
}

// A task is one panel of one job and at most kMaxGemmRows rows; the ranges of a panel's rows are
// neighbours, so that one thread finds the panel in its cache.
void Gemm::RunProducts(absl::Span<const GemmInput> inputs, absl::Span<const GemmJob> jobs) {
  if (kernels_.split_rows != nullptr) Split(inputs);
  first_tasks_.clear();
  int64_t num_tasks = 0;
  for (const GemmJob& job : jobs) {
    first_tasks_.push_back(num_tasks);
    num_tasks += job.matrix->num_panels() * NumRowRanges(inputs[job.input]);
  }
  const int64_t grain = std::max<int64_t>(1, num_tasks / (pool_.num_threads() * 8));
  pool_.For(num_tasks, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const size_t j = FindRange(first_tasks_, task);
      const GemmJob& job = jobs[j];
      const GemmInput& input = inputs[job.input];
      const PackedMatrix& m = *job.matrix;
      const int64_t ranges = NumRowRanges(input);
      const int64_t panel = (task - first_tasks_[j]) / ranges;
      const int64_t row = (task - first_tasks_[j]) % ranges * kMaxGemmRows;
      const int64_t panel_elements = int64_t{m.k_padded} * kPanelCols;
      GemmPanelArgs args;
      if (m.bf16 != nullptr) args.panel_bf16 = m.bf16 + panel * panel_elements;
      if (m.f32 != nullptr) args.panel_f32 = m.f32 + panel * panel_elements;
      if (m.scales != nullptr) {
        const int64_t groups = (m.k_padded + m.group - 1) / m.group;
        args.scales = m.scales + panel * groups * kPanelCols;
      }
      args.group = m.group;
      args.k = m.k_padded;
      args.x = input.x + row * input.stride;
      args.x_stride = input.stride;
      if (kernels_.split_rows != nullptr) {
        args.split = split_.data() + split_offsets_[job.input] +
                     row / kSplitTokens * SplitTileElements(input);
      }
      args.rows = static_cast<int>(std::min<int64_t>(input.rows - row, kMaxGemmRows));
      args.out = job.out + row * job.out_stride + panel * kPanelCols;
      args.out_stride = job.out_stride;
      args.cols = static_cast<int>(std::min<int64_t>(m.n - panel * kPanelCols, kPanelCols));
      kernels_.gemm_panel(args);
      if (m.bias != nullptr) {
        for (int r = 0; r < args.rows; ++r) {
          kernels_.add(args.out + r * args.out_stride, m.bias + panel * kPanelCols, args.cols);
        }
      }
    }
  });
}

// The inputs, then their rounded copies; an input that no job reads as it is has no rows.
void Gemm::Quantize(absl::Span<const GemmInput> inputs, absl::Span<const GemmJob> jobs) {
  quantized_inputs_.assign(inputs.begin(), inputs.end());
  quantized_jobs_.assign(jobs.begin(), jobs.end());
  std::vector<int> copy_of(inputs.size(), -1);
  std::vector<bool> read_as_is(inputs.size(), false);
  std::vector<ActivationQuantization> how;  // of each copy
  size_t elements = 0;
  for (GemmJob& job : quantized_jobs_) {
    if (!job.matrix->quantize_input) {
      read_as_is[job.input] = true;
      continue;
    }
    int& copy = copy_of[job.input];
    if (copy < 0) {
      copy = static_cast<int>(quantized_inputs_.size());
      quantized_inputs_.push_back(inputs[job.input]);
      how.push_back(*job.matrix->quantize_input);
      elements += inputs[job.input].rows * PaddedK(inputs[job.input]);
    }
    job.input = copy;
  }
  if (quantized_.size() < elements) quantized_.resize(elements);

  float* out = quantized_.data();
  for (size_t c = 0; c < how.size(); ++c) {
    GemmInput& copy = quantized_inputs_[inputs.size() + c];
    const GemmInput from = copy;
    copy.x = out;
    copy.stride = PaddedK(from);
    pool_.For(from.rows, std::max<int64_t>(1, 4096 / copy.stride),
              [&](int64_t begin, int64_t end, int) {
                for (int64_t row = begin; row < end; ++row) {
                  float* to = out + row * copy.stride;
                  QuantizeRow(from.x + row * from.stride, from.k, how[c], to);
                  std::fill(to + from.k, to + copy.stride, 0.0f);
                }
              });
    out += from.rows * copy.stride;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!read_as_is[i]) quantized_inputs_[i].rows = 0;
  }
}

void Gemm::Split(absl::Span<const GemmInput> inputs) {
  split_offsets_.clear();
  first_tasks_.clear();
  size_t elements = 0;
  int64_t num_tiles = 0;
  int64_t num_values = 0;
  for (const GemmInput& input : inputs) {
    split_offsets_.push_back(elements);
    first_tasks_.push_back(num_tiles);
    elements += NumSplitTiles(input) * SplitTileElements(input);
    num_tiles += NumSplitTiles(input);
    num_values += input.rows * PaddedK(input);
  }
  if (split_.size() < elements) split_.resize(elements);
  // Below some 16 K values another loop costs more than it gains.
  const int64_t grain =
      num_values < 16384 ? num_tiles : std::max<int64_t>(1, num_tiles / (pool_.num_threads() * 4));
  pool_.For(num_tiles, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const size_t i = FindRange(first_tasks_, tile);
      const GemmInput& input = inputs[i];
      const int t = static_cast<int>(tile - first_tasks_[i]);
      kernels_.split_rows(input.x, input.stride, input.rows, static_cast<int>(PaddedK(input)), t,
                          t + 1, split_.data() + split_offsets_[i]);
    }
  });
}

}  // namespace latentd
