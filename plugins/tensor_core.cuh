// Warp-level matrix instructions and asynchronous copies of sm_80 and newer, one function an instruction.
//
// Fragments are those of mma.m16n8k16: A [16, 16] in four registers, B [16, 8] in two, C and D [16, 8] in four floats.
// With r = lane / 4 and c = lane % 4 * 2, C and D hold (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1).
#pragma once

#include "common.cuh"

namespace mamba {

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 by 8 matrices of 16-bit values; lane 8 i + j gives the shared address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of m16n8k8: half of A, in two registers, and of B, in one.
template <typename T>
__device__ __forceinline__ void multiply_add_8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b);
template <>
__device__ __forceinline__ void multiply_add_8<__half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
}
template <>
__device__ __forceinline__ void multiply_add_8<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// 16 bytes from global memory to a shared address; the first `bytes` are read, the others become zero.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
}

// 4, 8 or 16 bytes.
template <int BYTES>
__device__ __forceinline__ void copy_async_whole(uint32_t to, const void* from) {
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" : : "r"(to), "l"(from), "n"(BYTES) : "memory");
    }
}

// 8 or 16 bytes, if `wanted`, without a branch: a compiler puts three instructions before the first copy after each.
template <int BYTES>
__device__ __forceinline__ void copy_async_if(bool wanted, uint32_t to, const void* from) {
    if constexpr (BYTES == 16) {
        asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}"
                     : : "r"(to), "l"(from), "r"(uint32_t{wanted}) : "memory");
    } else {
        asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], %3;}"
                     : : "r"(to), "l"(from), "r"(uint32_t{wanted}), "n"(BYTES) : "memory");
    }
}

// This thread's copies since the last call become a group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until but kLeft groups of this thread are there; a barrier must follow for those of others.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory");
}

// __syncthreads() for some warps of a block; that itself has number 0.
__device__ __forceinline__ void barrier_wait(int number, int threads) {
    asm volatile("barrier.sync.aligned %0, %1;" : : "r"(number), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
// The halves of cluster_meet().
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory"); }
#endif

// Waits for all threads of a cluster of blocks, which below compute capability 9.0 is a block. What other blocks have written
// need not be seen then: to see to that would wait for all that these threads have on its way to memory.
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
}

// As unpack() has them.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
    const __half2 v = __floats2half2_rn(first, second);
    uint32_t pair;
    memcpy(&pair, &v, 4);
    return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(first, second);
    uint32_t pair;
    memcpy(&pair, &v, 4);
    return pair;
}

#endif

}  // namespace mamba
