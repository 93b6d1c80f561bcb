#include "engine/cpu/expert_exchange.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int32_t kNone = -1;
constexpr int64_t kCopyGrain = 32;  // rows of one task

// Grows only: no step allocates once the largest has been seen.
template <typename Vector>
void Grow(Vector& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
}

template <typename T>
absl::Span<const std::byte> Bytes(const T* data, size_t count) {
  return {reinterpret_cast<const std::byte*>(data), count * sizeof(T)};
}
template <typename T>
absl::Span<std::byte> MutableBytes(T* data, size_t count) {
  return {reinterpret_cast<std::byte*>(data), count * sizeof(T)};
}

}  // namespace

ExpertExchange::ExpertExchange(const ModelConfig& config, ThreadPool& pool,
                               Communicator& communicator, size_t gather_bytes)
    : config_(config),
      pool_(pool),
      communicator_(communicator),
      gather_bytes_(gather_bytes),
      num_ranks_(communicator.world_size()),
      row_floats_(size_t(config.hidden_size) + config.num_experts_per_tok),
      rows_to_(num_ranks_),
      counts_(size_t(num_ranks_) * num_ranks_),
      first_rows_(num_ranks_ + 1),
      to_(num_ranks_),
      from_(num_ranks_) {
  for (int32_t expert = 0; expert < config.n_routed_experts; ++expert) {
    rank_of_.push_back(RankOfExpert(config.n_routed_experts, expert, num_ranks_));
  }
}

absl::StatusOr<RoutedRows> ExpertExchange::Dispatch(const RoutedRows& own) {
  own_ = own;
  const size_t all_bytes = sizeof(float) * row_floats_ * num_ranks_ * most_rows_;
  RETURN_IF_ERROR(all_bytes <= gather_bytes_ ? GatherRows() : SendRows());
  const int rows = first_rows_.back(), k = config_.num_experts_per_tok;
  Grow(experts_in_, size_t(rows) * k);
  for (int row = 0; row < rows; ++row) {
    std::memcpy(experts_in_.data() + size_t(row) * k,
                rows_in_.data() + row * row_floats_ + config_.hidden_size, sizeof(int32_t) * k);
  }
  return RoutedRows{.x = rows_in_.data(),
                    .x_stride = static_cast<ptrdiff_t>(row_floats_),
                    .experts = experts_in_.data(),
                    .rows = rows};
}

void ExpertExchange::PackRow(int row, float* to) const {
  const int k = config_.num_experts_per_tok;
  std::memcpy(to, own_.x + row * own_.x_stride, sizeof(float) * config_.hidden_size);
  std::memcpy(to + config_.hidden_size, own_.experts + size_t(row) * k, sizeof(int32_t) * k);
}

// All rows to everybody, most_rows_ of each rank: the sizes need no word.
absl::Status ExpertExchange::GatherRows() {
  const size_t part = most_rows_ * row_floats_;
  Grow(rows_out_, part);
  Grow(rows_in_, num_ranks_ * part);
  for (int row = 0; row < own_.rows; ++row) PackRow(row, rows_out_.data() + row * row_floats_);
  const std::vector<int32_t> none(config_.num_experts_per_tok, kNone);
  for (int row = own_.rows; row < most_rows_; ++row) {
    std::memcpy(rows_out_.data() + row * row_floats_ + config_.hidden_size, none.data(),
                sizeof(int32_t) * none.size());
  }
  for (int rank = 0; rank <= num_ranks_; ++rank) first_rows_[rank] = rank * most_rows_;
  return communicator_.AllGather(Bytes(rows_out_.data(), part),
                                 MutableBytes(rows_in_.data(), num_ranks_ * part));
}

// Each row once to each rank that holds one of its experts.
absl::Status ExpertExchange::SendRows() {
  const int k = config_.num_experts_per_tok;
  for (std::vector<int32_t>& rows : rows_to_) rows.clear();
  for (int row = 0; row < own_.rows; ++row) {
    // A row's experts are ascending, and so are their ranks.
    int last = kNone;
    for (int j = 0; j < k; ++j) {
      const int rank = rank_of_[own_.experts[size_t(row) * k + j]];
      if (rank != last) rows_to_[rank].push_back(row);
      last = rank;
    }
  }
  RETURN_IF_ERROR(ExchangeCounts());

  size_t num_out = 0;
  for (const std::vector<int32_t>& rows : rows_to_) num_out += rows.size();
  Grow(rows_out_, num_out * row_floats_);
  Grow(rows_in_, first_rows_.back() * row_floats_);
  float* out = rows_out_.data();
  for (int rank = 0; rank < num_ranks_; ++rank) {
    const std::vector<int32_t>& rows = rows_to_[rank];
    const int64_t count = static_cast<int64_t>(rows.size());
    pool_.For(count, kCopyGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) PackRow(rows[i], out + i * row_floats_);
    });
    to_[rank] = Bytes(out, count * row_floats_);
    out += count * row_floats_;
    from_[rank] = MutableBytes(rows_in_.data() + first_rows_[rank] * row_floats_,
                               (first_rows_[rank + 1] - first_rows_[rank]) * row_floats_);
  }
  return communicator_.AllToAll(to_, from_);
}

// How many rows go from each rank to each: first_rows_.
absl::Status ExpertExchange::ExchangeCounts() {
  std::vector<int32_t> counts(num_ranks_);
  for (int rank = 0; rank < num_ranks_; ++rank) {
    counts[rank] = static_cast<int32_t>(rows_to_[rank].size());
  }
  RETURN_IF_ERROR(communicator_.AllGather(Bytes(counts.data(), counts.size()),
                                          MutableBytes(counts_.data(), counts_.size())));
  for (int rank = 0; rank < num_ranks_; ++rank) {
    const int32_t count = counts_[size_t(rank) * num_ranks_ + communicator_.rank()];
    if (count < 0 || count > most_rows_) {
      return absl::InternalError(absl::StrCat("rank ", rank, " sends ", count,
                                              " rows of a tile; it has ", most_rows_, " at most"));
    }
    first_rows_[rank + 1] = first_rows_[rank] + count;
  }
  return absl::OkStatus();
}

absl::StatusOr<ExpertOutputs> ExpertExchange::Combine(const ExpertOutputs& computed) {
  const size_t hidden = config_.hidden_size;
  const int k = config_.num_experts_per_tok;
  // Both sides know how many outputs go from whom to whom, in which order: by the rows' experts.
  sources_.clear();
  std::vector<size_t> first_out(num_ranks_ + 1, 0);
  for (int rank = 0; rank < num_ranks_; ++rank) {
    for (int64_t i = int64_t{first_rows_[rank]} * k; i < int64_t{first_rows_[rank + 1]} * k; ++i) {
      if (computed.places[i] != kNone) sources_.push_back(computed.places[i]);
    }
    first_out[rank + 1] = sources_.size();
  }
  Grow(outputs_out_, sources_.size() * hidden);
  pool_.For(static_cast<int64_t>(sources_.size()), kCopyGrain,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t i = begin; i < end; ++i) {
                std::memcpy(outputs_out_.data() + i * hidden,
                            computed.outputs + sources_[i] * hidden, sizeof(float) * hidden);
              }
            });

  const size_t num_in = size_t(own_.rows) * k;
  std::vector<size_t> first_in(num_ranks_ + 1, 0);
  for (size_t i = 0; i < num_in; ++i) ++first_in[rank_of_[own_.experts[i]] + 1];
  for (int rank = 0; rank < num_ranks_; ++rank) first_in[rank + 1] += first_in[rank];
  Grow(outputs_in_, num_in * hidden);
  Grow(places_, num_in);
  for (int rank = 0; rank < num_ranks_; ++rank) {
    to_[rank] = Bytes(outputs_out_.data() + first_out[rank] * hidden,
                      (first_out[rank + 1] - first_out[rank]) * hidden);
    from_[rank] = MutableBytes(outputs_in_.data() + first_in[rank] * hidden,
                               (first_in[rank + 1] - first_in[rank]) * hidden);
  }
  std::vector<size_t> next = first_in;
  for (size_t i = 0; i < num_in; ++i) {
    places_[i] = static_cast<int32_t>(next[rank_of_[own_.experts[i]]]++);
  }
  RETURN_IF_ERROR(communicator_.AllToAll(to_, from_));
  return ExpertOutputs{.outputs = outputs_in_.data(), .places = places_.data()};
}

uint64_t ExpertExchange::NumFloats(const ModelConfig& config, const Placement& placement) {
  const uint64_t ranks = placement.world_size, k = config.num_experts_per_tok;
  const uint64_t here = std::min<uint64_t>(k, placement.Experts(config.n_routed_experts).count);
  const uint64_t rows = std::min(ranks, k) + ranks;  // out, in
  return rows * (config.hidden_size + k) + (ranks * here + k) * config.hidden_size;
}

}  // namespace latentd
