// What the blocks of token_kernel exchange, through the L2 cache: words of a value and, in the lowest 8 bits, a number that
// tells when it is there. Who needs a word reads it until it has the number.
#pragma once

#include "token_common.cuh"

namespace mamba {
namespace token {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

// A word is either a float, whose number is that of its layer, from 1 on, or a sum, to which blocks add their shares, and
// whose number is how many have. Sums of integers have no order; their unit is so small that its roundings are those of
// float32 for values of 1. A share of 2^40 units or more, or that is no number, adds so much that the sum, whatever else is
// added, is out of the range of others: then it is no number.
constexpr float kUnit = 0x1p-24f, kMostShare = 0x1p40f, kTooMuch = 0x1p48f, kMostSum = kMostShare * kMostBlocks;

struct TwoWords {
    uint64_t first = 0, second = 0;

    __device__ __forceinline__ void read(const uint64_t* at) {
        asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(at) : "memory");
    }
    __device__ __forceinline__ bool have(uint32_t number) const {
        return (first & 255) == number && (second & 255) == number;
    }
    __device__ __forceinline__ float2 floats() const {
        const auto value = [](uint64_t word) { return __uint_as_float(static_cast<uint32_t>(word >> 32)); };
        return make_float2(value(first), value(second));
    }
    __device__ __forceinline__ float2 sums(float unit) const {
        const auto value = [&](uint64_t word) {
            const float units = __ll2float_rn(static_cast<int64_t>(word) >> 8);
            return fabsf(units) < kMostSum ? units * unit : __int_as_float(0x7fffffff);
        };
        return make_float2(value(first), value(second));
    }
};

__device__ __forceinline__ void put_float(uint64_t* at, float value, uint32_t layer) {
    const uint64_t word = static_cast<uint64_t>(__float_as_uint(value)) << 32 | layer;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(at), "l"(word) : "memory");
}

__device__ __forceinline__ void add_share(uint64_t* sum, float units) {
    units = fabsf(units) < kMostShare ? units : kTooMuch;
    const uint64_t more = (static_cast<uint64_t>(__float2ll_rn(units)) << 8) + 1;
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" : : "l"(sum), "l"(more) : "memory");
}

// COUNT pairs of words, the i-th at at(i), where exists(i); waits until all have the number.
template <int COUNT, typename At, typename Exists>
__device__ __forceinline__ void gather(TwoWords (&to)[COUNT], uint32_t number, At&& at, Exists&& exists) {
    bool again = true;
#pragma unroll 1
    while (again) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (exists(i) && !to[i].have(number)) to[i].read(at(i));
        }
        again = false;
#pragma unroll
        for (int i = 0; i < COUNT; i++) again = again || (exists(i) && !to[i].have(number));
    }
}

// Waits for the pair of the warp's first lane. Where every block asks for all words until they are there, those who write them
// wait: so a warp asks for one pair before it asks for its others.
__device__ __forceinline__ void wait_for(const uint64_t* at, uint32_t number) {
    at = reinterpret_cast<const uint64_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(at), 0));
    TwoWords words;
    do words.read(at); while (!words.have(number));
}

#endif

}  // namespace token
}  // namespace mamba
