// NcclCommunicator: one rank on one GPU, a rank a thread on as many GPUs as there are; ranks that
// do not come, and groups that are aborted. Without NCCL the cases are skipped by name.

#include "engine/comm/nccl_communicator.h"

#include <cuda_bf16.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

// Needs neither NCCL nor a GPU.
TEST(NcclCommunicatorErrorTest, WhatCannotBeIsRefused) {
  const std::string id(128, 'x');
  for (const auto& status :
       {NcclCommunicator::Create(2, 2, id).status(), NcclCommunicator::Create(-1, 2, id).status(),
        NcclCommunicator::Create(0, 1, "short").status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  }
}

class NcclCommunicatorTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    const auto id = NcclCommunicator::MakeUniqueId();
    if (!id.ok()) GTEST_SKIP() << id.status();
  }
};

std::unique_ptr<NcclCommunicator> Make(int rank, int world_size, const std::string& id) {
  auto made = NcclCommunicator::Create(rank, world_size, id);
  EXPECT_TRUE(made.ok()) << made.status();
  return made.ok() ? *std::move(made) : nullptr;
}

// Gathers and adds, launch by launch or from a graph.
void CheckCollectives(NcclCommunicator& communicator, int rank, int world_size, bool graph) {
  constexpr int kCount = 1024;
  cudaStream_t stream = nullptr;
  ASSERT_CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  DeviceArray<uint8_t> slots(size_t(world_size) * kCount);
  std::vector<__nv_bfloat16> values(size_t(world_size) * kCount);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = __float2bfloat16(static_cast<float>((i % 7 + 1) * (rank + 1)));
  DeviceArray<__nv_bfloat16> in(values), out(kCount);
  ASSERT_CUDA_OK(cudaMemset(slots.get() + size_t(rank) * kCount, rank + 1, kCount));
  ASSERT_CUDA_OK(cudaDeviceSynchronize());
  const auto enqueue = [&] {
    EXPECT_TRUE(
        communicator.AllGather(reinterpret_cast<std::byte*>(slots.get()), kCount, stream).ok());
    EXPECT_TRUE(communicator.ReduceScatterBf16(in.get(), out.get(), kCount, stream).ok());
  };
  if (graph) {
    cudaGraph_t captured = nullptr;
    cudaGraphExec_t exec = nullptr;
    enqueue();  // connections are made
    ASSERT_CUDA_OK(cudaStreamSynchronize(stream));
    ASSERT_CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    enqueue();
    ASSERT_CUDA_OK(cudaStreamEndCapture(stream, &captured));
    ASSERT_CUDA_OK(cudaGraphInstantiate(&exec, captured, 0));
    out.Poison();
    for (int i = 0; i < 3; ++i) ASSERT_CUDA_OK(cudaGraphLaunch(exec, stream));
    ASSERT_CUDA_OK(cudaStreamSynchronize(stream));
    ASSERT_CUDA_OK(cudaGraphExecDestroy(exec));
    ASSERT_CUDA_OK(cudaGraphDestroy(captured));
  } else {
    enqueue();
    ASSERT_CUDA_OK(cudaStreamSynchronize(stream));
  }
  EXPECT_TRUE(communicator.Check().ok());
  const std::vector<uint8_t> gathered = slots.Get();
  for (size_t i = 0; i < gathered.size(); ++i)
    ASSERT_EQ(gathered[i], i / kCount + 1) << "graph " << graph << " at " << i;
  const std::vector<__nv_bfloat16> sums = out.Get();
  for (int i = 0; i < kCount; ++i) {
    const size_t at = size_t(rank) * kCount + i;
    const float expected =
        static_cast<float>(at % 7 + 1) * world_size * (world_size + 1) / 2.0f;  // small and whole
    ASSERT_EQ(__bfloat162float(sums[i]), expected) << "graph " << graph << " at " << i;
  }
  ASSERT_CUDA_OK(cudaStreamDestroy(stream));
}

TEST_F(NcclCommunicatorTest, GathersAndAddsOnEveryGpu) {
  int devices = 0;
  ASSERT_CUDA_OK(cudaGetDeviceCount(&devices));
  const int world_size = std::min(devices, 8);
  const std::string id = *NcclCommunicator::MakeUniqueId();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < world_size; ++rank) {
    ranks.emplace_back([=] {
      ASSERT_CUDA_OK(cudaSetDevice(rank));
      const auto communicator = Make(rank, world_size, id);
      ASSERT_NE(communicator, nullptr);
      EXPECT_THAT(communicator->version(), HasSubstr("NCCL 2."));
      const absl::Status formed = communicator->Form(absl::Now() + absl::Seconds(30));
      ASSERT_TRUE(formed.ok()) << formed;
      CheckCollectives(*communicator, rank, world_size, /*graph=*/false);
      CheckCollectives(*communicator, rank, world_size, /*graph=*/true);
    });
  }
  for (std::thread& rank : ranks) rank.join();
  std::printf("%d ranks: gathered and added\n", world_size);
}

double SecondsOf(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

TEST_F(NcclCommunicatorTest, ARankThatDoesNotComeIsNotWaitedForLong) {
  auto communicator = Make(0, 2, *NcclCommunicator::MakeUniqueId());
  absl::Status status;
  double waited =
      SecondsOf([&] { status = communicator->Form(absl::Now() + absl::Milliseconds(500)); });
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_LT(waited, 2);
  EXPECT_EQ(communicator->Check(), status);
  std::printf("ranks: a join given up in %.2f s, destroyed in %.2f s\n", waited,
              SecondsOf([&] { communicator.reset(); }));

  communicator = Make(0, 2, *NcclCommunicator::MakeUniqueId());
  std::thread leader([&] {
    absl::SleepFor(absl::Milliseconds(200));
    communicator->Abort(absl::AbortedError("rank 1 is gone"));
  });
  waited = SecondsOf([&] { status = communicator->Form(absl::InfiniteFuture()); });
  leader.join();
  EXPECT_EQ(status, absl::AbortedError("rank 1 is gone"));
  EXPECT_LT(waited, 2);
}

TEST_F(NcclCommunicatorTest, AfterAnAbortEverythingFails) {
  auto communicator = Make(0, 1, *NcclCommunicator::MakeUniqueId());
  ASSERT_TRUE(communicator->Form(absl::Now() + absl::Seconds(30)).ok());
  const absl::Status why = absl::UnavailableError("rank 3 is gone");
  communicator->Abort(why);
  communicator->Abort(absl::AbortedError("too late to count"));
  DeviceArray<uint8_t> slots(16);
  EXPECT_EQ(communicator->AllGather(reinterpret_cast<std::byte*>(slots.get()), 16, nullptr), why);
  EXPECT_EQ(communicator->ReduceScatterBf16(slots.get(), slots.get(), 8, nullptr), why);
  EXPECT_EQ(communicator->Check(), why);
}

}  // namespace
}  // namespace latentd
