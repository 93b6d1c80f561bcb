#include "tests/engine/comm/harness.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/comm/tcp_listener.h"
#include "engine/status.h"

namespace latentd {
namespace {

// What rank `from` gives rank `to` at index i of call `call`.
uint64_t Mix(uint64_t seed, int call, int from, int to, size_t i) {
  uint64_t x = seed * 0x9e3779b97f4a7c15 + call;
  for (const uint64_t part : {uint64_t(from), uint64_t(to), uint64_t(i)}) {
    x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9 + part;
  }
  return x ^ (x >> 32);
}

std::vector<std::byte> Bytes(uint64_t seed, int call, int from, int to, size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; i += 8) {
    const uint64_t word = Mix(seed, call, from, to, i);
    std::memcpy(&bytes[i], &word, std::min<size_t>(8, size - i));
  }
  return bytes;
}

// Of very different sizes: a sum in another order has other bits.
float Float(uint64_t seed, int call, int from, int to, size_t i) {
  const uint64_t x = Mix(seed, call, from, to, i);
  return std::ldexp(static_cast<float>(x % 20001) - 10000.0f, static_cast<int>(x >> 40) % 24);
}

class Calls {
 public:
  Calls(const RandomCalls& calls, Communicator* communicator)
      : calls_(calls),
        communicator_(*communicator),
        n_(communicator->world_size()),
        rank_(communicator->rank()),
        random_(calls.seed) {}

  absl::Status Run() {
    for (call_ = 0; call_ < calls_.num_calls; ++call_) {
      switch (random_() % 4) {
        case 0:
          RETURN_IF_ERROR(AllGather());
          break;
        case 1:
          RETURN_IF_ERROR(AllToAll());
          break;
        case 2:
          RETURN_IF_ERROR(ReduceScatter());
          break;
        default:
          RETURN_IF_ERROR(communicator_.Barrier());
      }
    }
    return absl::OkStatus();
  }

 private:
  // 0 often, and of every order of magnitude.
  size_t Size() {
    const uint64_t kind = random_() % 4;
    const uint64_t value = random_();
    if (kind == 0) return 0;
    return value % (kind == 1 ? 16 : calls_.max_bytes);
  }

  absl::Status AllGather() {
    const size_t size = Size();
    std::vector<std::byte> out(size * n_, std::byte(0x55));
    RETURN_IF_ERROR(
        communicator_.AllGather(Bytes(calls_.seed, call_, rank_, -1, size), absl::MakeSpan(out)));
    for (int r = 0; r < n_; ++r) {
      const std::vector<std::byte> expected = Bytes(calls_.seed, call_, r, -1, size);
      if (size > 0 && std::memcmp(&out[r * size], expected.data(), size) != 0) return Differs(r);
    }
    return absl::OkStatus();
  }

  absl::Status AllToAll() {
    std::vector<std::vector<std::byte>> give, take;
    for (int from = 0; from < n_; ++from) {
      for (int to = 0; to < n_; ++to) {
        const size_t size = Size();
        if (from == rank_) give.push_back(Bytes(calls_.seed, call_, from, to, size));
        if (to == rank_) take.emplace_back(size, std::byte(0x55));
      }
    }
    std::vector<absl::Span<const std::byte>> to(give.begin(), give.end());
    std::vector<absl::Span<std::byte>> from;
    for (std::vector<std::byte>& part : take) from.push_back(absl::MakeSpan(part));
    RETURN_IF_ERROR(communicator_.AllToAll(to, from));
    for (int r = 0; r < n_; ++r) {
      if (take[r] != Bytes(calls_.seed, call_, r, rank_, take[r].size())) return Differs(r);
    }
    return absl::OkStatus();
  }

  absl::Status ReduceScatter() {
    const size_t n = Size() / 4;
    std::vector<float> in, out(n, 7.0f);
    for (int to = 0; to < n_; ++to) {
      for (size_t i = 0; i < n; ++i) in.push_back(Float(calls_.seed, call_, rank_, to, i));
    }
    RETURN_IF_ERROR(communicator_.ReduceScatter(in, absl::MakeSpan(out)));
    for (size_t i = 0; i < n; ++i) {
      float sum = Float(calls_.seed, call_, 0, rank_, i);
      for (int r = 1; r < n_; ++r) sum += Float(calls_.seed, call_, r, rank_, i);
      if (std::memcmp(&sum, &out[i], sizeof(sum)) != 0) return Differs(-1);
    }
    return absl::OkStatus();
  }

  absl::Status Differs(int from) const {
    return absl::DataLossError(
        absl::StrCat("call ", call_, ": rank ", rank_, " got something else from rank ", from));
  }

  const RandomCalls calls_;
  Communicator& communicator_;
  const int n_;
  const int rank_;
  std::mt19937_64 random_;
  int call_ = 0;
};

}  // namespace

Group MakeTcpGroup(int world_size, absl::Duration call_timeout) {
  std::vector<std::unique_ptr<TcpListener>> listeners;
  std::vector<std::string> addresses;
  for (int rank = 0; rank < world_size; ++rank) {
    listeners.push_back(*TcpListener::Listen({.call_timeout = call_timeout}));
    addresses.push_back(listeners.back()->address());
  }
  Group group(world_size);
  for (const absl::Status& status : OnRanks(world_size, [&](int rank) {
         auto joined = listeners[rank]->Join(1, rank, addresses, absl::Now() + absl::Seconds(60));
         if (joined.ok()) group[rank] = *std::move(joined);
         return joined.status();
       })) {
    LATENTD_CHECK(status.ok());
  }
  return group;
}

std::vector<absl::Status> OnRanks(int num_ranks, const std::function<absl::Status(int)>& f) {
  std::vector<absl::Status> statuses(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] { statuses[rank] = f(rank); });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time end = absl::Now() + absl::Seconds(20);
  while (!condition()) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

absl::Status MakeRandomCalls(const RandomCalls& calls, Communicator* communicator) {
  return Calls(calls, communicator).Run();
}

}  // namespace latentd
