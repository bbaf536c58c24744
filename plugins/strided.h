// The operators of a prompt on columns of wider rows: from one token to the next so many values, in place of as many as the
// tensor is wide. Where they are, vectors are loaded at the multiples of 16 bytes that they are checked for as ever.
#pragma once

#include "mamba_kernels.h"

#ifndef MAMBA_KERNELS_ONLY
#include <cuda_runtime_api.h>
#endif

namespace mamba {
namespace scan {

struct Rows {
    int32_t group, z;  // of B and C; of z, counted in rows of x, which is dense, as dt is
};

}  // namespace scan
namespace ssd {

struct Rows {
    int32_t x, group, dt;  // group: of B and C
};

}  // namespace ssd

#ifndef MAMBA_KERNELS_ONLY

namespace conv {

// Of a single token rows of y are as far apart, and y may be x. `early`: of a prompt, whether it is started, to have read its
// weights, before the kernel ahead has ended; that has to let it.
cudaError_t run(const MambaCausalConv1d& call, int32_t x_row, bool early, cudaStream_t stream);

}  // namespace conv
namespace scan {

// B and C that are not dense: N is a multiple of 8.
cudaError_t run(const MambaSelectiveScan& call, const Rows& rows, void* workspace, cudaStream_t stream);

}  // namespace scan
namespace ssd {

// x, B or C that are not dense: P and N are multiples of 8.
cudaError_t run(const MambaSsdScan& call, const Rows& rows, void* workspace, cudaStream_t stream);

}  // namespace ssd

#endif

}  // namespace mamba
