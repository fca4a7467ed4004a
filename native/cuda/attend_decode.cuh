/* attend_decode.cuh: attention of four or eight query rows per KV head over codes, on the tensor cores (codes_mma.cuh).
 *
 * A block is up to 12 or 20 warps that share a part of the pages of one KV head: every n_parts-th page.  They take
 * sealed pages in teams of E / 64, copied to shared memory in the background: a page is soon done with, and a warp
 * holds the sums of 64 channels only.  Before that, the last warps take pieces of open pages.  join.cuh puts together
 * what all of them sum up.  Which page is which is read once, before copies are asked for: behind them any read waits
 * long.
 *
 * The launch may overtake the update before it (programmatic dependent launch): while there is nothing to seal or
 * unseal, only open pages wait for it.
 *
 * Queries and folded vectors are rounded to F16 (relative error 2^-11), p as attend_values.cuh says; sums are single
 * precision.
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

#include <type_traits>

namespace xq {

namespace {

/* Pages of a block's part: sealed ones from the front on, open ones, with their slots, from the back. */
struct page_list {
    static constexpr int size = XQ_CUDA_PART_PAGES;
    int n_sealed, n_open;
    int pages[size], slots[size];
    uint8_t seen[size];
};

/* Lists the n pages of a block's part.  Of more tokens than one, most may see none of a page, which is then left out.
 * mask: of the first token of the tile, or null.  Called by all threads. */
__device__ void list_pages(page_list &list, const xq_cuda_attend_args &a, const int32_t *table, const char *mask,
                           int n_tokens, int n, int warp, int n_warps, int lane) {
    const auto page_of = [&](int nth) { return blockIdx.x + nth * a.n_parts; };
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
        int n_sealed = 0, n_open = 0;
#pragma unroll 1
        for (int base = 0; base < n; base += 32) {
            const int nth = base + lane;
            const int slot = nth < n && (!looks || list.seen[nth]) ? table[page_of(nth)] : page_free;
            const uint32_t sealed = __ballot_sync(~0u, slot == page_sealed), open = __ballot_sync(~0u, slot >= 0);
            const uint32_t before = (1u << lane) - 1;
            if (slot == page_sealed) {
                list.pages[n_sealed + __popc(sealed & before)] = page_of(nth);
            } else if (slot >= 0) {
                const int at = page_list::size - 1 - n_open - __popc(open & before);
                list.pages[at] = page_of(nth);
                list.slots[at] = slot;
            }
            n_sealed += __popc(sealed);
            n_open += __popc(open);
        }
        list.n_sealed = n_sealed;
        list.n_open = n_open;
    }
    __syncthreads();
}

/* Reads a tile's rows of q: rounded, scaled to below 1, in the order of the codes, to shared memory by one warp, for it
 * is the same for all; what takes the scale back, in q. */
template <int D, int KB, int R>
__device__ void load_rows(uint2 (*shared)[32], bool stores, rows<R> &q, const xq_cuda_attend_args &a,
                          const decode_call &c, int first, int nth_stream, int lane) {
    using wk = walk<KB, D>;
    const int g = lane / 4, t = lane % 4, row = min(first + row_of_column<R>(g), c.rows_of_head - 1);
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
        if (stores) {
            shared[n][lane] = {halves(channels[n].x * weight, channels[n].y * weight),
                               halves(channels[n].z * weight, channels[n].w * weight)};
        }
    }
    for (int r = 0; r < R; ++r) { // the columns 2 t and 2 t + 1
        q.factor[r] = power_of_two(__shfl_sync(~0u, exponent, 4 * (2 * t + r))) * a.scale * log2e;
    }
}

/* How a layer's values are multiplied: LOG8 parameters have scales above 0. */
template <int E, int VB, bool PLAIN, int R>
using values_of = std::conditional_t<PLAIN, byte_values<E, VB, R>, half_values<E, VB, R>>;

/* grid (part, KV head, tile of rows and stream).  Shared memory: sums of open pages, p of the teams, sealed pages; in
 * their place, at last, the teams' sums. */
template <int D, int E, int KB, int VB, bool PLAIN, int R>
__global__ void __launch_bounds__(32 * max_warps(R, KB + VB), 1)
    decode_kernel(const __grid_constant__ xq_cuda_layer l, const __grid_constant__ xq_cuda_attend_args a,
                  const __grid_constant__ decode_call c) {
    extern __shared__ __align__(128) uint8_t shared[];
    using of_team = team_warp<E>;
    using values = values_of<E, VB, PLAIN, R>;
    using ring_of_team = page_ring<of_team::size>;
    __shared__ typename ring_of_team::marks marks;
    __shared__ page_list list;
    __shared__ uint2 shared_q[walk<KB, D>::products][32];
    __shared__ float2 tops[max_warps(R, KB + VB)][n_rows<R>], shares[max_warps(R, KB + VB)][n_rows<R>];
    const staged &at = c.at;
    const int n_warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const of_team mine = {warp / of_team::size, warp % of_team::size};
    const int nth_stream = c.n_tiles == 1 ? blockIdx.z : blockIdx.z / (unsigned)c.n_tiles;
    const int first_row = (blockIdx.z - nth_stream * c.n_tiles) * n_rows<R>;

    if (warp < 2) { // the table, if the stream is what it usually is: what leads to it takes as long as itself
        const int page = blockIdx.x + (32 * warp + lane) * a.n_parts;
        if (page < a.n_kv_pages) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(a.table + (int64_t)nth_stream * l.n_pages + page));
        }
    }
    const int stream = stream_of(a, nth_stream);
    bool waited = !a.n_seal || *a.n_seal + *a.n_unseal > 0;
    if (waited) {
        wait_for_previous();
    }
    const int32_t *table = a.table + (int64_t)stream * l.n_pages;
    const char *mask = a.mask ? (const char *)a.mask + nth_stream * a.mask_stream_stride : nullptr;
    rows<R> q = {};
    load_rows<D, KB>(shared_q, warp == 0, q, a, c, first_row, nth_stream, lane);
    const folded_rows qb = {shared_q, lane};
    q.softcap = a.softcap * log2e;
    for (int r = 0; r < R; ++r) {
        const int row = first_row + R * t + r;
        const bool exists = row < c.rows_of_head;
        q.absent[r] = exists ? 0.0f : -INFINITY;
        q.slope[r] = PLAIN ? log2e : slope_of(a.max_bias, blockIdx.y * c.n_rep + c.rest_of(row), a.n_head) * log2e;
        q.mask[r] = mask && exists ? (const __half *)(mask + c.token_of(row) * a.mask_token_stride) : nullptr;
    }
    const side_view k = c.k.at(stream, blockIdx.y), v = c.v.at(stream, blockIdx.y);
    // of the part: one less for the last ones
    const int n_pages = c.n_pages - ((c.n_pages - 1) * a.n_parts + (int)blockIdx.x >= a.n_kv_pages);
    const int first_token = c.token_of(first_row),
              last_token = c.token_of(min(first_row + n_rows<R>, c.rows_of_head) - 1);
    ring_of_team ring(shared + c.buffers, marks, c.depth, at, mine.number, mine.member, lane);
    auto *open = (sums<E, R> *)shared;
    const typename values::room p = {
        (decltype(values::room::at))(shared + c.buffers - (c.n_teams - mine.number) * room_bytes<R>)};
    ring.begin();
    if (threadIdx.x == 0) {
        ring_of_team::prepare(marks, k, v);
    }
    list_pages(list, a, table, mask ? mask + first_token * a.mask_token_stride : nullptr, last_token - first_token + 1,
               n_pages, warp, n_warps, lane);
    const auto page_at = [&](int j) { return j < list.n_sealed ? list.pages[j] : -1; };

    masks<E, R> ahead; // of the team's next page: they come from afar, and later still behind copies
    if (mine.number < list.n_sealed) {
        ahead.load(q, list.pages[mine.number], mine, g);
    }

#pragma unroll 1
    for (int n = 0; n < c.depth; ++n) {
        ring.fill_first(page_at(mine.number + n * c.n_teams), n);
    }

    // open pages: by the last warps, which may have fewer sealed ones
    constexpr int pieces = XQ_PAGE / piece;
    const int nth = n_warps - 1 - warp, n_pieces = nth < c.n_open ? list.n_open * pieces : 0;
    if (nth < n_pieces) {
        if (!waited) {
            wait_for_previous();
            waited = true;
        }
        open_state<E, R> of_open;
        of_open.clear();
#pragma unroll 1
        for (int item = nth; item < n_pieces; item += c.n_open) {
            const int listed = page_list::size - 1 - item / pieces, first = item % pieces * piece;
            const int64_t row = (int64_t)list.slots[listed] * XQ_PAGE + first;
            open_piece<D, E, KB, PLAIN>(of_open, q, qb, k.window + row * D, v.window + row * E,
                                        list.pages[listed] * XQ_PAGE + first, {(__half *)open[nth].out}, lane);
        }
        __syncwarp();
        store(open[nth], of_open, lane);
    }

    typename values::state_of st;
    st.clear();
    const int n_sealed = list.n_sealed;
#pragma unroll 1
    for (int j = mine.number; j < n_sealed; j += c.n_teams) {
        const int number = list.pages[j];
        const bool masked = ahead.any();
        if (j + c.n_teams < n_sealed) {
            ahead.load(q, list.pages[j + c.n_teams], mine, g);
        }
        const uint8_t *page = ring.wait([&] { mine.meet(); });
        sealed_page<D, E, KB, values, PLAIN>(st, q, qb, k.plan, v.plan, page, at, number, masked, p, tops, mine, lane,
                                             [&] {
                                                 if (j >= c.n_teams) {
                                                     ring.refill(page_at(j + (c.depth - 1) * c.n_teams));
                                                 }
                                             });
        ring.next();
    }
    float zero[R];
    values::finish(st, zero, g);
    if (!waited) {
        wait_for_previous(); // it may still read what lies where this launch writes
    }
    launch_next();
    auto *teams = (sums<E, R> *)(shared + c.buffers);
    __syncthreads(); // pages lay there
    store(teams[mine.number], st, zero, shares, mine, lane);
    __syncthreads();
    finish_rows(teams, list.n_open > 0 ? open : nullptr, l, a, c, first_row, nth_stream, lane);
}

template <int D, int KB, int VB, bool PLAIN, int R>
int launch(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    const decode_shape shape = decode_shape_of(l, R);
    const auto kernel = decode_kernel<D, D, KB, VB, PLAIN, R>;
    decode_call c = {views_of(l, key_view), views_of(l, value_view), shape.at, shape.n_teams, shape.depth, shape.n_open,
                     shape.buffers,         a.n_head / l.n_head_kv};
    c.rows_of_head = a.n_tokens * c.n_rep;
    c.n_tiles = (c.rows_of_head + n_rows<R> - 1) / n_rows<R>;
    c.n_pages = (a.n_kv_pages + a.n_parts - 1) / a.n_parts;
    c.inverse = ((1u << 20) + c.n_rep - 1) / c.n_rep;
    const dim3 grid(a.n_parts, l.n_head_kv, c.n_tiles * a.n_streams);
    if (allow_shared(kernel, shape.shared)) {
        launch_early(kernel, grid, shape.n_teams * team_warp<D>::size * 32, shape.shared, stream, l, a, c);
    }
    return launched("decode attention");
}

template <int D, int KB, bool PLAIN, int R>
int launch_values(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    return l.plan.v.bits == 2 ? launch<D, KB, 2, PLAIN, R>(l, a, stream) : launch<D, KB, 1, PLAIN, R>(l, a, stream);
}

} // namespace

template <int D, bool PLAIN, int R>
int launch_decode_of(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    switch (l.plan.k.bits) {
    case 4:
        return launch_values<D, 4, PLAIN, R>(l, a, stream);
    case 3:
        return launch_values<D, 3, PLAIN, R>(l, a, stream);
    case 2:
        return launch_values<D, 2, PLAIN, R>(l, a, stream);
    default:
        return launch_values<D, 1, PLAIN, R>(l, a, stream);
    }
}

} // namespace xq
