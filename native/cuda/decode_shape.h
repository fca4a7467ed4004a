/* decode_shape.h: the blocks of the tensor-core attention for a layer on the device at hand. */
#pragma once

#include "launch.h"
#include "stage.cuh"

namespace xq {

/* Teams of warps of a block, buffers of sealed pages of each, warps that take open ones, where the buffers start, and
 * all of its dynamic shared memory. n_teams = 0: nothing fits. */
struct decode_shape {
    staged at;
    int n_teams, depth, n_open, buffers, shared;
};

/* What a launch's blocks need to know, worked out on the host: divisions are long code. */
struct decode_call {
    staged at;
    int n_teams, depth, n_open, buffers, n_rep, rows_of_head, n_tiles, n_pages; /* n_pages: of a part, rounded up */
    uint32_t inverse;                                                           /* 2^20 / n_rep, rounded up */

    /* Row r of a KV head, r below 2^12: its token and which of the heads. */
    __host__ __device__ int token_of(int r) const { return (int)(r * inverse >> 20); }
    __host__ __device__ int rest_of(int r) const { return r - token_of(r) * n_rep; }
};
decode_shape decode_shape_of(const xq_cuda_layer &l);

} // namespace xq
