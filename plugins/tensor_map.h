// Tensor maps of weights, by which bulk copies find boxes of them. Host code alone; CUDA 12.1 and newer.
#pragma once

#include <cuda.h>

#include "bulk_copy.cuh"

namespace mamba {

static_assert(sizeof(CUtensorMap) == sizeof(TensorMap), "TensorMap is CUtensorMap");

// cuTensorMapEncodeTiled; null where the driver is too old for it, or for arguments of a table's size.
using Encode = decltype(&cuTensorMapEncodeTiled);

inline Encode find_encode() {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess || version < 12010) return nullptr;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

inline Encode encode_of_driver() {
    static const Encode found = find_encode();
    return found;
}

// Whether kernels with such copies run: the code was made for compute capability 9.0, which PTX of it is too, but a device
// may be newer, and have less shared memory.
inline bool has_bulk_copies(const Device& device) {
    return device.major == 9 && device.shared_bytes >= kHopperShared && encode_of_driver() != nullptr;
}

// Of 16-bit values [rows, columns] in boxes; rows of a box of 64, 32 or 16 columns
// are swizzled. What is past the last row or column is copied as zeros.
inline bool make_map(Encode encode, TensorMap& to, const void* values, int32_t dtype, int rows, int columns, int box_rows,
                     int box_columns) {
    const auto type = dtype == MAMBA_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t row_bytes[] = {2 * sizes[0]};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
    const auto swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                         : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                         : box_columns == 16 ? CU_TENSOR_MAP_SWIZZLE_32B
                                             : CU_TENSOR_MAP_SWIZZLE_NONE;
    return encode(reinterpret_cast<CUtensorMap*>(&to), type, 2, const_cast<void*>(values), sizes, row_bytes, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace mamba
