// What the kernels of a decode step share: each starts while the one before it still runs, and reads its weights ahead.
//
// Programmatic dependent launch (CUDA 11.8, compute capability 9.0): let_next_start() lets the blocks of the next kernel
// take what room there is, wait_for_previous() waits until all before are through. What a kernel before may write is
// read, and anything is written, only after that.
#pragma once

#include "common.cuh"

namespace mamba {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Brings a line to the L2 cache, whoever writes it meanwhile.
__device__ __forceinline__ void prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];" : : "l"(line)); }

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}

#ifndef MAMBA_KERNELS_ONLY

#if CUDART_VERSION >= 11080
template <typename... Parameters>
cudaError_t launch_with(cudaLaunchAttribute* attributes, unsigned count, void (*kernel)(Parameters...), dim3 grid,
                        dim3 threads, size_t shared, cudaStream_t stream, Parameters... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#endif

// A launch of clusters of `cluster` blocks along x; `early`, where compute capability is 9.0, lets the kernel start early.
template <typename... Parameters>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, int cluster, bool early,
                         cudaStream_t stream, Parameters... arguments) {
#if CUDART_VERSION >= 11080
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    return launch_with(
        attributes, !early ? 0 : cluster == 1 ? 1 : 2, kernel, grid, threads, shared, stream, arguments...);
#else
    kernel<<<grid, threads, shared, stream>>>(arguments...);
    return cudaGetLastError();
#endif
}

#endif

}  // namespace mamba
