/* attend_page.cuh: online softmax of a team of warps over a sealed page, for 4 R query rows.
 *
 *     s = q . k    ->    p = 2^(s - max)    ->    out += sum_t p_t v_t
 *
 * Of a sealed page, each warp of a team takes an equal share of the tokens to their scores, and, when all p are there,
 * an equal share of the channels to their sums: 64.
 *
 * The team meets twice a page, which is enough.  Of page n, each warp
 *
 *     writes its maxima | meets, M(n) | reads all maxima, writes its p | meets, P(n) | reads all p and the values
 *
 * Maxima of the next page are written behind P(n), which all warps reach behind their reading of this page's.  The next
 * p are written, and the page's buffer is filled again, behind M(n + 1), which all warps reach behind their reading of
 * p and of the page.  So nothing is overwritten before all have read it, and nothing is read before it is there.
 * tools/break_barriers.py takes out one barrier after the other, and tests fail.
 *
 * q lies in the order of the codes (codes_mma.cuh), scaled by a power of two to below 1.
 */
#pragma once

#include "attend_values.cuh"

namespace xq {

namespace {

/* Scale and zero point, code 0, of four channels, as halves. */
template <bool F16>
__device__ void load_four(const xq_side &side, const uint8_t *param, int n, int i, uint2 &scale, uint2 &zero) {
    if (F16 || side.param == XQ_PARAM_F16) {
        scale = *(const uint2 *)((const __half *)param + i);
        zero = *(const uint2 *)((const __half *)param + n + i);
        return;
    }
    float s[4], z[4];
    load_four(side, param, n, i, s, z);
    for (int w = 0; w < 4; ++w) {
        z[w] = fminf(fmaxf(z[w], -65504.0f), 65504.0f);
    }
    scale = make_uint2(halves(s[0], s[1]), halves(s[2], s[3]));
    zero = make_uint2(halves(z[0], z[1]), halves(z[2], z[3]));
}

/* folded [product][2] = q times the scales of one tile of a page's keys, whose parameters lie at `param`. */
template <int D, int KB, bool PLAIN, int R>
__device__ void fold_keys(uint32_t (*folded)[2], const row_tile<R> &rows, const xq_side &side, const uint8_t *param,
                          const lane_place &place) {
    using wk = walk<KB, D>;
#pragma unroll
    for (int n = 0; n < wk::products; ++n) {
        uint2 scale = {}, zero = {};
        if (wk::has(n, place.t)) {
            load_four<PLAIN>(side, param, D, wk::row(n, place.t), scale, zero);
        }
        const uint2 query = rows.queries[n][place.lane];
        const uint2 x = make_uint2(as_bits(__hmul2(as_half2(query.x), as_half2(scale.x))),
                                   as_bits(__hmul2(as_half2(query.y), as_half2(scale.y))));
        folded[n][0] = even(x);
        folded[n][1] = odd(x);
    }
}

/* Sum of q times the zero points of one tile, over the member-th of n_shares shares of the channels. */
template <int D, int KB, bool PLAIN, int n_shares, int R>
__device__ void key_constant(float (&constant)[R], const row_tile<R> &rows, const xq_side &side, const uint8_t *param,
                             int member, const lane_place &place) {
    using wk = walk<KB, D>;
    // the products of the low part cover every channel once; q carries 2^-(B p), a sum for each plane takes it back
    constexpr int share = wk::low::products / n_shares, planes = wk::low::planes, bits = 8 / planes;
    constexpr int n_sums = planes < share ? planes : share; // of planes that follow each other
    float sum[n_sums][4] = {};
#pragma unroll
    for (int k = 0; k < share; ++k) {
        const int n = member * share + k;
        uint2 scale = {}, zero = {};
        if (wk::has(n, place.t)) {
            load_four<PLAIN>(side, param, D, wk::row(n, place.t), scale, zero);
        }
        const uint2 query = rows.queries[n][place.lane];
        multiply(sum[k % n_sums], zero.x, zero.x, zero.y, zero.y, query.x, query.y);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        constant[r] = 0.0f;
        for (int p = 0; p < n_sums; ++p) {
            constant[r] += sum[p][r] * (float)(1 << (bits * p));
        }
        constant[r] *= power_of_two(bits * (member * share % planes));
    }
}

/* The masks of a warp's share of a page, F16 [row][token], of tokens 32 chunk + 4 g .. + 3. */
template <int E, int R> struct page_masks {
    static constexpr int chunks = warp_place<E>::chunks;
    uint32_t at[R][2 * chunks];

    __device__ void load(const row_tile<R> &rows, int page, const warp_place<E> &warp) {
#pragma unroll
        for (int n = 0; n < chunks; ++n) {
            for (int r = 0; r < R; ++r) {
                const int cell = page * XQ_PAGE + 32 * warp.chunk(n) + 4 * warp.g;
                const uint2 x = rows.mask[r] ? *(const uint2 *)(rows.mask[r] + cell) : uint2{};
                at[r][2 * n] = x.x, at[r][2 * n + 1] = x.y;
            }
        }
    }
    /* Whether one of the warp's is not 0. */
    __device__ bool any() const {
        uint32_t all = 0;
#pragma unroll
        for (int k = 0; k < 2 * R * chunks; ++k) {
            all |= at[k % R][k / R];
        }
        return __any_sync(~0u, all != 0);
    }
};

/* The scores of a warp's share of a page, [row][4 chunk + token].  PLAIN: without the factor that codes and q still
 * wait for, and in `constant` this warp's share of what is the same for all tokens; else complete but for cap and
 * mask. */
template <int D, int KB, bool PLAIN, int E, int R, int N>
__device__ void page_scores(float (&s)[R][N], float (&constant)[R], const float (&factor)[R], const row_tile<R> &rows,
                            const page_in_shared &page, const warp_place<E> &warp) {
    using wk = walk<KB, D>;
    using place = warp_place<E>;
    uint32_t folded[wk::products][2];
    const int chunks_a_tile = PLAIN ? 4 : page.k.group / 32;
#pragma unroll
    for (int n = 0; n < place::chunks; ++n) {
        const int chunk = warp.chunk(n);
        if (n == 0 || (!PLAIN && chunk % chunks_a_tile == 0)) {
            const uint8_t *param = page.k_param() + chunk / chunks_a_tile * parameter_bytes(page.k, D);
            fold_keys<D, KB, PLAIN>(folded, rows, page.k, param, warp);
            key_constant<D, KB, PLAIN, PLAIN ? place::size : 1>(constant, rows, page.k, param, PLAIN ? warp.member : 0,
                                                                warp);
        }
        uint4 words[wk::steps];
        wk::load(words, page.k_codes(), chunk, warp);
        float y[2][4] = {};
        wk::add(y, words, folded);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float x = y[k / 4][k % 4];
            if (k % 2 < R) { // constants of each tile, if there are several
                s[k % 2][4 * n + k / 2] =
                    PLAIN ? x : x * factor[k % 2] + (constant[k % 2] * rows.factor[k % 2] + rows.absent[k % 2]);
            }
        }
    }
}

/* Shared memory of a team: p of a page, and what the block's warps know of a page's scores: the maximum and their share
 * of the constant, [warp][row]. */
template <typename VALUES, int R> struct team_room {
    typename VALUES::room p;
    float2 (*tops)[n_rows<R>];
};

/* Adds a page to `state`.  met(): called when the whole team has done with the page before. */
template <int D, int KB, typename VALUES, bool PLAIN, int E, int R, typename F>
__device__ void add_sealed_page(typename VALUES::state_of &state, const row_tile<R> &rows, const page_in_shared &page,
                                const team_room<VALUES, R> &room, const warp_place<E> &warp, const F &met) {
    using place = warp_place<E>;
    float s[R][4 * place::chunks], max[R], constant[R] = {}, factor[R];
    pending_scale<R> pending = {};
    for (int r = 0; r < R; ++r) {
        factor[r] = rows.factor[r] * code_unit;
    }
    page_scores<D, KB, PLAIN>(s, constant, factor, rows, page, warp);
    page_masks<E, R> masks = {};
    if (page.masked) {
        masks.load(rows, page.number, warp);
    }
    if (!PLAIN) {
        for (int r = 0; r < R; ++r) {
            constant[r] = 0.0f;
            pending.factor[r] = 1.0f;
        }
        finish_scores<false>(s, pending, rows, masks.at);
    } else if (page.masked) {
        mask_scores(s, factor, masks.at);
    }

    // the maximum and the constant of the whole page
    score_max(max, s);
    for (int r = 0; r < R && warp.g == 0; ++r) {
        room.tops[warp.first_warp() + warp.member][R * warp.t + r] = make_float2(max[r], constant[r]);
    }
    warp.meet();
    met();
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float2 all = make_float2(-INFINITY, 0.0f);
        for (int n = 0; n < place::size; ++n) {
            const float2 one = room.tops[warp.first_warp() + n][R * warp.t + r];
            all = make_float2(fmaxf(all.x, one.x), all.y + one.y);
        }
        if (PLAIN) {
            pending.factor[r] = factor[r];
            pending.constant[r] = all.y * rows.factor[r] + rows.absent[r];
        }
        max[r] = all.x * pending.factor[r] + pending.constant[r];
    }

    VALUES::store(state, s, pending, max, page, room.p, warp);
    warp.meet();
    VALUES::add(state, page, room.p, warp);
}

} // namespace

} // namespace xq
