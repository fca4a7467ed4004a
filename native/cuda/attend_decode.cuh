/* attend_decode.cuh: attention of up to eight query rows per KV head over codes, on the tensor cores (codes_mma.cuh).
 *
 * A block is eight warps that share a part of the pages of one KV head.  A warp takes whole sealed pages, whose four
 * parts it copies to shared memory one page ahead, and quarters of open ones.
 *
 * Vectors are rounded to F16 (relative error 2^-11); sums are single precision.
 *
 * PLAIN: keys have one tile a page and F16 parameters, scores no cap and no slope; other cases are compiled apart, so
 * that the loop over pages stays small enough for the instruction cache.
 */
#pragma once

#include "attend.cuh"
#include "attend_page.cuh"
#include "launch.h"
#include "stage.cuh"

namespace xq {

namespace {

/* ---- a block ---- */

/* Joins the warps' states: sums [n_rows][E] weighted to the block's maximum, max and sum [n_rows]. */
template <int E> struct joined {
    float out[n_warps][n_rows][E], max[n_warps][n_rows], sum[n_warps][n_rows];
};

template <int E> __device__ void store(joined<E> &all, state<E> &st, float unit, int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        for (int step = 4; step < 32; step *= 2) {
            st.sum[r] += __shfl_xor_sync(~0u, st.sum[r], step);
            st.zero[r] += __shfl_xor_sync(~0u, st.zero[r], step);
        }
        all.max[warp][2 * t + r] = st.max[r];
        all.sum[warp][2 * t + r] = st.sum[r];
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            for (int w = 0; w < 4; ++w) {
                all.out[warp][2 * t + r][32 * c + 4 * g + w] = st.out[c][w / 2][w % 2 * 2 + r] * unit + st.zero[r];
            }
        }
    }
}

/* Whether any of these tokens sees a cell of the page.  One token alone: it is taken for granted, the mask of the
 * scores decides; with more, most pages may belong to other sequences. */
__device__ bool is_visible(const xq_cuda_attend_args &a, range tokens, int page, int nth_stream) {
    if (!a.mask || a.n_tokens == 1) {
        return true;
    }
    for (int token = tokens.begin; token < tokens.end; ++token) {
        const auto *at =
            (const uint4 *)((const char *)a.mask + token * a.mask_token_stride + nth_stream * a.mask_stream_stride) +
            page * (XQ_PAGE / 8);
        for (int k = 0; k < XQ_PAGE / 8; ++k) {
            const uint4 x = at[k];
            const uint32_t hidden = 0xfc00fc00u; // -inf twice
            if (x.x != hidden || x.y != hidden || x.z != hidden || x.w != hidden) {
                return true;
            }
        }
    }
    return false;
}

/* The pages of one kind that a block looks at, in order; the same on all lanes of a warp. */
struct page_walk {
    const xq_cuda_attend_args &a;
    const int32_t *table;
    range tokens;
    int nth_stream, end;
    bool open;
    int lane, base;
    uint32_t found = 0;
    int first = 0, nth = 0; /* first: page of bit 0 of found.  nth: pages so far */

    /* -1: there are no more. */
    __device__ int next() {
        while (found == 0) {
            if (base >= end) {
                return -1;
            }
            first = base;
            const int page = base + lane;
            const int state = page < end && is_visible(a, tokens, page, nth_stream) ? table[page] : page_free;
            found = __ballot_sync(~0u, open ? state >= 0 : state == page_sealed);
            base += 32;
        }
        const int page = first + __ffs(found) - 1;
        found &= found - 1;
        nth++;
        return page;
    }
    /* The next one that is this warp's. */
    __device__ int next_of(int warp) {
        int page = next();
        while (page >= 0 && (nth - 1) % n_warps != warp) {
            page = next();
        }
        return page;
    }
};

/* grid (part, KV head, tile of rows and stream).  Shared memory: p of the warps, then their stages; at last `joined`.
 */
template <int D, int E, int KB, int VB, bool PLAIN>
__global__ void __launch_bounds__(32 * n_warps, 1)
    decode_kernel(const xq_cuda_layer l, const xq_cuda_attend_args a, int n_stages) {
    extern __shared__ __align__(16) uint8_t shared[];
    auto &all = *(joined<E> *)shared;
    __half *p = (__half *)shared + threadIdx.x / 32 * n_rows * p_stride; // before all is written
    const staged at = staging(l);
    __shared__ __align__(8) uint64_t barriers[n_warps][2];
    __shared__ float top[2][n_rows];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n_rep = a.n_head / l.n_head_kv, rows_of_head = a.n_tokens * n_rep, n_tiles = (rows_of_head + 7) / 8;
    const int tile = blockIdx.z % n_tiles, nth_stream = blockIdx.z / n_tiles, stream = *a.first_stream + nth_stream;
    const side_view k = key_view(l, stream, blockIdx.y), v = value_view(l, stream, blockIdx.y);
    const int32_t *table = a.table + (int64_t)stream * l.n_pages;
    using wk = walk<KB, D>;

    rows q = {};
    q.softcap = a.softcap * log2e;
    for (int r = 0; r < 2; ++r) {
        const int row = tile * n_rows + 2 * t + r;
        const bool exists = row < rows_of_head;
        q.absent[r] = exists ? 0.0f : -INFINITY;
        q.slope[r] = slope_of(a.max_bias, blockIdx.y * n_rep + row % n_rep, a.n_head) * log2e;
        q.mask[r] = a.mask && exists ? (const __half *)((const char *)a.mask + row / n_rep * a.mask_token_stride +
                                                        nth_stream * a.mask_stream_stride)
                                     : nullptr;
    }
    uint32_t qb[wk::products][2];
    {
        const int row = min(tile * n_rows + g, rows_of_head - 1);
        const float *x = (const float *)((const char *)a.q + (blockIdx.y * n_rep + row % n_rep) * a.q_head_stride +
                                         (nth_stream * a.n_tokens + row / n_rep) * a.q_token_stride);
        float top = 0.0f;
#pragma unroll
        for (int i = t; i < D; i += 4) {
            top = fmaxf(top, fabsf(x[i]));
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const int exponent = min(max((int)(__float_as_uint(top) >> 23) - 126, -100), 100); // top < 2^exponent
        const float factor = power_of_two(-exponent);
#pragma unroll
        for (int n = 0; n < wk::products; ++n) {
            const float *at = x + (wk::has(n, t) ? wk::row(n, t) : 0);
            const float weight = wk::has(n, t) ? wk::weight(n) * factor : 0.0f;
            qb[n][0] = halves(at[0] * weight, at[2] * weight);
            qb[n][1] = halves(at[1] * weight, at[3] * weight);
        }
        for (int r = 0; r < 2; ++r) { // row 2 t + r lies with lane 4 (2 t + r)
            q.factor[r] = power_of_two(__shfl_sync(~0u, exponent, 4 * (2 * t + r))) * a.scale * log2e;
        }
    }

    const range q_tokens = {tile * n_rows / n_rep, (min((tile + 1) * n_rows, rows_of_head) + n_rep - 1) / n_rep};
    const range pages = pages_of_part(a, blockIdx.x);
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}; // of row threadIdx.x % 8: sealed, open
    float kept[2][E / 32] = {};                                   // outputs threadIdx.x + 256 n: sealed, open
    for (int open = 0; open < 2; ++open) {
        state<E> st;
        st.clear();
        bool found = false;
        page_walk walk_pages = {a, table, q_tokens, nth_stream, pages.end, open == 1, lane, pages.begin};
        if (open) {
            int item = 0; // quarters of pages
            for (int page = walk_pages.next(); page >= 0; page = walk_pages.next()) {
                const int64_t slot = table[page];
                masks mask;
                mask.load(q, page, g);
#pragma unroll
                for (int c = 0; c < 4; ++c, ++item) {
                    if (item % n_warps == warp) {
                        const int64_t first = slot * XQ_PAGE + 32 * c;
                        open_quarter<D, E, KB, PLAIN>(st, q, qb, k.window + first * D, v.window + first * E,
                                                      mask.at + c, p, lane);
                        found = true;
                    }
                }
            }
        } else {
            page_stages stages(shared + p_bytes + warp * n_stages * at.bytes, barriers[warp], n_stages, at, lane);
            int page = walk_pages.next_of(warp);
            found = page >= 0;
            if (found) {
                stages.fill(k, v, page);
            }
            stages.commit();
            while (page >= 0) {
                masks mask;
                mask.load(q, page, g);
                const int next = walk_pages.next_of(warp);
                if (n_stages == 2 && next >= 0) {
                    stages.fill(k, v, next);
                }
                stages.commit();
                sealed_page<D, E, KB, VB, PLAIN>(st, q, qb, k.plan, v.plan, stages.wait(), at, mask, p, lane);
                stages.release();
                if (n_stages == 1 && next >= 0) {
                    stages.fill(k, v, next);
                    stages.commit();
                }
                page = next;
            }
        }
        if (!__syncthreads_or(found)) {
            continue;
        }
        store(all, st, open ? 1.0f : power_of_two(st.exponent - 13 + 24), warp, lane);
        __syncthreads();
        for (int n = 0; n < E / 32; ++n) {
            const int at = threadIdx.x + 256 * n, r = at / E, j = at % E;
            float m = -INFINITY;
            for (int w = 0; w < n_warps; ++w) {
                m = fmaxf(m, all.max[w][r]);
            }
            for (int w = 0; w < n_warps && m != -INFINITY; ++w) {
                kept[open][n] += all.out[w][r][j] * exp2f(all.max[w][r] - m);
            }
        }
        if (threadIdx.x < n_rows) {
            for (int w = 0; w < n_warps; ++w) {
                max[open] = fmaxf(max[open], all.max[w][threadIdx.x]);
            }
            for (int w = 0; w < n_warps && max[open] != -INFINITY; ++w) {
                sum[open] += all.sum[w][threadIdx.x] * exp2f(all.max[w][threadIdx.x] - max[open]);
            }
        }
        __syncthreads();
    }
    if (threadIdx.x < n_rows) {
        top[0][threadIdx.x] = max[0];
        top[1][threadIdx.x] = max[1];
    }
    __syncthreads();
    const auto weight = [&](int open, int r) {
        const float m = fmaxf(top[0][r], top[1][r]);
        return m == -INFINITY ? 0.0f : exp2f(top[open][r] - m);
    };
    const auto state_of_row = [&](int r) {
        const int nth = tile * n_rows + r;
        return state_of(l, a, blockIdx.x, nth_stream * a.n_tokens + nth / n_rep, blockIdx.y * n_rep + nth % n_rep);
    };
    for (int n = 0; n < E / 32; ++n) {
        const int at = threadIdx.x + 256 * n, r = at / E, j = at % E;
        if (tile * n_rows + r < rows_of_head) {
            float *out = state_of_row(r);
            out[2 + j] = kept[0][n] * weight(0, r);
            out[2 + E + j] = kept[1][n] * weight(1, r);
        }
    }
    const int r = threadIdx.x;
    if (r < n_rows && tile * n_rows + r < rows_of_head) {
        float *out = state_of_row(r);
        out[0] = fmaxf(max[0], max[1]) / log2e;
        out[1] = sum[0] * weight(0, r) + sum[1] * weight(1, r);
    }
}

template <int D, int KB, int VB, bool PLAIN>
int launch(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    const int n_rep = a.n_head / l.n_head_kv, n_tiles = (a.n_tokens * n_rep + n_rows - 1) / n_rows;
    const int stage = n_warps * staging(l).bytes, joined_bytes = (int)sizeof(joined<D>);
    const int n_stages = p_bytes + 2 * stage <= shared_limit() ? 2 : 1;
    const int shared = p_bytes + n_stages * stage > joined_bytes ? p_bytes + n_stages * stage : joined_bytes;
    const auto kernel = decode_kernel<D, D, KB, VB, PLAIN>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess) {
        return launched("decode attention");
    }
    kernel<<<dim3(a.n_parts, l.n_head_kv, n_tiles * a.n_streams), 32 * n_warps, shared, stream>>>(l, a, n_stages);
    return launched("decode attention");
}

template <int D, int KB, bool PLAIN>
int launch_values(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    return l.plan.v.bits == 2 ? launch<D, KB, 2, PLAIN>(l, a, stream) : launch<D, KB, 1, PLAIN>(l, a, stream);
}

} // namespace

template <int D, bool PLAIN>
int launch_decode_of(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    switch (l.plan.k.bits) {
    case 4:
        return launch_values<D, 4, PLAIN>(l, a, stream);
    case 3:
        return launch_values<D, 3, PLAIN>(l, a, stream);
    case 2:
        return launch_values<D, 2, PLAIN>(l, a, stream);
    default:
        return launch_values<D, 1, PLAIN>(l, a, stream);
    }
}

} // namespace xq
