// Bulk copies of compute capability 9.0, from global to shared memory, and the barriers there that count their bytes.
#pragma once

#include "tensor_core.cuh"

namespace mamba {

constexpr int kHopperShared = 227 << 10;  // that a block may have where there are such copies

// cuda.h's CUtensorMap, which NVRTC does not know.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void bar_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(bar), "r"(count) : "memory");
}
// To be seen by copies too; a barrier of the block must follow.
__device__ __forceinline__ void bars_are_there() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }
__device__ __forceinline__ void bar_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n .reg .pred p;\n again:\n mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n @!p bra again;\n}\n"
        : : "r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ bool bar_is_over(uint32_t bar, uint32_t parity) {
    uint32_t over;
    asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(over) : "r"(bar), "r"(parity) : "memory");
    return over != 0;
}
__device__ __forceinline__ void bar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" : : "r"(bar) : "memory");
}
// The one arrival, and so many bytes to come.
__device__ __forceinline__ void bar_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" : : "r"(bar), "r"(bytes) : "memory");
}

// By which what is copied leaves the L2 cache first.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Neighbouring bytes, a multiple of 16.
__device__ __forceinline__ void copy_line(uint32_t to, const void* from, int bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 : : "r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_line(uint32_t to, const void* from, int bytes, uint32_t bar, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 : : "r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        : : "r"(to), "l"(&map), "r"(column), "r"(row), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t bar, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
        "[%4], %5;"
        : : "r"(to), "l"(&map), "r"(column), "r"(row), "r"(bar), "l"(policy) : "memory");
}
// To the L2 cache alone.
__device__ __forceinline__ void ask_for_line(const void* from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes) : "memory");
}

// --- between the blocks of a cluster

// __syncthreads() for all of them.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
}
// To the place of `to` in another block's shared memory, and its bytes to the count of the barrier that is there at `bar`.
__device__ __forceinline__ void send(uint32_t to, uint32_t bar, int block, float value) {
    asm volatile(
        "{\n .reg .b32 there, count;\n mapa.shared::cluster.u32 there, %0, %2;\n mapa.shared::cluster.u32 count, %1, %2;\n"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [count];\n}\n"
        : : "r"(to), "r"(bar), "r"(block), "f"(value) : "memory");
}
// The same of many values: where another block has what is at an address here; and a pair to such an address.
__device__ __forceinline__ uint32_t address_in(int block, uint32_t address) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}
template <typename V>
__device__ __forceinline__ V* address_in(int block, V* own) {
    V* there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(block));
    return there;
}
__device__ __forceinline__ void send_pair(uint32_t there, uint32_t bar_there, float first, float second) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];"
                 : : "r"(there), "r"(bar_there), "f"(first), "f"(second) : "memory");
}
__device__ __forceinline__ void send_four(uint32_t there, uint32_t bar_there, const float (&v)[4]) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
                 : : "r"(there), "r"(bar_there), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
// As bar_wait(), for what other blocks send.
__device__ __forceinline__ void bar_wait_of_cluster(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n .reg .pred p;\n again:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
        " @!p bra again;\n}\n"
        : : "r"(bar), "r"(parity) : "memory");
}

#endif

}  // namespace mamba
