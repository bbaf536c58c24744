// Products by cuBLAS, which is opened at run time: a machine that runs no prompt needs none. No header of it is needed.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <library_types.h>

#include <map>
#include <mutex>

#include "mamba_kernels.h"

namespace mamba {
namespace blas {

constexpr cudaError_t kNotFound = cudaErrorSharedObjectInitFailed;  // there is no cuBLAS
constexpr size_t kWorkspace = 32 << 20;                             // what cuBLAS wants on Hopper, more than elsewhere
constexpr size_t kLeastWorkspace = 16 << 10;                        // with which all its functions run

// y = x W, or y + x W; rows of y, x and W are so many values apart.
struct Product {
    int64_t rows, inputs, outputs;
    const void* x;   // [rows, inputs] T
    int64_t x_row;
    const void* w;   // [inputs, outputs] T, or where `by_outputs` [outputs, inputs]
    bool by_outputs;
    void* y;         // [rows, outputs] T, or float where `wide`; dense
    bool wide, add;
    int64_t parts = 1;  // of as many inputs: y is [parts, rows, outputs], a sum of each
};

// The functions of a cuBLAS from 11.4 to 13.
struct Library {
    using Handle = struct cublasContext*;
    int (*create)(Handle*) = nullptr;
    int (*set_stream)(Handle, cudaStream_t) = nullptr;
    int (*set_workspace)(Handle, void*, size_t) = nullptr;
    int (*set_math)(Handle, int) = nullptr;
    int (*gemm)(Handle, int, int, int, int, int, const void*, const void*, cudaDataType, int, long long, const void*,
                cudaDataType, int, long long, const void*, void*, cudaDataType, int, long long, int, int, int) = nullptr;
    bool found = false;
    std::mutex mutex;                           // of the handles, and of work with one
    std::map<unsigned long long, Handle> handles;  // by CUDA context; they live as long as the process

    // One that is in the process already before any other: PyTorch's, or what Python found in a wheel.
    Library() {
        for (const int mode : {RTLD_NOLOAD | RTLD_NOW, RTLD_NOW}) {
            for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"}) {
                void* const file = dlopen(name, mode);
                if (file == nullptr) continue;
                const auto get = [&](auto& function, const char* symbol) {
                    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, symbol));
                    return function != nullptr;
                };
                found = get(create, "cublasCreate_v2") && get(set_stream, "cublasSetStream_v2") &&
                        get(set_workspace, "cublasSetWorkspace_v2") && get(set_math, "cublasSetMathMode") &&
                        get(gemm, "cublasGemmStridedBatchedEx");
                if (found) return;
            }
        }
    }
    static Library& get() {
        static Library* const library = new Library;  // never destroyed: CUDA may be gone before
        return *library;
    }
};

// The number of the current context, which no other has or will have. From the driver, which any process with one has open.
inline unsigned long long current_context() {
    void* const driver = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW);
    if (driver == nullptr) return 0;
    void* context = nullptr;
    unsigned long long id = 0;
    const auto current = reinterpret_cast<int (*)(void**)>(dlsym(driver, "cuCtxGetCurrent"));
    const auto number = reinterpret_cast<int (*)(void*, unsigned long long*)>(dlsym(driver, "cuCtxGetId"));
    if (current == nullptr || current(&context) != 0) context = nullptr;
    if (number == nullptr || number(context, &id) != 0) id = reinterpret_cast<uintptr_t>(context);  // before CUDA 12
    dlclose(driver);
    return id;
}

inline cudaError_t as_cuda(int status) {
    switch (status) {
        case 0: return cudaSuccess;
        case 3: return cudaErrorMemoryAllocation;
        case 7: return cudaErrorInvalidValue;
        case 8: case 15: return cudaErrorNotSupported;
        default: return cudaErrorUnknown;
    }
}

// Products on a stream, of activations T; one at a time in a process. Meanwhile this thread may allocate, which cuBLAS does
// when it is first used on a GPU, though another call is being captured in a graph.
class Products {
  public:
    Products(int32_t dtype, void* workspace, size_t bytes, cudaStream_t stream)
        : library_(Library::get()), lock_(library_.mutex) {
        type_ = dtype == MAMBA_FLOAT32 ? CUDA_R_32F : dtype == MAMBA_FLOAT16 ? CUDA_R_16F : CUDA_R_16BF;
        cudaThreadExchangeStreamCaptureMode(&mode_);
        error_ = library_.found ? open(workspace, bytes, stream) : kNotFound;
    }
    ~Products() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    Products(const Products&) = delete;

    cudaError_t error() const { return error_; }

    cudaError_t run(const Product& p) const {
        constexpr int kComputeFloat32 = 68, kDefault = -1;
        const float one = 1.0f, zero = 0.0f;
        const auto size = [](int64_t n) { return static_cast<int>(n); };
        const int64_t inputs = p.inputs / p.parts;
        // As cuBLAS sees it, columns first, y^T = W^T x^T.
        return as_cuda(library_.gemm(handle_, p.by_outputs, 0, size(p.outputs), size(p.rows), size(inputs), &one, p.w,
                                     type_, size(p.by_outputs ? p.inputs : p.outputs),
                                     p.by_outputs ? inputs : inputs * p.outputs, p.x, type_, size(p.x_row), inputs,
                                     p.add ? &one : &zero, p.y, p.wide ? CUDA_R_32F : type_, size(p.outputs),
                                     p.rows * p.outputs, size(p.parts), kComputeFloat32, kDefault));
    }

  private:
    cudaError_t open(void* workspace, size_t bytes, cudaStream_t stream) {
        constexpr int kFullSums = 16;  // CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, and no TF32
        Library::Handle& handle = library_.handles[current_context()];
        int status = 0;
        if (handle == nullptr) status = library_.create(&handle);
        if (status == 0) status = library_.set_math(handle, kFullSums);
        if (status == 0) status = library_.set_stream(handle, stream);  // which forgets the workspace
        if (status == 0) status = library_.set_workspace(handle, workspace, bytes);
        handle_ = handle;
        return as_cuda(status);
    }

    Library& library_;
    std::lock_guard<std::mutex> lock_;
    Library::Handle handle_ = nullptr;
    cudaDataType type_;
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
    cudaError_t error_;
};

}  // namespace blas
}  // namespace mamba
