/* attend_decode.cuh: attention of four or eight query rows per KV head over codes, on the tensor cores (codes_mma.cuh).
 *
 * A block is up to 12 or 20 warps that share a part of the pages of one KV head: every n_parts-th page.  They take
 * sealed pages in teams of E / 64, copied to shared memory in the background: a page is soon done with, and a warp
 * holds the sums of 64 channels only.  Before that, the last warps take pieces of open pages.  join.cuh puts together
 * what all of them sum up.  Which page is which is read once, before copies are asked for: behind them any read waits
 * long.
 *
 * Where args.after_update is set, the launch may overtake the update before it (programmatic dependent launch), which
 * wrote rows and moved no page.  That update itself waited for the launch before it to end before it let this one
 * begin. So all that was enqueued before the update is in memory: sealed pages, table, q and mask may be read at once.
 * Open pages, which the update writes, wait for its end, and so does the first write: the update may still read what
 * lies where this launch writes.
 *
 * Queries and folded vectors are rounded to F16 (relative error 2^-11), p as attend_values.cuh says; sums are single
 * precision.
 *
 * PLAIN: keys have one tile a page and F16 parameters, values LOG8, scores no cap and no slope; other cases are
 * compiled apart, so that the loop over pages stays small enough for the instruction cache.
 */
#pragma once

#include "alibi.h"
#include "decode_shape.h"
#include "join.cuh"
#include "launch.h"
#include "page_list.cuh"

#include <type_traits>

namespace xq {

namespace {

/* ---- query rows ---- */

/* Row r of a tile, of a head's rows; those past the last are as the last. */
__device__ const float *tile_query(const xq_attend_args &args, const decode_call &call, const block_task &task, int r) {
    const int row = min(task.first_row + r, call.rows_of_head - 1);
    return query_at(args, task.nth_stream, call.token_of(row), task.head * call.n_rep + call.rest_of(row));
}

/* A tile's rows of q times the Hadamard matrix, to shared memory: [row][D]. */
template <int D, int R>
__device__ void rotate_queries(float *to, const xq_attend_args &args, const decode_call &call, const block_task &task,
                               int lane) {
    constexpr int width = D / 32;
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < n_rows<R>; r += blockDim.x / 32) {
        const float *q = tile_query(args, call, task, r) + width * lane;
        float x[width];
        for (int k = 0; k < width; k += 2) {
            const float2 two = *(const float2 *)(q + k);
            x[k] = two.x, x[k + 1] = two.y;
        }
        transform_row<D>(x, lane);
        store_channels(to + r * D + width * lane, x);
    }
}

/* Reads a tile's rows of q: rounded, scaled to below 1, in the order of the codes, to shared memory by the block's
 * first warp, for it is the same for all; what takes the scale back, in `rows`.  rotated: they lie there, or null. */
template <int D, int KB, int R>
__device__ void load_queries(uint2 (*queries)[32], row_tile<R> &rows, const float *rotated, const xq_attend_args &args,
                             const decode_call &call, const block_task &task, const lane_place &place) {
    using wk = walk<KB, D>;
    const int t = place.t, nth = row_of_column<R>(place.g);
    const float *q = rotated ? rotated + nth * D : tile_query(args, call, task, nth);
    float4 channels[wk::products];
    float top = 0.0f;
#pragma unroll
    for (int n = 0; n < wk::products; ++n) {
        channels[n] = wk::has(n, t) ? *(const float4 *)(q + wk::row(n, t)) : float4{};
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
        if (threadIdx.x < 32) {
            queries[n][place.lane] = {halves(channels[n].x * weight, channels[n].y * weight),
                                      halves(channels[n].z * weight, channels[n].w * weight)};
        }
    }
    for (int r = 0; r < R; ++r) { // the columns 2 t and 2 t + 1
        rows.factor[r] = power_of_two(__shfl_sync(~0u, exponent, 4 * (2 * t + r))) * args.scale * log2e;
    }
}

/* What a lane needs of its R rows.  room: [n_rows<R>][D] of shared memory. */
template <int D, int KB, bool PLAIN, int R>
__device__ row_tile<R> load_rows(uint2 (*queries)[32], float *room, const xq_attend_args &args, const decode_call &call,
                                 const block_task &task, const lane_place &place) {
    row_tile<R> rows = {};
    if (args.rotate) {
        rotate_queries<D, R>(room, args, call, task, place.lane);
        __syncthreads();
    }
    load_queries<D, KB>(queries, rows, args.rotate ? room : nullptr, args, call, task, place);
    rows.queries = queries;
    rows.softcap = args.softcap * log2e;
    for (int r = 0; r < R; ++r) {
        const int row = task.first_row + R * place.t + r;
        const bool exists = row < call.rows_of_head;
        const int head = task.head * call.n_rep + call.rest_of(row);
        rows.absent[r] = exists ? 0.0f : -INFINITY;
        rows.slope[r] = PLAIN ? log2e : slope_of(args.max_bias, head, args.n_head) * log2e;
        rows.mask[r] = exists ? (const __half *)mask_at(args, task.nth_stream, call.token_of(row)) : nullptr;
    }
    return rows;
}

/* ---- pages ---- */

/* Pieces of open pages, by a warp: every step-th of n from `nth` on.  k, v: of the KV head. */
template <int D, int KB, bool PLAIN, int E, int R>
__device__ void add_open_pages(sums<E, R> &sum, const row_tile<R> &rows, const page_list &list, const side_view &k,
                               const side_view &v, int nth, int n, int step, const warp_place<E> &warp) {
    constexpr int pieces = XQ_PAGE / piece;
    open_state<E, R> state;
    state.clear();
#pragma unroll 1
    for (int item = nth; item < n; item += step) {
        const int listed = list.size - 1 - item / pieces, first = item % pieces * piece;
        const auto at = open_piece::of(k, v, list.slots[listed], list.pages[listed], first);
        if (at.k_param) {
            add_open_piece<D, KB, PLAIN, byte_piece<D, KB, E>>(state, rows, at, {(__half *)sum.out}, warp);
        } else {
            add_open_piece<D, KB, PLAIN, half_piece<D, KB, E>>(state, rows, at, {(__half *)sum.out}, warp);
        }
    }
    __syncwarp();
    store_state(sum, state, warp);
}

/* Sealed pages of the list, by a team: every n_teams-th, as they come through `ring`, which holds the first ones.
 * masks: of the team's first page. */
template <int D, int KB, typename VALUES, bool PLAIN, int E, int R>
__device__ void add_sealed_pages(typename VALUES::state_of &state, const row_tile<R> &rows, const page_list &list,
                                 page_ring<warp_place<E>> &ring, page_masks<E, R> &masks,
                                 const team_room<VALUES, R> &room, const xq_store &store, const decode_shape &shape,
                                 const warp_place<E> &warp) {
    const int n_sealed = list.n_sealed;
#pragma unroll 1
    for (int j = warp.team; j < n_sealed; j += shape.n_teams) {
        const int number = list.pages[j];
        const bool masked = masks.any();
        if (j + shape.n_teams < n_sealed) { // they come from afar, and later still behind copies
            masks.load(rows, list.pages[j + shape.n_teams], warp);
        }
        const page_in_shared page = {ring.wait(), shape.parts, store.k.plan, store.v.plan, number, masked};
        add_sealed_page<D, KB, VALUES, PLAIN>(state, rows, page, room, warp, [&] {
            if (j >= shape.n_teams) {
                const int last = j + (shape.depth - 1) * shape.n_teams;
                ring.refill(last < list.n_sealed ? list.pages[last] : -1);
            }
        });
        ring.next();
    }
}

/* ---- a block ---- */

/* How a layer's values are multiplied: LOG8 parameters have scales above 0. */
template <int E, int VB, bool PLAIN, int R>
using values_of = std::conditional_t<PLAIN, byte_values<E, VB, R>, half_values<E, VB, R>>;

/* grid (part, KV head, tile of rows and stream).  Shared memory: sums of open pages, p of the teams, sealed pages; in
 * their place, at first, rotated queries, at last the teams' sums. */
template <int D, int E, int KB, int VB, bool PLAIN, int R>
__global__ void __launch_bounds__(32 * max_warps(R, KB + VB), 1)
    decode_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_attend_args args,
                  const __grid_constant__ decode_call call) {
    extern __shared__ __align__(128) uint8_t shared[];
    static_assert(sizeof(sums<E, R>) >= n_rows<R> * D * sizeof(float),
                  "rotated queries lie where open sums come later");
    using values = values_of<E, VB, PLAIN, R>;
    __shared__ typename page_ring<warp_place<E>>::marks marks;
    __shared__ page_list list;
    __shared__ uint2 queries[walk<KB, D>::products][32];
    __shared__ float2 tops[max_warps(R, KB + VB)][n_rows<R>], shares[max_warps(R, KB + VB)][n_rows<R>];
    const decode_shape &shape = call.shape;
    const auto warp = warp_place<E>::here();
    const int nth_stream = call.n_tiles == 1 ? blockIdx.z : blockIdx.z / (unsigned)call.n_tiles;
    const int first_row = (blockIdx.z - nth_stream * call.n_tiles) * n_rows<R>;
    const block_task task = {(int)blockIdx.x, (int)blockIdx.y, nth_stream, first_row};
    prefetch_table(store, args, task.part, task.nth_stream);

    if (!args.after_update) {
        wait_for_previous();
    }
    const int stream = safe_stream(store, stream_of(args.first_stream, task.nth_stream));
    const row_tile<R> rows = load_rows<D, KB, PLAIN, R>(queries, (float *)shared, args, call, task, warp);
    const side_view k = side_at(store.k, stream, task.head), v = side_at(store.v, stream, task.head);

    page_ring<warp_place<E>> ring(shared + shape.buffers, marks, shape.depth, shape.parts, warp);
    ring.begin();
    if (threadIdx.x == 0) {
        page_ring<warp_place<E>>::prepare(marks, k, v);
    }
    const int n_pages = call.pages_of(args, task.part);
    const int first_token = call.token_of(task.first_row);
    const int last_token = call.token_of(min(task.first_row + n_rows<R>, call.rows_of_head) - 1);
    list_pages(list, store, args, table_of(store, args.table, stream), mask_at(args, task.nth_stream, first_token),
               last_token - first_token + 1, n_pages);

    page_masks<E, R> masks;
    if (warp.team < list.n_sealed) {
        masks.load(rows, list.pages[warp.team], warp);
    }
#pragma unroll 1
    for (int n = 0; n < shape.depth; ++n) {
        const int nth = warp.team + n * shape.n_teams;
        ring.fill_first(nth < list.n_sealed ? list.pages[nth] : -1, n);
    }

    auto *open = (sums<E, R> *)shared;
    const int nth_open = blockDim.x / 32 - 1 - threadIdx.x / 32; // the last warps, which may have fewer sealed pages
    const int n_pieces = nth_open < shape.n_open ? list.n_open * (XQ_PAGE / piece) : 0;
    if (nth_open < n_pieces) {
        wait_for_previous(); // it writes rows
        add_open_pages<D, KB, PLAIN>(open[nth_open], rows, list, k, v, nth_open, n_pieces, shape.n_open, warp);
    }

    const team_room<values, R> room = {
        {(decltype(values::room::at))(shared + shape.buffers - (shape.n_teams - warp.team) * room_bytes<R>)}, tops};
    typename values::state_of state;
    state.clear();
    add_sealed_pages<D, KB, values, PLAIN>(state, rows, list, ring, masks, room, store, shape, warp);
    float zero[R];
    values::finish(state, zero, warp);
    wait_for_previous(); // it may still read what lies where this launch writes
    launch_next();
    auto *teams = (sums<E, R> *)(shared + shape.buffers);
    __syncthreads(); // pages lay there
    store_state(teams[warp.team], state, zero, shares, warp);
    __syncthreads();
    finish_rows(teams, list.n_open > 0 ? open : nullptr, store.v.plan.rotate, args, call, task, warp.lane);
}

/* ---- launches ---- */

template <int D, int KB, int VB, bool PLAIN, int R>
int launch(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    const auto kernel = decode_kernel<D, D, KB, VB, PLAIN, R>;
    decode_call call = {};
    call.shape = decode_shape_of(store, R);
    call.count(store, args, n_rows<R>);
    const dim3 grid(args.n_parts, store.n_head_kv, call.n_tiles * args.n_streams);
    if (allow_shared(kernel, call.shape.shared)) {
        launch_early(kernel, grid, call.shape.n_teams * warp_place<D>::size * 32, call.shape.shared, stream, store,
                     args, call);
    }
    return launched("decode attention");
}

template <int D, int KB, bool PLAIN, int R>
int launch_values(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    return store.v.plan.bits == 2 ? launch<D, KB, 2, PLAIN, R>(store, args, stream)
                                  : launch<D, KB, 1, PLAIN, R>(store, args, stream);
}

} // namespace

template <int D, bool PLAIN, int R>
int launch_decode_of(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    switch (store.k.plan.bits) {
    case 4:
        return launch_values<D, 4, PLAIN, R>(store, args, stream);
    case 3:
        return launch_values<D, 3, PLAIN, R>(store, args, stream);
    case 2:
        return launch_values<D, 2, PLAIN, R>(store, args, stream);
    default:
        return launch_values<D, 1, PLAIN, R>(store, args, stream);
    }
}

} // namespace xq
