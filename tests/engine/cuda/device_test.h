#ifndef LATENTD_TESTS_ENGINE_CUDA_DEVICE_TEST_H_
#define LATENTD_TESTS_ENGINE_CUDA_DEVICE_TEST_H_

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace latentd {

#define ASSERT_CUDA_OK(call)                                       \
  do {                                                             \
    const cudaError_t device_test_error = (call);                  \
    ASSERT_EQ(device_test_error, cudaSuccess)                      \
        << #call << ": " << cudaGetErrorString(device_test_error); \
  } while (false)

// A test that needs a Hopper GPU; skipped by name where there is none.
class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0, major = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no GPU";
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    if (major != 9) GTEST_SKIP() << "the GPU has compute capability " << major << ", not 9";
  }
};

// An array on the device. What is not written holds NaNs in every type: 0xff bytes are a NaN in
// f32, bf16 and e4m3, and -1 in integers. 256 bytes behind it are poisoned too and checked for
// writes by ~DeviceArray.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    if (cudaMalloc(reinterpret_cast<void**>(&data_), bytes() + kGuard) != cudaSuccess)
      ADD_FAILURE() << "cudaMalloc of " << bytes();
    cudaMemset(data_, 0xff, bytes() + kGuard);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() {
    std::vector<uint8_t> guard(kGuard);
    if (cudaMemcpy(guard.data(), reinterpret_cast<uint8_t*>(data_) + bytes(), kGuard,
                   cudaMemcpyDeviceToHost) == cudaSuccess) {
      for (uint8_t byte : guard) {
        if (byte != 0xff) {
          ADD_FAILURE() << "written beyond the end of an array of " << bytes() << " bytes";
          break;
        }
      }
    }
    cudaFree(data_);
  }

  T* get() { return data_; }
  const T* get() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void Poison() { cudaMemset(data_, 0xff, bytes()); }
  void Zero() { cudaMemset(data_, 0, bytes()); }
  void Set(const std::vector<T>& values) {
    cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  std::vector<T> Get() const {
    std::vector<T> values(size_);
    cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  static constexpr size_t kGuard = 256;
  size_t size_;
  T* data_ = nullptr;
};

// Median microseconds of one call of `enqueue(i, stream)`, i = 0 .. calls - 1, captured together
// into a graph that is replayed `repeats` times; < 0 after an error. Let i rotate over weights
// larger than the L2 cache together.
template <typename Enqueue>
double GraphMicroseconds(int calls, int repeats, Enqueue enqueue) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  cudaStreamCreate(&stream);
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  bool ok = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
  for (int i = 0; i < calls && ok; ++i) ok = enqueue(i, stream) == cudaSuccess;
  ok = cudaStreamEndCapture(stream, &graph) == cudaSuccess && ok;
  ok = ok && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess;
  std::vector<float> times;
  if (ok) cudaGraphLaunch(exec, stream);
  for (int i = 0; i < repeats && ok; ++i) {
    cudaEventRecord(begin, stream);
    cudaGraphLaunch(exec, stream);
    cudaEventRecord(end, stream);
    ok = cudaStreamSynchronize(stream) == cudaSuccess;
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    times.push_back(ms);
  }
  if (exec != nullptr) cudaGraphExecDestroy(exec);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  if (!ok) return -1;
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3 / calls;
}

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_DEVICE_TEST_H_
