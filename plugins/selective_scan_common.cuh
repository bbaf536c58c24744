// What the kernels of MambaSelectiveScan share: sizes of a row, and the state in its three dtypes.
#pragma once

#include "common.cuh"

namespace mamba {
namespace scan {

__device__ __forceinline__ int row_length(const MambaSelectiveScan& a, int64_t b) {
    return min(max(a.seq_lens[b], 0), a.length);
}

__device__ __forceinline__ float load_state(const void* states, int64_t i, int32_t dtype) {
    if (dtype == MAMBA_FLOAT32) return static_cast<const float*>(states)[i];
    if (dtype == MAMBA_FLOAT16) return to_float(static_cast<const __half*>(states)[i]);
    return to_float(static_cast<const __nv_bfloat16*>(states)[i]);
}

__device__ __forceinline__ void store_state(void* states, int64_t i, int32_t dtype, float v) {
    if (dtype == MAMBA_FLOAT32) {
        static_cast<float*>(states)[i] = v;
    } else if (dtype == MAMBA_FLOAT16) {
        static_cast<__half*>(states)[i] = from_float<__half>(v);
    } else {
        static_cast<__nv_bfloat16*>(states)[i] = from_float<__nv_bfloat16>(v);
    }
}

// One element as it is, for a row of length 0.
__device__ __forceinline__ void copy_state(const MambaSelectiveScan& a, int64_t i) {
    if (a.state_dtype == MAMBA_FLOAT32) {
        static_cast<uint32_t*>(a.ssm_state_out)[i] = static_cast<const uint32_t*>(a.ssm_state)[i];
    } else {
        static_cast<uint16_t*>(a.ssm_state_out)[i] = static_cast<const uint16_t*>(a.ssm_state)[i];
    }
}

}  // namespace scan
}  // namespace mamba
