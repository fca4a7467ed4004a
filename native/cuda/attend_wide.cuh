/* attend_wide.cuh: attention over codes of any width on the tensor cores, eight or sixteen query rows of a KV head.
 *
 *     s = q . k    ->    p = 2^(s - max)    ->    out += sum_t p_t v_t          v: own codes, or, latent, those of k
 *
 * A block is one to four teams of W warps that share a part of the pages of one KV head: every n_parts-th page.  Sealed
 * pages come to shared memory in the background (stage.cuh), one team's after the other; of a page
 *
 *     the team folds q with the scales of keys, and scales of groups of values with their unit
 *     each warp takes 128 / W tokens to their scores, over all channels
 *     the team meets for the maximum; each warp stores p of its tokens, times their values' scales
 *     each warp takes T tiles of 16 channels to their sums, over all tokens
 *
 * and open pages afterwards, from memory, with sums of their own, for sealed values may be rotated.  Widths, bits and
 * groups are numbers at run time: what the compiler knows is how many sums a lane holds.  What a block sums up goes to
 * memory; merge_wide.cu joins the parts.
 *
 * Where args.after_update is set, see attend_decode.cuh: what is said there holds here.
 *
 * Queries, folded queries and p times scales are rounded to F16 (relative error 2^-11); sums are single precision, but
 * tensor cores add towards zero: what a team sums up over n pages is too small by up to 8 n 2^-23 of the codes' part.
 */
#pragma once

#include "page_list.cuh"
#include "wide_join.cuh"
#include "wide_rows.cuh"

namespace xq {

namespace {

/* The pages of a block's part, with room for them in dynamic shared memory; each thread has its pointers. */
struct part_list {
    int &n_sealed, &n_open;
    int size;
    int *pages, *slots;
    uint8_t *seen;
};

/* ---- pages ---- */

/* Sealed pages of the list, by a team: every n_teams-th, as they come through `ring`, which holds the first ones. */
template <int W, int T, int NT, bool LATENT>
__device__ void add_wide_sealed(wide_state<T, NT> &state, const wide_team<W, T, NT, LATENT> &team,
                                const part_list &list, page_ring<wide_place<W>> &ring) {
    constexpr int N = wide_team<W, T, NT, LATENT>::N;
    const wide_place<W> &place = team.place;
    const int first = team.first_token(), n_sealed = list.n_sealed, step = team.call.n_teams;
    const float softcap = team.args.softcap * log2e;
    const latent_place latent_at = team.latent();
    const auto low = p_place<NT>::of(LATENT ? token_order() : team.call.v_low, first, place.t);
    const auto high = p_place<NT>::of(team.call.v_high, first, place.t);
    wide_masks<N, NT> masks = {};
    masks.one = team.args.n_tokens == 1;
    if (place.team < n_sealed) {
        masks.load(team.tile, list.pages[place.team] * XQ_PAGE + first, place.t);
    }
#pragma unroll 1
    for (int j = place.team; j < n_sealed; j += step) {
        const uint8_t *page = ring.wait();
        const staged &parts = team.call.parts;
        team.fold_keys(page + parts.k_param);
        if (!LATENT) {
            team.fold_values(state, page + parts.v_param);
        }
        place.meet();
        float s[N][2 * NT];
        team.sealed_scores(s, page);
        finish_wide_scores<N, NT>(s, masks, team.tile, softcap, place.t);
        exponentiate_page<N>(state, s, team.tops(false), place);
        team.store_sealed_p(state, s, page + parts.v_param, low, high);
        const auto load_masks = [&] {
            if (j + step < n_sealed) { // they come from afar
                masks.load(team.tile, list.pages[j + step] * XQ_PAGE + first, place.t);
            }
        };
        if (!LATENT) {
            load_masks();
        }
        place.meet();
        if (LATENT) {
            team.latent_values(state, page, page + parts.k_param, latent_at);
            load_masks(); // later: registers are scarce before
        } else {
            team.sealed_values(state, page + parts.v_codes);
        }
        place.meet();
        ring.next();
        const int later = j + team.call.depth * step;
        ring.refill(later < n_sealed ? list.pages[later] : -1);
    }
}

/* Open pages of the list, by a team: every n_teams-th from the nth on.  k, v: of the KV head. */
template <int W, int T, int NT, bool LATENT>
__device__ void add_wide_open(wide_state<T, NT> &state, const wide_team<W, T, NT, LATENT> &team, const part_list &list,
                              const side_view &k, const side_view &v, int nth) {
    constexpr int N = wide_team<W, T, NT, LATENT>::N;
    const wide_place<W> &place = team.place;
    const int first = team.first_token();
    const auto to = p_place<NT>::of(token_order(), first, place.t);
    float by[N];
    for (int n = 0; n < N; ++n) {
        by[n] = power_of_two(p_bits);
    }
#pragma unroll 1
    for (int j = nth; j < list.n_open; j += team.call.n_teams) {
        const int at = list.size - 1 - j;
        wide_masks<N, NT> masks = {};
        masks.one = team.args.n_tokens == 1;
        masks.load(team.tile, list.pages[at] * XQ_PAGE + first, place.t);
        float s[N][2 * NT];
        team.open_scores(s, k, list.slots[at]);
        finish_wide_scores<N, NT>(s, masks, team.tile, team.args.softcap * log2e, place.t);
        exponentiate_page<N>(state, s, team.tops(true), place);
        store_p<N, NT>(team.p(), to, s, by, place.g);
        place.meet();
        team.open_values(state, LATENT ? k : v, list.slots[at]);
        place.meet();
    }
}

/* Asks for the rows of open pages: they are read last, when nothing else hides how far they are. */
__device__ inline void prefetch_open(const part_list &list, const side_view &side, bool is_k) {
#pragma unroll 1
    for (int j = 0; j < list.n_open; ++j) {
        const int slot = list.slots[list.size - 1 - j];
        const int bytes = is_bytes(slot) ? page_in_bytes(is_k, side.width) : XQ_PAGE * side.width * (int)sizeof(__half);
        const char *rows =
            is_bytes(slot) ? (const char *)bytes_at(side, is_k, slot).codes : (const char *)open_rows(side, slot);
#pragma unroll 1
        for (int at = 128 * threadIdx.x; at < bytes; at += 128 * blockDim.x) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(rows + at));
        }
    }
}

/* States of teams in shared memory, `step` bytes apart. */
template <int NT> struct team_states {
    uint8_t *first;
    int step, width;

    __device__ float2 head(int i, int row) const { return ((const float2 *)(first + i * step))[row]; }
    __device__ const float *values(int i, int row) const { return state_values<NT>(first + i * step, row, width); }
};

/* ---- a block ---- */

/* grid (part, KV head, tile of rows and stream) */
template <int W, int T, int NT, bool LATENT>
__global__ void __launch_bounds__(32 * wide_warps<W, T, NT>, 1)
    wide_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_attend_args args,
                const __grid_constant__ wide_call call) {
    extern __shared__ __align__(128) uint8_t shared[];
    using ring_of = page_ring<wide_place<W>>;
    __shared__ typename ring_of::marks marks;
    __shared__ wide_tile<NT> tile;
    __shared__ int n_listed[2];
    const auto place = wide_place<W>::here();
    const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    const int nth_stream = call.n_tiles == 1 ? blockIdx.z : blockIdx.z / (unsigned)call.n_tiles;
    const int first_row = (blockIdx.z - nth_stream * call.n_tiles) * wide_rows<NT>;
    const block_task task = {(int)blockIdx.x, (int)blockIdx.y, nth_stream, first_row};
    prefetch_table(store, args, task.part, task.nth_stream);
    if (!args.after_update) {
        wait_for_previous();
    }
    const int stream = safe_stream(store, stream_of(args.first_stream, task.nth_stream));
    const side_view k = side_at(store.k, stream, task.head), v = side_at(store.v, stream, task.head);
    uint8_t *own_ring = shared + place.team * call.ring;
    ring_of ring(own_ring - place.team * call.depth * call.parts.bytes, marks, call.depth, call.parts, place);
    ring.begin();
    if (threadIdx.x == 0) {
        ring_of::prepare(marks, k, v);
    }
    auto *pages = (int *)(shared + call.list);
    part_list list = {n_listed[0], n_listed[1],          call.n_pages,
                      pages,       pages + call.n_pages, (uint8_t *)(pages + 2 * call.n_pages)};
    for (int r = warp - 1; r >= 0 && r < wide_rows<NT>; r += n_warps - 1) { // while the first warp waits for the table
        query_row<(XQ_MAX_HEAD_DIM / 4 + 31) / 32> row;
        row.load(r, store.k.width, args, call, task, place.lane);
        if (args.rotate) {
            row.rotate(store.k.width, place.lane);
        }
        row.store(shared + call.queries, tile, r, store.k.plan.bits, store.k.width, args, task, place.lane);
    }
    const int n_pages = call.pages_of(args, task.part);
    const int first_token = call.token_of(task.first_row);
    const int last_token = call.token_of(min(task.first_row + wide_rows<NT>, call.rows_of_head) - 1);
    list_pages(list, store, args, table_of(store, args.table, stream), mask_at(args, task.nth_stream, first_token),
               last_token - first_token + 1, n_pages);
#pragma unroll 1
    for (int n = 0; n < call.depth; ++n) {
        const int nth = place.team + n * call.n_teams;
        ring.fill_first(nth < list.n_sealed ? list.pages[nth] : -1, n);
    }
    prefetch_open(list, k, true);
    if (!LATENT) {
        prefetch_open(list, v, false);
    }

    const wide_team<W, T, NT, LATENT> team = {
        store, args, call, tile, shared + call.queries, shared + call.rooms + place.team * call.room, place};
    clear_tops<NT>(team.tops(false), threadIdx.x % (32 * W)); // the team meets over its first page
    clear_tops<NT>(team.tops(true), threadIdx.x % (32 * W));
    wide_state<T, NT> state;
    state.clear();
    add_wide_sealed(state, team, list, ring);
    if (LATENT) {
        store_latent_state(own_ring, state, team);
    } else {
        store_sealed_state(own_ring, own_ring + call.state, state, team);
    }
    wait_for_previous(); // it writes rows, and may still read what lies where this launch writes
    launch_next();
    const int nth_open = call.n_teams - 1 - place.team; // the last teams may have fewer sealed pages
    if (nth_open < list.n_open) {
        state.clear();
        add_wide_open(state, team, list, k, v, nth_open);
        store_open_state(own_ring + call.state, state, team);
    }
    __syncthreads();
    const int n_open = min(call.n_teams, list.n_open); // the last teams took them
    const team_states<NT> open = {shared + (call.n_teams - n_open) * call.ring + call.state, call.ring, call.width};
    const block_states<team_states<NT>> states = {shared, call.ring, call.n_teams, n_open, open};
    join_wide_rows<NT, max_wide_width / 32>(states, store, args, call, task);
}

/* ---- launch ---- */

} // namespace

template <int W, int T, int NT, bool LATENT>
int launch_wide_of(const xq_store &store, const xq_attend_args &args, const wide_call &call, cudaStream_t stream) {
    const auto kernel = wide_kernel<W, T, NT, LATENT>;
    const dim3 grid(args.n_parts, store.n_head_kv, call.n_tiles * args.n_streams);
    if (allow_shared(kernel, call.shared)) {
        launch_early(kernel, grid, call.n_teams * W * 32, call.shared, stream, store, args, call);
    }
    return launched("wide attention");
}

} // namespace xq
