/* attend_solo.cuh: attention of one token a stream over codes of wide heads, by warps that do not wait for each other.
 *
 * A block is eight warps that share a part of the pages of one KV head: every n_parts-th page.  In teams of W they take
 * sealed pages, which come to shared memory in the background (stage.cuh); each warp of a team has some of a page's
 * tokens, all channels, and a state of its own (solo_page.cuh).  It needs nothing of another warp until the end, when
 * wide_join.cuh puts the states together and merge_wide.cu the parts.
 *
 * Open pages come first, while sealed ones are on their way: the blocks of a KV head share all of them out
 * (solo_open.cuh).  What they sum up lies in memory, where the block's rows will lie, till these are joined.
 *
 * What plans of the presets have is known to the compiler: widths, bits, keys with one tile a page and F16 parameters,
 * values with LOG8 parameters of whole heads, scores without cap and slope.  Other layers take attend_wide.cuh, which
 * also says what is rounded how, and what args.after_update is.
 */
#pragma once

#include "page_list.cuh"
#include "solo_open.cuh"
#include "solo_page.cuh"
#include "solo_shape.h"
#include "wide_rows.cuh"

namespace xq {

namespace {

/* Pages of a block, in dynamic shared memory: the sealed ones of its part, and which pages of the stream are open.  A
 * page of the part is known by its number there: the nth is page part + nth n_parts. */
struct solo_list {
    int &n_sealed;
    int *nth;
    uint32_t *open;  /* [page / 32] */
    uint8_t *masked; /* of the nth page: whether its masks are not all 0 */
};

/* Lists the sealed ones of a part's n pages, by the first warp. */
__device__ inline void list_solo_pages(const solo_list &list, const xq_store &store, const int32_t *table, int part,
                                       int n_parts, int n, int lane) {
    int n_sealed = 0;
#pragma unroll 1
    for (int base = 0; base < n; base += 32) {
        const int nth = base + lane, page = part + nth * n_parts;
        const int slot = nth < n ? safe_slot(store, page, table[page]) : XQ_SLOT_NONE;
        const uint32_t sealed = __ballot_sync(~0u, slot == XQ_SLOT_SEALED);
        if (slot == XQ_SLOT_SEALED) {
            list.nth[n_sealed + __popc(sealed & ((1u << lane) - 1))] = nth;
        }
        n_sealed += __popc(sealed);
    }
    list.n_sealed = n_sealed;
}

/* The block's query rows to shared memory, which pages are open, and which of the part's n have masks that are not 0:
 * by all warps but the first, `nth` of them.  Nothing is waited for before all is on its way: copies of pages come
 * next, and any read behind them takes long.  mask: of the stream's token, or null. */
template <int KB, int E, int NT>
__device__ void load_solo_rows(uint8_t *queries, wide_tile<NT> &tile, const solo_list &list, const xq_store &store,
                               const int32_t *table, const xq_attend_args &args, const wide_call &call,
                               const block_task &task, const __half *mask, int n, int nth, int lane) {
    constexpr int step = solo_warps - 1, most = (wide_rows<NT> + step - 1) / step, pages = 8;
    const auto masks_of = [&](int page) {
        const int cell = (task.part + page * args.n_parts) * XQ_PAGE + 4 * lane;
        return mask && page < n ? *(const uint2 *)(mask + cell) : uint2{};
    };
    const auto note = [&](int page, uint2 masks) {
        const bool some = __any_sync(~0u, (masks.x | masks.y) != 0);
        if (page < n) {
            list.masked[page] = some;
        }
    };
    uint2 masks[pages];
    query_row<E / 128> rows[most];
#pragma unroll
    for (int i = 0; i < pages; ++i) {
        masks[i] = masks_of(nth + i * step);
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
        rows[i].load(nth + i * step, E, args, call, task, lane);
    }
    find_open_pages(list.open, store, table, args.n_kv_pages, nth, step, lane);
#pragma unroll
    for (int i = 0; i < pages; ++i) {
        note(nth + i * step, masks[i]);
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
        if (nth + i * step < wide_rows<NT>) {
            if (args.rotate) {
                rows[i].rotate(E, lane);
            }
            rows[i].store(queries, tile, nth + i * step, KB, E, args, task, lane);
        }
    }
#pragma unroll 4
    for (int page = nth + pages * step; page < n; page += step) {
        note(page, masks_of(page));
    }
}

/* Sealed pages of the list, by a warp: every page of its team's, as they come through `ring`. */
template <int KB, int VB, int E, int NT, int W>
__device__ void add_solo_sealed(solo_state<E, NT> &state, const solo_list &list, page_ring<solo_place<W>> &ring,
                                const staged &parts, const uint8_t *queries, const wide_tile<NT> &tile, int part,
                                int n_parts, int depth, const solo_place<W> &place) {
    constexpr int A = solo_place<W>::A, n_teams = solo_warps / W;
    const int first = first_solo_token<VB>(place), n_sealed = list.n_sealed;
#pragma unroll 1
    for (int j = place.team; j < n_sealed; j += n_teams) {
        const uint8_t *page = ring.wait();
        uint32_t b[2 * A][NT][2];
        {
            solo_scores<A, NT> s;
            s.template compute<KB, E>(page, page + parts.k_param, queries, tile, first, place);
            const int nth = list.nth[j];
            if (list.masked[nth]) {
                s.add_mask(tile.mask[0] + (part + nth * n_parts) * XQ_PAGE + first);
            }
            uint32_t e[A];
            for (int a = 0; a < A; ++a) {
                e[a] = *(const uint32_t *)(page + parts.v_param + first + 4 * a);
            }
            raise_solo_exponent(state, e, place);
            raise_solo_max(state, s, place);
            solo_p<VB>(b, state, s, e, place);
        }
        add_centres<VB>(state, b, page + parts.v_param + XQ_PAGE, place);
        add_solo_values<VB>(state, b, page + parts.v_codes, place);
        const int later = j + depth * n_teams;
        ring.leave(later < n_sealed ? part + list.nth[later] * n_parts : -1);
    }
}

/* Writes a warp's state. */
template <int E, int NT, int W>
__device__ void store_solo_state(uint8_t *to, const solo_state<E, NT> &state, const solo_place<W> &place) {
    const float unit = power_of_two(state.exponent - p_bits);
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        const int row = row_of(r, place.t), nt = r / 2, odd = r % 2;
        const float sum = sum_over_tokens(state.sum[r]);
        const float zero = state.zero[nt][0] + state.zero[nt][3]; // of row g + 8 nt
        const float more = __shfl_sync(~0u, zero, 8 * place.t + 4 * odd) * unit;
        if (place.g == 0) {
            ((float2 *)to)[row] = make_float2(state.max[r], sum);
        }
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            const auto &a = state.out[2 * c][nt], &b = state.out[2 * c + 1][nt];
            const float codes = unit * code_unit;
            *(float4 *)(state_values<NT>(to, row, E) + 32 * c + 4 * place.g) = make_float4(
                a[odd] * codes + more, a[2 + odd] * codes + more, b[odd] * codes + more, b[2 + odd] * codes + more);
        }
    }
}

/* ---- a block ---- */

/* grid (part, KV head, tile of rows and stream) */
template <int KB, int VB, int E, int NT>
__global__ void __launch_bounds__(32 * solo_warps, 1)
    solo_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_attend_args args,
                const __grid_constant__ wide_call call) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900 // no other GPU has the shared memory
    constexpr int W = solo_team<E>, n_teams = solo_warps / W;
    extern __shared__ __align__(128) uint8_t shared[];
    using ring_of = page_ring<solo_place<W>>;
    __shared__ typename ring_of::marks marks;
    __shared__ wide_tile<NT> tile;
    __shared__ int n_listed;
    const auto place = solo_place<W>::here();
    const int warp = threadIdx.x / 32;
    const int nth_stream = call.n_tiles == 1 ? blockIdx.z : blockIdx.z / (unsigned)call.n_tiles;
    const int first_row = (blockIdx.z - nth_stream * call.n_tiles) * wide_rows<NT>;
    const block_task task = {(int)blockIdx.x, (int)blockIdx.y, nth_stream, first_row};
    prefetch_table(store, args, task.part, task.nth_stream);
    if (!args.after_update) {
        wait_for_previous();
    }
    const int stream = safe_stream(store, stream_of(args.first_stream, task.nth_stream));
    const side_view k = side_at(store.k, stream, task.head), v = side_at(store.v, stream, task.head);
    ring_of ring(shared, marks, call.depth, call.parts, place);
    auto *pages = (int *)(shared + call.list);
    const int n_words = (args.n_kv_pages + 31) / 32;
    const solo_list list = {n_listed, pages, (uint32_t *)(pages + call.n_pages),
                            (uint8_t *)(pages + call.n_pages + n_words)};
    const int n_pages = call.pages_of(args, task.part);
    const int32_t *table = table_of(store, args.table, stream);
    if (warp == 0) {
        list_solo_pages(list, store, table, task.part, args.n_parts, n_pages, place.lane);
        if (place.lane == 0) {
            ring_of::prepare(marks, k, v);
        }
    } else {
        const auto *mask = (const __half *)mask_at(args, task.nth_stream, 0);
        load_solo_rows<KB, E>(shared + call.queries, tile, list, store, table, args, call, task, mask, n_pages,
                              warp - 1, place.lane);
    }
    __syncthreads();
    int number = task.part, page = nth_open_page(list.open, args.n_kv_pages, number / page_pieces, place.lane);
    const bool has_open = page >= 0;
    open_piece<KB, E> piece;
    const auto load_piece = [&] {
        const int nth = number % page_pieces;
        const auto *mask = tile.mask[0];
        piece.load(rows_of_piece<E>(k, v, safe_slot(store, page, table[page]), nth),
                   mask ? mask + page * XQ_PAGE + nth * piece_tokens : nullptr, warp, place);
    };
    if (has_open) {          // before copies start, behind which any read takes long
        wait_for_previous(); // it writes rows, and may still read what lies where this launch writes
        load_piece();
    }
    if (warp == 0) {
        ring.begin_all(n_teams, n_teams * call.depth,
                       [&](int n) { return n < list.n_sealed ? task.part + list.nth[n] * args.n_parts : -1; });
    }
    const open_in_memory open = {args, call, task};
    if (has_open) {
        open_sums<E, NT> sums;
        sums.clear();
#pragma unroll 1
        while (true) {
            add_open_piece(sums, piece, shared + call.queries, tile, (float4 *)(shared + call.rooms), warp, place);
            number += args.n_parts;
            page = nth_open_page(list.open, args.n_kv_pages, number / page_pieces, place.lane);
            if (page < 0) {
                break;
            }
            load_piece();
            __syncthreads();
        }
        open.store(sums, warp, place);
    } else {
        __syncthreads();
    }
    solo_state<E, NT> state;
    state.clear();
    add_solo_sealed<KB, VB>(state, list, ring, call.parts, shared + call.queries, tile, task.part, args.n_parts,
                            call.depth, place);
    wait_for_previous(); // it may still read what lies where this launch writes
    launch_next();
    __syncthreads(); // pages lay there
    store_solo_state(shared + warp * call.state, state, place);
    __syncthreads();
    const block_states<open_in_memory> states = {shared, call.state, solo_warps, has_open, open};
    join_wide_rows<NT, E / 32>(states, store, args, call, task);
#endif
}

/* ---- launch ---- */

template <int KB, int VB, int E, int NT>
int launch_solo_rows(const xq_store &store, const xq_attend_args &args, const wide_call &call, cudaStream_t stream) {
    const auto kernel = solo_kernel<KB, VB, E, NT>;
    const dim3 grid(args.n_parts, store.n_head_kv, call.n_tiles * args.n_streams);
    if (allow_shared(kernel, call.shared)) {
        launch_early(kernel, grid, 32 * solo_warps, call.shared, stream, store, args, call);
    }
    return launched("wide attention");
}

} // namespace

template <int E, int NT>
int launch_solo_of(const xq_store &store, const xq_attend_args &args, const wide_call &call, cudaStream_t stream) {
    const int k = store.k.plan.bits, v = store.v.plan.bits;
    return k == 4 && v == 2   ? launch_solo_rows<4, 2, E, NT>(store, args, call, stream)
           : k == 3 && v == 2 ? launch_solo_rows<3, 2, E, NT>(store, args, call, stream)
           : k == 2 && v == 1 ? launch_solo_rows<2, 1, E, NT>(store, args, call, stream)
                              : launch_solo_rows<4, 4, E, NT>(store, args, call, stream);
}

} // namespace xq
