/* update.cu: what a micro-batch does to a layer before attention: seal pages, then unseal pages and write new rows.
 *
 * A slot that a seal frees may be written at once.  Many tokens: two launches.  A few, as in decoding: one, whose
 * blocks take all slabs of one side of one KV head and of every gridDim.y-th stream, and share nothing.
 */
#include "fit.cuh"
#include "launch.h"

namespace xq {

namespace {

/* One slab of a page: rows i0 .. i0 + 31 of the code matrix, by one warp. */
__device__ void seal_slab(const xq_cuda_layer &l, const int32_t *op, bool is_k, int head, int i0, float *shared,
                          unsigned long long *n_nonfinite) {
    const int lane = threadIdx.x % slab;
    const column x = {shared, lane};
    const side_view v = view_of(l, is_k, op[0], head);
    const matrix m = matrix_of(v, is_k);
    if (i0 >= m.n_i) {
        return;
    }
    const bool active = i0 + lane < m.n_i;
    const __half *rows = v.window + (int64_t)op[2] * XQ_PAGE * v.width;
    uint8_t *codes = v.codes + op[1] * v.codes_stride, *param = v.param + op[1] * v.param_stride;
    int bad = 0;
    if (is_k) {
        for (int t = 0; t < XQ_PAGE; ++t) {
            x[t] = active ? finite(__half2float(rows[source_of(op + 3, t) * v.width + i0 + lane]), bad) : 0.0f;
        }
    } else {
        for (int t = 0; t < slab; ++t) {
            const __half *row = rows + source_of(op + 3, i0 + t) * v.width;
            for (int j = lane; j < m.n_j; j += slab) {
                shared[j * slab + (t ^ (j & 31))] = finite(__half2float(row[j]), bad);
            }
        }
    }
    if (bad > 0) {
        atomicAdd(n_nonfinite, (unsigned long long)bad);
    }
    __syncwarp();
    if (active) {
        if (m.side.rotate) {
            transform(x, m.n_j);
        }
        if (!is_k && l.mapped) {
            add_predicted(l, op[0], head, op[1], i0 + lane, x, {shared + m.n_j * slab, lane}, -1.0f);
        }
        seal_lane(m, x, i0 + lane, v.own ? nullptr : codes, param);
    }
    __syncwarp();
    if (v.own) {
        pack_codes(m, shared, i0, codes);
    }
    __syncwarp();
}

/* Row t of the micro-batch, elements first .. end - 1 of one side of one KV head, to the window: a warp. */
__device__ void store_row(const xq_cuda_layer &l, const xq_cuda_update_args &a, bool is_k, int head, int t, int row,
                          int first, int end) {
    const int rows_a_stream = l.n_slots * XQ_PAGE, lane = threadIdx.x % slab;
    const side_view v = view_of(l, is_k, row / rows_a_stream, head);
    const char *cur = (const char *)(is_k ? a.k_cur : a.v_cur);
    const float *src = (const float *)(cur + t * (is_k ? a.k_token_stride : a.v_token_stride) +
                                       head * (is_k ? a.k_head_stride : a.v_head_stride));
    __half *dst = v.window + (int64_t)(row % rows_a_stream) * v.width;
    int bad = 0; // a masked infinity would spoil the sums of the tensor cores: 0 * inf
    for (int j = first + lane; j < end; j += slab) {
        dst[j] = __float2half_rn(finite(src[j], bad));
    }
    if (bad > 0) {
        atomicAdd(a.n_nonfinite, (unsigned long long)bad);
    }
}

/* grid (slab, 2 * KV head + side, operation), one warp each */
__global__ void __launch_bounds__(slab) seal_kernel(const xq_cuda_layer l, const xq_cuda_update_args a) {
    extern __shared__ float shared[];
    for (int number = blockIdx.z; number < *a.n_seal; number += gridDim.z) {
        seal_slab(l, a.seals + 7 * number, blockIdx.y % 2 == 0, blockIdx.y / 2, blockIdx.x * slab, shared,
                  a.n_nonfinite);
    }
}

constexpr int store_warps = 4;

/* Unseals, then writes the new rows that fall into this slab.  grid (slab, 2 * KV head + side, share of the rows):
 * where a page is unsealed, the first block writes all rows, for they may go into it. */
__global__ void __launch_bounds__(store_warps * 32) store_kernel(const xq_cuda_layer l, const xq_cuda_update_args a) {
    extern __shared__ float shared[];
    const bool is_k = blockIdx.y % 2 == 0;
    const int i0 = blockIdx.x * slab, head = blockIdx.y / 2, warp = threadIdx.x / slab;
    const bool alone = *a.n_unseal > 0;
    if (i0 >= (is_k ? l.d : XQ_PAGE) || (alone && blockIdx.z > 0)) {
        return;
    }
    for (int number = 0; number < *a.n_unseal; ++number) {
        const int32_t *op = a.unseals + 3 * number;
        if (warp == 0) {
            const side_view v = view_of(l, is_k, op[0], head);
            unseal_slab(l, is_k, op[0], head, i0, op[1], v.window + (int64_t)op[2] * XQ_PAGE * v.width, v.width,
                        shared);
        }
        __syncthreads();
    }
    for (int t = blockIdx.z * store_warps + warp; t < a.n_tokens; t += alone ? store_warps : gridDim.z * store_warps) {
        const int row = a.rows[t];
        if (is_k) {
            store_row(l, a, true, head, t, row, i0, min(i0 + slab, l.d));
        } else if (row % XQ_PAGE / slab == blockIdx.x) {
            store_row(l, a, false, head, t, row, 0, l.e);
        }
    }
}

constexpr int max_streams = 8; /* that blocks share */

/* All of it.  grid (2 * KV head + side, streams), a warp each slab */
__global__ void few_tokens_kernel(const xq_cuda_layer l, const xq_cuda_update_args a, int shared_of_slab /* floats */) {
    extern __shared__ float shared[];
    const bool is_k = blockIdx.x % 2 == 0;
    const int head = blockIdx.x / 2, warp = threadIdx.x / slab, i0 = warp * slab;
    float *mine = shared + warp * shared_of_slab;
    wait_for_previous();
    launch_next();
    const auto is_mine = [](int stream) { return gridDim.y == 1 || stream % gridDim.y == blockIdx.y; };
    const int n_seal = *a.n_seal, n_unseal = *a.n_unseal;
    const int first_row = a.n_tokens > 0 ? a.rows[0] : 0; // read together with the counts
    for (int number = 0; number < n_seal; ++number) {
        if (is_mine(a.seals[7 * number])) {
            seal_slab(l, a.seals + 7 * number, is_k, head, i0, mine, a.n_nonfinite);
        }
    }
    if (n_seal > 0) {
        __syncthreads();
    }
    for (int number = 0; number < n_unseal; ++number) {
        const int32_t *op = a.unseals + 3 * number;
        if (is_mine(op[0]) && i0 < (is_k ? l.d : XQ_PAGE)) {
            const side_view v = view_of(l, is_k, op[0], head);
            unseal_slab(l, is_k, op[0], head, i0, op[1], v.window + (int64_t)op[2] * XQ_PAGE * v.width, v.width, mine);
        }
    }
    if (n_unseal > 0) {
        __syncthreads();
    }
    const int width = is_k ? l.d : l.e;
#pragma unroll 4
    for (int t = 0; t < a.n_tokens; ++t) {
        const int row = t == 0 ? first_row : a.rows[t];
        for (int j = i0; j < width && is_mine(row / (l.n_slots * XQ_PAGE)); j += blockDim.x) {
            store_row(l, a, is_k, head, t, row, j, min(j + slab, width));
        }
    }
}

} // namespace

int launch_update(const xq_cuda_layer &l, const xq_cuda_update_args &a, cudaStream_t stream) {
    const size_t shared = slab_bytes(l);
    const unsigned n_slabs = slabs_of(l), n_sides = 2 * (unsigned)l.n_head_kv;
    if (a.n_tokens < XQ_PAGE && n_slabs * slab <= 1024 && (int)(n_slabs * shared) <= shared_limit()) {
        if (allow_shared(few_tokens_kernel, n_slabs * shared)) {
            const unsigned n_streams = a.n_tokens < 1 ? 1 : a.n_tokens < max_streams ? a.n_tokens : max_streams;
            launch_early(few_tokens_kernel, dim3(n_sides, n_streams), n_slabs * slab, n_slabs * shared, stream, l, a,
                         (int)(shared / sizeof(float)));
        }
        return launched("update");
    }
    if (allow_shared(seal_kernel, shared) && allow_shared(store_kernel, shared)) {
        // a page leaves the window about every XQ_PAGE tokens
        const unsigned n_operations = 1 + (unsigned)a.n_tokens / XQ_PAGE;
        seal_kernel<<<dim3(n_slabs, n_sides, n_operations), slab, shared, stream>>>(l, a);
        const unsigned n_shares = 1 + (unsigned)a.n_tokens / 64;
        store_kernel<<<dim3(n_slabs, n_sides, n_shares), store_warps * 32, shared, stream>>>(l, a);
    }
    return launched("update");
}

} // namespace xq
