/* attend_decode.cuh: attention of up to eight query rows per KV head over codes, on the tensor cores (codes_mma.cuh).
 *
 * A block is up to 12 warps that share a part of the pages of one KV head: every n_parts-th page.  A warp takes whole
 * sealed pages, copied to shared memory in the background, and pieces of open ones, which come first: what they sum up
 * is transformed to the space of sealed values, so that one state of a row is left (join.cuh).
 *
 * The launch may overtake the update before it (programmatic dependent launch): while there is nothing to seal or
 * unseal, only open pages wait for it.
 *
 * Vectors are rounded to F16 (relative error 2^-11); sums are single precision.
 *
 * PLAIN: keys have one tile a page and F16 parameters, values LOG8, scores no cap and no slope; other cases are
 * compiled apart, so that the loop over pages stays small enough for the instruction cache.
 */
#pragma once

#include "attend.cuh"
#include "attend_page.cuh"
#include "decode_shape.h"
#include "join.cuh"
#include "launch.h"
#include "stage.cuh"

namespace xq {

namespace {

constexpr int list_size = 512; /* pages of a block that are listed at a time */

struct page_list {
    int n, pages[list_size];
    uint8_t seen[list_size];
};

/* Lists the sealed pages of a block's part, those from the first-th on; of more tokens than one, most may see none of a
 * page, which is then left out.  mask: of the first token of the tile, or null.  Called by all threads. */
__device__ void list_pages(page_list &list, const xq_cuda_attend_args &a, const int32_t *table, const char *mask,
                           int n_tokens, int first, int n, int warp, int n_warps, int lane) {
    const auto page_of = [&](int nth) { return blockIdx.x + (first + nth) * a.n_parts; };
    const bool looks = mask && a.n_tokens > 1;
    if (looks) {
        for (int nth = warp; nth < n; nth += n_warps) {
            const char *at = mask + (page_of(nth) * XQ_PAGE + 4 * lane) * (int)sizeof(__half);
            bool some = false;
#pragma unroll 1
            for (int token = 0; token < n_tokens; ++token) {
                const uint2 x = *(const uint2 *)(at + token * a.mask_token_stride);
                some |= x.x != 0xfc00fc00u || x.y != 0xfc00fc00u; // -inf twice
            }
            list.seen[nth] = __any_sync(~0u, some);
        }
        __syncthreads();
    }
    if (warp == 0) {
        int listed = 0;
#pragma unroll 1
        for (int base = 0; base < n; base += 32) {
            const int nth = base + lane;
            const bool is_sealed = nth < n && table[page_of(nth)] == page_sealed && (!looks || list.seen[nth]);
            const uint32_t found = __ballot_sync(~0u, is_sealed);
            if (is_sealed) {
                list.pages[listed + __popc(found & ((1u << lane) - 1))] = page_of(nth);
            }
            listed += __popc(found);
        }
        list.n = listed;
    }
    __syncthreads();
}

/* Reads a tile's rows of q: rounded, scaled to below 1, in the order of the codes; what takes the scale back, in q. */
template <int D, int KB>
__device__ void load_rows(uint32_t (*qb)[2], rows &q, const xq_cuda_attend_args &a, const decode_call &c, int first,
                          int nth_stream, int lane) {
    using wk = walk<KB, D>;
    const int g = lane / 4, t = lane % 4, row = min(first + g, c.rows_of_head - 1);
    const auto *x = (const float *)((const char *)a.q + (blockIdx.y * c.n_rep + c.rest_of(row)) * a.q_head_stride +
                                    (nth_stream * a.n_tokens + c.token_of(row)) * a.q_token_stride);
    float4 channels[wk::products];
    float top = 0.0f;
#pragma unroll
    for (int n = 0; n < wk::products; ++n) {
        channels[n] = wk::has(n, t) ? *(const float4 *)(x + wk::row(n, t)) : float4{};
    }
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        const float4 y = channels[n];
        top = fmaxf(fmaxf(top, fmaxf(fabsf(y.x), fabsf(y.y))), fmaxf(fabsf(y.z), fabsf(y.w)));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const int exponent = min(max((int)(__float_as_uint(top) >> 23) - 126, -100), 100); // top < 2^exponent
    const float factor = power_of_two(-exponent);
#pragma unroll
    for (int n = 0; n < wk::products; ++n) {
        const float weight = wk::weight(n) * factor;
        qb[n][0] = halves(channels[n].x * weight, channels[n].y * weight);
        qb[n][1] = halves(channels[n].z * weight, channels[n].w * weight);
    }
    for (int r = 0; r < 2; ++r) { // row 2 t + r lies with lane 4 (2 t + r)
        q.factor[r] = power_of_two(__shfl_sync(~0u, exponent, 4 * (2 * t + r))) * a.scale * log2e;
    }
}

/* grid (part, KV head, tile of rows and stream).  Shared memory: pages, then p of open ones; at last `joined`. */
template <int D, int E, int KB, int VB, bool PLAIN>
__global__ void __launch_bounds__(32 * max_warps, 1)
    decode_kernel(const __grid_constant__ xq_cuda_layer l, const __grid_constant__ xq_cuda_attend_args a,
                  const __grid_constant__ decode_call c) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ page_ring::marks marks;
    __shared__ page_list list;
    const staged &at = c.at;
    const int n_warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int nth_stream = blockIdx.z / (unsigned)c.n_tiles, first_row = (blockIdx.z - nth_stream * c.n_tiles) * n_rows;

    const int stream = *a.first_stream + nth_stream;
    bool waited = !a.n_seal || *a.n_seal + *a.n_unseal > 0;
    if (waited) {
        wait_for_previous();
    }
    const int32_t *table = a.table + (int64_t)stream * l.n_pages;
    const char *mask = a.mask ? (const char *)a.mask + nth_stream * a.mask_stream_stride : nullptr;
    uint32_t qb[walk<KB, D>::products][2];
    rows q = {};
    load_rows<D, KB>(qb, q, a, c, first_row, nth_stream, lane);
    q.softcap = a.softcap * log2e;
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + 2 * t + r;
        const bool exists = row < c.rows_of_head;
        q.absent[r] = exists ? 0.0f : -INFINITY;
        q.slope[r] = PLAIN ? log2e : slope_of(a.max_bias, blockIdx.y * c.n_rep + c.rest_of(row), a.n_head) * log2e;
        q.mask[r] = mask && exists ? (const __half *)(mask + c.token_of(row) * a.mask_token_stride) : nullptr;
    }
    const side_view k = key_view(l, stream, blockIdx.y), v = value_view(l, stream, blockIdx.y);
    // of the part: one less for the last ones
    const int n_pages = c.n_pages - ((c.n_pages - 1) * a.n_parts + (int)blockIdx.x >= a.n_kv_pages);
    const int first_token = c.token_of(first_row), last_token = c.token_of(min(first_row + n_rows, c.rows_of_head) - 1);
    page_ring ring(shared, marks, c.n_buffers, at, warp, n_warps, lane);
    state<E> st;
    st.clear();
    for (int first = 0; first < n_pages; first += list_size) { // once, as a rule
        if (warp == n_warps - 1) {
            ring.begin();
        }
        list_pages(list, a, table, mask ? mask + first_token * a.mask_token_stride : nullptr,
                   last_token - first_token + 1, first, min(n_pages - first, list_size), warp, n_warps, lane);
        const auto page_at = [&](int j) { return j < list.n ? list.pages[j] : -1; };
#pragma unroll 1
        for (int j = warp, steps = 0; j < c.n_buffers; j += n_warps, ++steps) {
            ring.fill_first(k, v, page_at(j), steps);
        }

        // open pages of the whole part, before any sealed one; the last warps first: they may have fewer sealed pages
        constexpr int pieces = XQ_PAGE / piece;
        const piece_p p = {(__half *)(shared + c.n_buffers * at.bytes + warp * piece_p::bytes)};
        int item = n_warps - 1 - warp;
        bool any_open = false;
#pragma unroll 1
        for (int base = 0; base < n_pages && first == 0; base += 32) {
            const int page = blockIdx.x + (base + lane) * a.n_parts,
                      slot = base + lane < n_pages ? table[page] : page_free;
#pragma unroll 1
            for (uint32_t found = __ballot_sync(~0u, slot >= 0); found != 0; found &= found - 1) {
                const int bit = __ffs(found) - 1, open_page = __shfl_sync(~0u, page, bit);
                const int64_t row = (int64_t)__shfl_sync(~0u, slot, bit) * XQ_PAGE;
#pragma unroll 1
                for (; item < pieces; item += n_warps) {
                    if (!waited) {
                        wait_for_previous();
                        waited = true;
                    }
                    open_piece<D, E, KB, PLAIN>(st, q, qb, k.window + (row + piece * item) * D,
                                                v.window + (row + piece * item) * E, open_page * XQ_PAGE + piece * item,
                                                p, lane);
                    any_open = true;
                }
                item -= pieces;
            }
        }
        if (any_open) {
            open_to_sealed(st, v.plan.rotate, lane);
        }

        const int n_listed = list.n;
#pragma unroll 1
        for (int j = warp; j < n_listed; j += n_warps) {
            masks mask;
            const bool is_masked = mask.load(q, list.pages[j], g);
            sealed_page<D, E, KB, VB, PLAIN>(st, q, qb, k.plan, v.plan, ring.wait(), at, mask, is_masked, lane);
            ring.refill(k, v, page_at(j + c.n_buffers));
            ring.next();
        }
        if (first + list_size < n_pages) {
            __syncthreads();
            if (warp == n_warps - 1) {
                ring.end();
            }
            ring.restart(warp);
        }
    }
    finish_sums<E, PLAIN>(st);
    if (!waited) {
        wait_for_previous(); // it may still read what lies where this launch writes
    }
    launch_next();
    finish_rows(*(joined<E> *)shared, st, l, a, c, first_row, nth_stream, n_warps, warp, lane);
}

template <int D, int KB, int VB, bool PLAIN>
int launch(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    const decode_shape shape = decode_shape_of(l);
    const auto kernel = decode_kernel<D, D, KB, VB, PLAIN>;
    decode_call c = {shape.at, shape.n_buffers, a.n_head / l.n_head_kv};
    c.rows_of_head = a.n_tokens * c.n_rep;
    c.n_tiles = (c.rows_of_head + n_rows - 1) / n_rows;
    c.n_pages = (a.n_kv_pages + a.n_parts - 1) / a.n_parts;
    c.inverse = ((1u << 20) + c.n_rep - 1) / c.n_rep;
    const dim3 grid(a.n_parts, l.n_head_kv, c.n_tiles * a.n_streams);
    if (allow_shared(kernel, shape.shared)) {
        launch_early(kernel, grid, 32 * shape.n_warps, shape.shared, stream, l, a, c);
    }
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
