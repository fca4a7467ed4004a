/* update.cu: what a micro-batch does to a layer before attention: seal pages, then unseal pages and write new rows.
 *
 * Two launches: a slot that a seal frees may be written at once.  Within a launch slabs share nothing, but for what a
 * seal reads of a page's first valid token.
 */
#include "fit.cuh"
#include "launch.h"

namespace xq {

namespace {

/* grid (slab, 2 * KV head + side, operation), one warp each */
__global__ void __launch_bounds__(slab) seal_kernel(const xq_cuda_layer l, const xq_cuda_update_args a) {
    extern __shared__ float shared[];
    const bool is_k = blockIdx.y % 2 == 0;
    const int lane = threadIdx.x, i0 = blockIdx.x * slab, head = blockIdx.y / 2;
    const column x = {shared, lane};
    for (int number = blockIdx.z; number < *a.n_seal; number += gridDim.z) {
        const int32_t *op = a.seals + 7 * number;
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
            atomicAdd(a.n_nonfinite, (unsigned long long)bad);
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
}

constexpr int store_warps = 4;

/* Unseals, then writes the new rows that fall into this slab.  grid (slab, 2 * KV head + side, share of the rows):
 * where a page is unsealed, the first block writes all rows, for they may go into it. */
__global__ void __launch_bounds__(store_warps * 32) store_kernel(const xq_cuda_layer l, const xq_cuda_update_args a) {
    extern __shared__ float shared[];
    const bool is_k = blockIdx.y % 2 == 0;
    const int i0 = blockIdx.x * slab, head = blockIdx.y / 2, lane = threadIdx.x % slab, warp = threadIdx.x / slab;
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
    const int rows_a_stream = l.n_slots * XQ_PAGE;
    for (int t = blockIdx.z * store_warps + warp; t < a.n_tokens; t += alone ? store_warps : gridDim.z * store_warps) {
        const int row = a.rows[t];
        if (!is_k && row % XQ_PAGE / slab != blockIdx.x) {
            continue;
        }
        const side_view v = view_of(l, is_k, row / rows_a_stream, head);
        const char *cur = (const char *)(is_k ? a.k_cur : a.v_cur);
        const float *src = (const float *)(cur + t * (is_k ? a.k_token_stride : a.v_token_stride) +
                                           head * (is_k ? a.k_head_stride : a.v_head_stride));
        __half *dst = v.window + (int64_t)(row % rows_a_stream) * v.width;
        int bad = 0; // a masked infinity would spoil the sums of the tensor cores: 0 * inf
        const int first = is_k ? i0 : 0, end = is_k ? min(i0 + slab, v.width) : v.width;
        for (int j = first + lane; j < end; j += slab) {
            dst[j] = __float2half_rn(finite(src[j], bad));
        }
        if (bad > 0) {
            atomicAdd(a.n_nonfinite, (unsigned long long)bad);
        }
    }
}

} // namespace

int launch_update(const xq_cuda_layer &l, const xq_cuda_update_args &a, cudaStream_t stream) {
    const size_t shared = slab_bytes(l);
    if (shared > 48 * 1024) {
        for (const auto kernel : {seal_kernel, store_kernel}) {
            if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared) != cudaSuccess) {
                return launched("update");
            }
        }
    }
    // a page leaves the window about every XQ_PAGE tokens
    const unsigned n_operations = 1 + (unsigned)a.n_tokens / XQ_PAGE;
    seal_kernel<<<dim3(slabs_of(l), 2 * l.n_head_kv, n_operations), slab, shared, stream>>>(l, a);
    const unsigned n_shares = 1 + (unsigned)a.n_tokens / 64;
    store_kernel<<<dim3(slabs_of(l), 2 * l.n_head_kv, n_shares), store_warps * 32, shared, stream>>>(l, a);
    return launched("update");
}

} // namespace xq
