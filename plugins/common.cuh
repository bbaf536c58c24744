// Shared by the kernels: dtypes, conversions, and the arithmetic that must be the same everywhere. CUDA 11.4, C++17.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#include "mamba_kernels.h"

namespace mamba {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kOnHopper = false;
#else
constexpr bool kOnHopper = true;
#endif

// How many blocks of a kernel may share a multiprocessor, for the compiler to give registers out by: as measured on
// Hopper; `elsewhere` what compiles without spills.
constexpr int resident_blocks(int on_hopper, int elsewhere) { return kOnHopper ? on_hopper : elsewhere; }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// Two neighbours of a register; the first is in the low half.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
    __half2 v;
    memcpy(&v, &pair, 4);
    return __half22float2(v);
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// 2^v in one instruction, to 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float v) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

// v, but what is computed from it is computed here, not ahead of a loop: there it would take dozens of registers.
__device__ __forceinline__ int not_ahead(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

constexpr float kLog2E = 1.4426950408889634f;

// log(1 + e^v) to full relative precision, also where it is tiny: log1p(e) is e times a polynomial fitted on [0, 1]
// to 3e-8, which takes half the instructions of log1pf.
__device__ __forceinline__ float softplus(float v) {
    const float e = exp2_approx(-kLog2E * fabsf(v));
    float p = 5.2326927e-3f;
    p = fmaf(p, e, -2.95052323e-2f);
    p = fmaf(p, e, 7.82259405e-2f);
    p = fmaf(p, e, -1.36632442e-1f);
    p = fmaf(p, e, 1.91060066e-1f);
    p = fmaf(p, e, -2.48429820e-1f);
    p = fmaf(p, e, 3.33190978e-1f);
    p = fmaf(p, e, -4.99994934e-1f);
    p = fmaf(p, e, 9.99999940e-1f);
    return fmaf(p, e, fmaxf(v, 0.0f));
}

// 1 / v in one instruction, to 1 unit in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float reciprocal(float v) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

__device__ __forceinline__ float silu(float v) { return v * reciprocal(1.0f + exp2_approx(-kLog2E * v)); }

// kCount neighbouring values that move in one access; the address must be a multiple of their bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T v[kCount];
};

template <int kBytes> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

// Of memory that no kernel in flight writes.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_constant(const T* from) {
    using Bits = typename Word<sizeof(T) * kCount>::type;
    const Bits bits = __ldg(reinterpret_cast<const Bits*>(from));
    Pack<T, kCount> pack;
    memcpy(&pack, &bits, sizeof(bits));
    return pack;
}

__device__ __forceinline__ float load_constant(const float* from) { return __ldg(from); }
__device__ __forceinline__ __half load_constant(const __half* from) { return __ldg(from); }
__device__ __forceinline__ __nv_bfloat16 load_constant(const __nv_bfloat16* from) {
    return load_constant<__nv_bfloat16, 1>(from).v[0];  // CUDA 11 has __ldg of it from sm_80 on alone
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load(const T* from) {
    using Bits = typename Word<sizeof(T) * kCount>::type;
    const Bits bits = *reinterpret_cast<const Bits*>(from);
    Pack<T, kCount> pack;
    memcpy(&pack, &bits, sizeof(bits));
    return pack;
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* to, const Pack<T, kCount>& pack) {
    using Bits = typename Word<sizeof(T) * kCount>::type;
    Bits bits;
    memcpy(&bits, &pack, sizeof(bits));
    *reinterpret_cast<Bits*>(to) = bits;
}

// In one access: some compilers take a plain store behind a condition apart.
template <typename T, int kCount>
__device__ __forceinline__ void store_whole(T* to, const Pack<T, kCount>& pack) {
    typename Word<sizeof(T) * kCount>::type bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stwb(reinterpret_cast<decltype(bits)*>(to), bits);
}

// Of what is read and written once a step: so that it leaves the L2 cache before what kernels hand each other.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_streaming(const T* from) {
    const auto bits = __ldcs(reinterpret_cast<const typename Word<sizeof(T) * kCount>::type*>(from));
    Pack<T, kCount> pack;
    memcpy(&pack, &bits, sizeof(bits));
    return pack;
}
template <typename T, int kCount>
__device__ __forceinline__ void store_streaming(T* to, const Pack<T, kCount>& pack) {
    typename Word<sizeof(T) * kCount>::type bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stcs(reinterpret_cast<decltype(bits)*>(to), bits);
}

// COUNT neighbouring values in loads of at most 16 bytes; p is aligned to them.
template <typename T, int COUNT>
struct Neighbours {
    static constexpr int kWord = sizeof(T) * COUNT < 16 ? sizeof(T) * COUNT : 16;
    static constexpr int kWords = sizeof(T) * COUNT / kWord;
    typename Word<kWord>::type words[kWords];

    __device__ __forceinline__ void load(const T* p) {
#pragma unroll
        for (int i = 0; i < kWords; i++) words[i] = __ldg(reinterpret_cast<const typename Word<kWord>::type*>(p) + i);
    }
    // Of what a kernel ahead wrote, it may be after this one had started.
    __device__ __forceinline__ void load_written(const T* p) {
#pragma unroll
        for (int i = 0; i < kWords; i++) words[i] = reinterpret_cast<const typename Word<kWord>::type*>(p)[i];
    }
    // Read once, not again before it is written.
    __device__ __forceinline__ void load_streaming(const T* p) {
#pragma unroll
        for (int i = 0; i < kWords; i++) words[i] = __ldcs(reinterpret_cast<const typename Word<kWord>::type*>(p) + i);
    }
    __device__ __forceinline__ void store_streaming(T* p) const {
#pragma unroll
        for (int i = 0; i < kWords; i++) __stcs(reinterpret_cast<typename Word<kWord>::type*>(p) + i, words[i]);
    }
    __device__ __forceinline__ void get(float (&out)[COUNT]) const {
        T values[COUNT];
        memcpy(values, words, sizeof(values));
#pragma unroll
        for (int i = 0; i < COUNT; i++) out[i] = to_float(values[i]);
    }
    __device__ __forceinline__ void set(const float (&in)[COUNT]) {
        T values[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) values[i] = from_float<T>(in[i]);
        memcpy(words, values, sizeof(values));
    }
};

#ifndef MAMBA_KERNELS_ONLY

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int32_t item_bytes(int32_t dtype) { return dtype == MAMBA_FLOAT32 ? 4 : 2; }

inline size_t workspace_bytes(int64_t floats) { return static_cast<size_t>(ceil_div(4 * floats, 256) * 256); }

// What of the current device a launch depends on: the major compute capability that a kernel's code was made for, which is
// less than the device's own, where the library holds but PTX of an older architecture; a block's shared memory, at most.
struct Device {
    int index = 0, multiprocessors = 0, major = 0, own_major = 0, shared_bytes = 0;

    template <typename... Parameters>
    cudaError_t read(void (*kernel)(Parameters...)) {
        thread_local Device last;  // asking again costs as much as a launch
        cudaFuncAttributes attributes;
        cudaError_t error = cudaGetDevice(&index);
        if (error == cudaSuccess && last.major > 0 && last.index == index) {
            *this = last;
            return cudaSuccess;
        }
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
        if (error == cudaSuccess) {
            error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
        }
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&own_major, cudaDevAttrComputeCapabilityMajor, index);
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
        if (error != cudaSuccess) return error;
        major = attributes.ptxVersion / 10;
        last = *this;
        return cudaSuccess;
    }
};

// Without this a launch with more than 48 KiB of shared memory is refused, what a kernel has besides counted.
template <typename... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), size_t bytes) {
    if (bytes <= 40 << 10) return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
}

#endif

inline __host__ __device__ bool is_aligned(const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Calls run(T{}) with the C++ type of a dtype; false where there is none.
template <typename Run>
bool with_dtype(int32_t dtype, Run&& run) {
    switch (dtype) {
        case MAMBA_FLOAT32: run(float{}); return true;
        case MAMBA_FLOAT16: run(__half{}); return true;
        case MAMBA_BFLOAT16: run(__nv_bfloat16{}); return true;
        default: return false;
    }
}

}  // namespace mamba
