// For prompts whose P or N is no multiple of 8: copies of a width that the fast kernels take, with zeros where they are
// wider, and what comes out cut again. A copy, so dtypes do not matter, only bytes.
#pragma once

#include "common.cuh"

#ifndef MAMBA_KERNELS_ONLY
#include <algorithm>
#include <climits>
#endif

namespace mamba {
namespace pad {

constexpr int kPadThreads = 256;
constexpr int kPadWords = 1024;  // of a block, or one row

// Matrices of another height and width, one after the other; both are counted in the same words.
struct Resize {
    const void* from;  // [any, from_rows, from_cols]
    void* to;          // [rows / to_rows, to_rows, to_cols]
    int64_t rows;      // of all matrices of `to`
    int32_t from_rows, from_cols, to_rows, to_cols;
};

// Rows a block writes at once.
__host__ __device__ constexpr int rows_of_pad(int cols) { return cols < kPadWords ? kPadWords / cols : 1; }

template <typename Word>
__global__ void __launch_bounds__(kPadThreads) pad_kernel(const Resize r) {
    const Word* const from = static_cast<const Word*>(r.from);
    Word* const to = static_cast<Word*>(r.to);
    const uint32_t from_rows = r.from_rows, from_cols = r.from_cols, to_rows = r.to_rows, to_cols = r.to_cols;
    const int64_t at_once = rows_of_pad(r.to_cols);
    for (int64_t row0 = blockIdx.x * at_once; row0 < r.rows; row0 += gridDim.x * at_once) {
        const int64_t matrix0 = row0 / to_rows, rows = r.rows - row0 < at_once ? r.rows - row0 : at_once;
        const uint32_t first = static_cast<uint32_t>(row0 - matrix0 * to_rows);  // row of its matrix
        const uint32_t words = static_cast<uint32_t>(rows) * to_cols;
#pragma unroll 4
        for (uint32_t i = threadIdx.x; i < words; i += kPadThreads) {
            const uint32_t down = first + i / to_cols, row = down % to_rows, col = i % to_cols;
            const int64_t matrix = matrix0 + down / to_rows;
            Word word{};
            if (row < from_rows && col < from_cols) word = from[(matrix * from_rows + row) * from_cols + col];
            to[row0 * to_cols + i] = word;
        }
    }
}

#ifndef MAMBA_KERNELS_ONLY

constexpr int kPadTokens = 128;  // from here on padding costs less than it gains

inline int32_t padded(int32_t size) { return static_cast<int32_t>(ceil_div(size, 8) * 8); }

// To [count, to_rows, to_cols] from [count, from_rows, from_cols] of elements of so many bytes.
struct Copy {
    const void* from;
    void* to;
    int64_t count;
    int32_t from_rows, from_cols, to_rows, to_cols, bytes;
};

template <typename Word>
cudaError_t copy(const Copy& c, cudaStream_t stream) {
    const int32_t words = static_cast<int32_t>(sizeof(Word)) / c.bytes;  // elements of one
    const Resize resize = {
        c.from, c.to, c.count * c.to_rows, c.from_rows, c.from_cols / words, c.to_rows, c.to_cols / words};
    const int64_t blocks = std::min<int64_t>(ceil_div(resize.rows, rows_of_pad(resize.to_cols)), INT_MAX);
    pad_kernel<Word><<<static_cast<unsigned>(blocks), kPadThreads, 0, stream>>>(resize);
    return cudaGetLastError();
}

// In the widest words that rows on both sides are made of.
inline cudaError_t copy(const Copy& c, cudaStream_t stream) {
    const auto fits = [&](int32_t word) {
        return int64_t{c.from_cols} * c.bytes % word == 0 && int64_t{c.to_cols} * c.bytes % word == 0 &&
               mamba::is_aligned(c.from, word) && mamba::is_aligned(c.to, word);
    };
    if (fits(16)) return copy<uint4>(c, stream);
    if (fits(8)) return copy<uint2>(c, stream);
    return c.bytes == 4 || fits(4) ? copy<uint32_t>(c, stream) : copy<uint16_t>(c, stream);
}

inline cudaError_t copy(const Copy* copies, int count, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < count && error == cudaSuccess; i++) error = copy(copies[i], stream);
    return error;
}

#endif

}  // namespace pad
}  // namespace mamba
