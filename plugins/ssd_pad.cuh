// MambaSsdScan for prompts whose P or N is no multiple of 8: copies that the tensor cores take, with zeros where they are
// wider, and what comes out cut again. A copy, so dtypes do not matter, only bytes.
#pragma once

#include "ssd_common.cuh"

namespace mamba {
namespace ssd {

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

}  // namespace ssd
}  // namespace mamba
