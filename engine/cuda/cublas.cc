#include "engine/cuda/cublas.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <bit>
#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/comm/library_function.h"
#include "engine/cuda/cuda_status.h"
#include "engine/cuda/device_memory.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr size_t kMinVersion = 120900;  // the first with FP8 scales of blocks

// The functions of cuBLASLt that are used.
struct Api {
  decltype(&cublasLtGetVersion) GetVersion;
  decltype(&cublasLtGetStatusName) GetStatusName;
  decltype(&cublasLtCreate) Create;
  decltype(&cublasLtDestroy) Destroy;
  decltype(&cublasLtMatmul) Matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) GetHeuristic;
  decltype(&cublasLtMatmulDescCreate) DescCreate;
  decltype(&cublasLtMatmulDescDestroy) DescDestroy;
  decltype(&cublasLtMatmulDescSetAttribute) DescSet;
  decltype(&cublasLtMatrixLayoutCreate) LayoutCreate;
  decltype(&cublasLtMatrixLayoutDestroy) LayoutDestroy;
  decltype(&cublasLtMatrixLayoutSetAttribute) LayoutSet;
  decltype(&cublasLtMatmulPreferenceCreate) PreferenceCreate;
  decltype(&cublasLtMatmulPreferenceDestroy) PreferenceDestroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) PreferenceSet;
};

bool FindAll(void* library, Api* api) {
  return FindFunction(library, "cublasLtGetVersion", &api->GetVersion) &&
         FindFunction(library, "cublasLtGetStatusName", &api->GetStatusName) &&
         FindFunction(library, "cublasLtCreate", &api->Create) &&
         FindFunction(library, "cublasLtDestroy", &api->Destroy) &&
         FindFunction(library, "cublasLtMatmul", &api->Matmul) &&
         FindFunction(library, "cublasLtMatmulAlgoGetHeuristic", &api->GetHeuristic) &&
         FindFunction(library, "cublasLtMatmulDescCreate", &api->DescCreate) &&
         FindFunction(library, "cublasLtMatmulDescDestroy", &api->DescDestroy) &&
         FindFunction(library, "cublasLtMatmulDescSetAttribute", &api->DescSet) &&
         FindFunction(library, "cublasLtMatrixLayoutCreate", &api->LayoutCreate) &&
         FindFunction(library, "cublasLtMatrixLayoutDestroy", &api->LayoutDestroy) &&
         FindFunction(library, "cublasLtMatrixLayoutSetAttribute", &api->LayoutSet) &&
         FindFunction(library, "cublasLtMatmulPreferenceCreate", &api->PreferenceCreate) &&
         FindFunction(library, "cublasLtMatmulPreferenceDestroy", &api->PreferenceDestroy) &&
         FindFunction(library, "cublasLtMatmulPreferenceSetAttribute", &api->PreferenceSet);
}

// The library stays loaded until the process ends: CUDA's libraries do not like to be unloaded.
absl::StatusOr<Api> LoadApi() {
  constexpr char kName[] = "libcublasLt.so.13";
  std::vector<std::string> names;
  if (const char* path = std::getenv("LATENTD_CUBLASLT"); path != nullptr && *path != '\0') {
    names = {path};
  } else {
    names = {kName, absl::StrCat("/usr/local/cuda/lib64/", kName),
             absl::StrCat("/usr/local/cuda/targets/x86_64-linux/lib/", kName),
             absl::StrCat(LATENTD_CUDA_LIBRARIES "/", kName)};
  }
  std::vector<std::string> errors;
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      errors.push_back(dlerror());  // begins with the name
      continue;
    }
    Api api;
    if (!FindAll(library, &api)) {
      errors.push_back(absl::StrCat(name, ": lacks a function of cuBLASLt"));
    } else if (api.GetVersion() < kMinVersion) {
      errors.push_back(
          absl::StrCat(name, ": version ", api.GetVersion(), ", needed is ", kMinVersion));
    } else {
      return api;
    }
  }
  return absl::UnavailableError(absl::StrCat("no cuBLASLt: ", absl::StrJoin(errors, "; ")));
}

// A product of row-major matrices, out_b [rows, n] = x_b [rows, k] op(W_b). To cuBLAS, whose
// matrices are column-major, it is out^T = op(W)^T x^T: its A is W, its B is x.
struct Product {
  // What a plan is made for, with a class of rows.
  struct Shape {
    cudaDataType_t type = CUDA_R_16BF;      // of x and W
    cudaDataType_t out_type = CUDA_R_16BF;  // of out
    bool weight_is_k_by_n = false;
    int rows = 0, n = 0, k = 0, batch = 1;
    int64_t x_stride = 0, weight_stride = 0, out_stride = 0;
    int64_t x_batch_stride = 0, weight_batch_stride = 0, out_batch_stride = 0;

    auto Tie() const {
      return std::tie(type, out_type, weight_is_k_by_n, rows, n, k, batch, x_stride, weight_stride,
                      out_stride, x_batch_stride, weight_batch_stride, out_batch_stride);
    }
    bool operator==(const Shape& other) const { return Tie() == other.Tie(); }
    template <typename H>
    friend H AbslHashValue(H h, const Shape& shape) {
      return H::combine(std::move(h), shape.Tie());
    }
  };
  Shape shape;
  int planned_rows = 0;  // > 0: their algorithm is taken
  const void* x = nullptr;
  const void* weight = nullptr;
  void* out = nullptr;
  const float* x_scales = nullptr;  // FP8
  const float* weight_scales = nullptr;
};

std::string ToString(const Product::Shape& shape) {
  return absl::StrCat(shape.type == CUDA_R_8F_E4M3 ? "FP8" : "bf16", " product of ", shape.rows,
                      " rows, n ", shape.n, ", k ", shape.k,
                      shape.batch > 1 ? absl::StrCat(", batch ", shape.batch) : "");
}

// Row counts that share an algorithm, as the largest of them.
int RowClass(int rows) {
  if (rows <= 16) return rows;
  const int step = static_cast<int>(std::bit_floor(static_cast<unsigned>(rows))) / 8;
  return (rows + step - 1) / step * step;
}

// What cuBLASLt says of a shape, or of an algorithm for it, that it has no kernel for.
bool Refused(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE;
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

absl::Status Check(const Product& product) {
  const Product::Shape& shape = product.shape;
  if (shape.rows < 1 || shape.n < 1 || shape.k < 1 || shape.batch < 1) {
    return absl::InvalidArgumentError(absl::StrCat(ToString(shape), ": an empty matrix"));
  }
  if (shape.x_stride < shape.k || shape.out_stride < shape.n ||
      shape.weight_stride < (shape.weight_is_k_by_n ? shape.n : shape.k)) {
    return absl::InvalidArgumentError(absl::StrCat(ToString(shape), ": a stride below its row: x ",
                                                   shape.x_stride, ", weight ", shape.weight_stride,
                                                   ", out ", shape.out_stride));
  }
  if (product.x == nullptr || product.weight == nullptr || product.out == nullptr ||
      !Aligned(product.x) || !Aligned(product.weight) || !Aligned(product.out) ||
      !Aligned(product.x_scales) || !Aligned(product.weight_scales)) {
    return absl::InvalidArgumentError(
        absl::StrCat(ToString(shape), ": a pointer is null or not aligned to 16 bytes"));
  }
  return absl::OkStatus();
}

class CublasLt : public Cublas {
 public:
  explicit CublasLt(const Api& api) : api_(api) {}
  ~CublasLt() override;

  absl::Status Init();

  absl::Status Linear(const LinearInput& x, int rows, const WeightMatrix& weight,
                      __nv_bfloat16* out, int64_t out_stride, cudaStream_t stream) override;
  absl::Status LinearF32(const __nv_bfloat16* x, int rows, const __nv_bfloat16* weight, int n,
                         int k, float* out, int64_t out_stride, cudaStream_t stream) override;
  absl::Status LinearBatched(const Batched& args, cudaStream_t stream) override;

 private:
  // cuBLASLt's view of a shape, and the algorithm for it. Its layouts' rows are set by each call.
  struct Plan {
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t weight = nullptr, x = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algo = {};
    cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;  // that the choice ended with
  };

  absl::Status Run(const Product& product, cudaStream_t stream);
  Plan& FindPlan(const Product& product, int rows);
  cublasStatus_t MakePlan(const Product& product, int rows, Plan* plan);
  cublasStatus_t MakeLayout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t stride,
                            int batch, int64_t batch_stride, cublasLtMatrixLayout_t* layout);
  cublasStatus_t Choose(Plan* plan);
  cublasStatus_t SetScales(const Product& product, const Plan& plan);
  cublasStatus_t Execute(const Product& product, const Plan& plan, cudaStream_t stream);
  absl::Status ToStatus(cublasStatus_t status, const char* call, const std::string& what) const;

  const Api api_;
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulPreference_t preference_ = nullptr;
  DeviceMemory workspace_;
  absl::flat_hash_map<Product::Shape, Plan> plans_;
};

// Returns from the enclosing function when a call of cuBLASLt fails.
#define RETURN_IF_CUBLAS_ERROR(call)                         \
  do {                                                       \
    if (const cublasStatus_t latentd_cublas_status = (call); \
        latentd_cublas_status != CUBLAS_STATUS_SUCCESS)      \
      return latentd_cublas_status;                          \
  } while (false)

CublasLt::~CublasLt() {
  for (auto& [shape, plan] : plans_) {
    for (cublasLtMatrixLayout_t layout : {plan.weight, plan.x, plan.out}) {
      if (layout != nullptr) api_.LayoutDestroy(layout);
    }
    if (plan.desc != nullptr) api_.DescDestroy(plan.desc);
  }
  if (preference_ != nullptr) api_.PreferenceDestroy(preference_);
  if (handle_ != nullptr) api_.Destroy(handle_);
}

absl::Status CublasLt::Init() {
  RETURN_IF_ERROR(ToStatus(api_.Create(&handle_), "cublasLtCreate", "the current device"));
  ASSIGN_OR_RETURN(workspace_, DeviceMemory::Allocate(kWorkspaceBytes));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    RETURN_IF_CUBLAS_ERROR(api_.PreferenceSet(preference_, attribute, &value, sizeof(value)));
    return CUBLAS_STATUS_SUCCESS;
  };
  const auto make = [&]() -> cublasStatus_t {
    RETURN_IF_CUBLAS_ERROR(api_.PreferenceCreate(&preference_));
    RETURN_IF_CUBLAS_ERROR(
        set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes}));
    // Split sums stay f32 to their end.
    RETURN_IF_CUBLAS_ERROR(set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                               uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE} |
                                   uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}));
    for (auto operand :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      RETURN_IF_CUBLAS_ERROR(set(operand, uint32_t{16}));
    }
    return CUBLAS_STATUS_SUCCESS;
  };
  return ToStatus(make(), "cublasLtMatmulPreferenceSetAttribute", "the preferences");
}

absl::Status CublasLt::ToStatus(cublasStatus_t status, const char* call,
                                const std::string& what) const {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string message = absl::StrCat(call, ": ", api_.GetStatusName(status), ": ", what);
  if (Refused(status)) return absl::UnimplementedError(message);
  return status == CUBLAS_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(message)
                                              : absl::UnavailableError(message);
}

absl::Status CublasLt::Linear(const LinearInput& x, int rows, const WeightMatrix& weight,
                              __nv_bfloat16* out, int64_t out_stride, cudaStream_t stream) {
  if (rows == 0) return absl::OkStatus();
  Product product;
  Product::Shape& shape = product.shape;
  shape.rows = rows;
  shape.n = weight.n;
  shape.k = weight.k;
  shape.x_stride = shape.weight_stride = weight.k;
  shape.out_stride = out_stride;
  product.x = x.bf16;
  product.weight = weight.bf16;
  product.out = out;
  if (weight.is_fp8()) {
    shape.type = CUDA_R_8F_E4M3;
    shape.rows = PaddedRows(rows);
    product.x = x.fp8.data;
    product.x_scales = x.fp8.scales;
    product.weight = weight.fp8;
    product.weight_scales = weight.scales;
    if (x.fp8.scale_stride != shape.rows || product.x_scales == nullptr ||
        product.weight_scales == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(ToString(shape), ": without scales, or their stride is not the rows but ",
                       x.fp8.scale_stride));
    }
    if (weight.k % kQuantGroup != 0 ||
        weight.scale_stride != (weight.k / kQuantGroup + 3) / 4 * 4) {
      return absl::InvalidArgumentError(absl::StrCat(
          ToString(shape), ": k is not a multiple of 128, or the weight's scale_stride ",
          weight.scale_stride, " not k / 128 rounded up to a multiple of 4"));
    }
  }
  return Run(product, stream);
}

absl::Status CublasLt::LinearF32(const __nv_bfloat16* x, int rows, const __nv_bfloat16* weight,
                                 int n, int k, float* out, int64_t out_stride,
                                 cudaStream_t stream) {
  if (rows == 0) return absl::OkStatus();
  Product product;
  product.shape.out_type = CUDA_R_32F;
  product.shape.rows = rows;
  product.shape.n = n;
  product.shape.k = k;
  product.shape.x_stride = product.shape.weight_stride = k;
  product.shape.out_stride = out_stride;
  product.x = x;
  product.weight = weight;
  product.out = out;
  return Run(product, stream);
}

absl::Status CublasLt::LinearBatched(const Batched& args, cudaStream_t stream) {
  if (args.rows == 0 || args.batch == 0) return absl::OkStatus();
  Product product;
  product.shape = {.weight_is_k_by_n = args.weight_is_k_by_n,
                   .rows = args.rows,
                   .n = args.n,
                   .k = args.k,
                   .batch = args.batch,
                   .x_stride = args.x_stride,
                   .weight_stride = args.weight_stride,
                   .out_stride = args.out_stride,
                   .x_batch_stride = args.x_batch_stride,
                   .weight_batch_stride = args.weight_batch_stride,
                   .out_batch_stride = args.out_batch_stride};
  if (args.planned_rows != 0 && args.planned_rows < args.rows) {
    return absl::InvalidArgumentError(
        absl::StrCat(ToString(product.shape), ": planned_rows ", args.planned_rows, " are fewer"));
  }
  product.planned_rows = args.planned_rows;
  product.x = args.x;
  product.weight = args.weight;
  product.out = args.out;
  return Run(product, stream);
}

absl::Status CublasLt::Run(const Product& product, cudaStream_t stream) {
  RETURN_IF_ERROR(Check(product));
  const int rows = product.shape.rows;
  // An algorithm chosen for the largest of a class serves the others, as a rule; else each has its
  // own.
  const bool fixed = product.planned_rows > 0;
  const int classes[] = {fixed ? product.planned_rows : RowClass(rows), rows};
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  for (int i = 0; i < (fixed ? 1 : 2) && Refused(status); ++i) {
    const Plan& plan = FindPlan(product, classes[i]);
    status = plan.status == CUBLAS_STATUS_SUCCESS ? Execute(product, plan, stream) : plan.status;
  }
  return ToStatus(status, "cublasLtMatmul", ToString(product.shape));
}

CublasLt::Plan& CublasLt::FindPlan(const Product& product, int rows) {
  Product::Shape key = product.shape;
  key.rows = rows;
  auto [it, added] = plans_.try_emplace(key);
  if (added) it->second.status = MakePlan(product, rows, &it->second);
  return it->second;
}

cublasStatus_t CublasLt::MakePlan(const Product& product, int rows, Plan* plan) {
  const Product::Shape& shape = product.shape;
  RETURN_IF_CUBLAS_ERROR(api_.DescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t op = shape.weight_is_k_by_n ? CUBLAS_OP_N : CUBLAS_OP_T;
  RETURN_IF_CUBLAS_ERROR(api_.DescSet(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &op, sizeof(op)));
  if (shape.type == CUDA_R_8F_E4M3) {
    const cublasLtMatmulMatrixScale_t weight = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
    const cublasLtMatmulMatrixScale_t x = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    RETURN_IF_CUBLAS_ERROR(
        api_.DescSet(plan->desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &weight, sizeof(weight)));
    RETURN_IF_CUBLAS_ERROR(
        api_.DescSet(plan->desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &x, sizeof(x)));
    RETURN_IF_CUBLAS_ERROR(SetScales(product, *plan));
  }
  const int weight_rows = shape.weight_is_k_by_n ? shape.k : shape.n;
  const int weight_columns = shape.weight_is_k_by_n ? shape.n : shape.k;
  RETURN_IF_CUBLAS_ERROR(MakeLayout(shape.type, weight_rows, weight_columns, shape.weight_stride,
                                    shape.batch, shape.weight_batch_stride, &plan->weight));
  RETURN_IF_CUBLAS_ERROR(MakeLayout(shape.type, rows, shape.k, shape.x_stride, shape.batch,
                                    shape.x_batch_stride, &plan->x));
  RETURN_IF_CUBLAS_ERROR(MakeLayout(shape.out_type, rows, shape.n, shape.out_stride, shape.batch,
                                    shape.out_batch_stride, &plan->out));
  return Choose(plan);
}

// Of a row-major matrix; cuBLAS calls its columns rows.
cublasStatus_t CublasLt::MakeLayout(cudaDataType_t type, int64_t rows, int64_t columns,
                                    int64_t stride, int batch, int64_t batch_stride,
                                    cublasLtMatrixLayout_t* layout) {
  RETURN_IF_CUBLAS_ERROR(api_.LayoutCreate(layout, type, static_cast<uint64_t>(columns),
                                           static_cast<uint64_t>(rows), stride));
  if (batch == 1) return CUBLAS_STATUS_SUCCESS;
  const int32_t count = batch;
  RETURN_IF_CUBLAS_ERROR(
      api_.LayoutSet(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)));
  return api_.LayoutSet(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch_stride,
                        sizeof(batch_stride));
}

cublasStatus_t CublasLt::Choose(Plan* plan) {
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  RETURN_IF_CUBLAS_ERROR(api_.GetHeuristic(handle_, plan->desc, plan->weight, plan->x, plan->out,
                                           plan->out, preference_, 1, &result, &found));
  if (found == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  plan->algo = result.algo;
  return result.state;
}

cublasStatus_t CublasLt::SetScales(const Product& product, const Plan& plan) {
  RETURN_IF_CUBLAS_ERROR(api_.DescSet(plan.desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                      &product.weight_scales, sizeof(product.weight_scales)));
  return api_.DescSet(plan.desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &product.x_scales,
                      sizeof(product.x_scales));
}

cublasStatus_t CublasLt::Execute(const Product& product, const Plan& plan, cudaStream_t stream) {
  const uint64_t rows = static_cast<uint64_t>(product.shape.rows);
  for (cublasLtMatrixLayout_t layout : {plan.x, plan.out}) {
    RETURN_IF_CUBLAS_ERROR(
        api_.LayoutSet(layout, CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof(rows)));
  }
  if (product.shape.type == CUDA_R_8F_E4M3) RETURN_IF_CUBLAS_ERROR(SetScales(product, plan));
  constexpr float kOne = 1, kZero = 0;
  return api_.Matmul(handle_, plan.desc, &kOne, product.weight, plan.weight, product.x, plan.x,
                     &kZero, product.out, plan.out, product.out, plan.out, &plan.algo,
                     workspace_.data(), workspace_.bytes(), stream);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Cublas>> Cublas::Create() {
  ASSIGN_OR_RETURN(const Api api, LoadApi());
  auto cublas = std::make_unique<CublasLt>(api);
  RETURN_IF_ERROR(cublas->Init());
  return cublas;
}

}  // namespace latentd
