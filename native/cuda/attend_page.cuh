/* attend_page.cuh: online softmax of a team of warps over a sealed page, for 4 R query rows.
 *
 * Of a sealed page, each warp of a team takes an equal share of the tokens to their scores, and, when all p are there,
 * an equal share of the channels to their sums: 64.  The team meets twice a page: for the maximum, and for p.
 *
 * q lies in the order of the codes (codes_mma.cuh), scaled by a power of two to below 1.
 */
#pragma once

#include "attend_values.cuh"
#include "stage.cuh"

namespace xq {

namespace {

/* q of a lane for each product, in shared memory: registers are scarce. */
struct folded_rows {
    const uint2 (*at)[32];
    int lane;

    __device__ uint2 operator[](int product) const { return at[product][lane]; }
};

/* Scale and zero point, code 0, of four channels, as halves. */
template <bool F16>
__device__ void load_four(const xq_side &side, const uint8_t *at, int n, int i, uint2 &scale, uint2 &zero) {
    if (F16 || side.param == XQ_PARAM_F16) {
        scale = *(const uint2 *)((const __half *)at + i);
        zero = *(const uint2 *)((const __half *)at + n + i);
        return;
    }
    float s[4], z[4];
    load_four(side, at, n, i, s, z);
    for (int w = 0; w < 4; ++w) {
        z[w] = fminf(fmaxf(z[w], -65504.0f), 65504.0f);
    }
    scale = make_uint2(halves(s[0], s[1]), halves(s[2], s[3]));
    zero = make_uint2(halves(z[0], z[1]), halves(z[2], z[3]));
}

/* b = q s for one tile of the page. */
template <int D, int KB, bool PLAIN>
__device__ void fold_keys(uint32_t (*b)[2], const folded_rows &qb, const xq_side &side, const uint8_t *param, int t) {
    using wk = walk<KB, D>;
#pragma unroll
    for (int n = 0; n < wk::products; ++n) {
        uint2 scale = {}, zero = {};
        if (wk::has(n, t)) {
            load_four<PLAIN>(side, param, D, wk::row(n, t), scale, zero);
        }
        const uint2 row = qb[n];
        const uint2 x = make_uint2(as_bits(__hmul2(as_half2(row.x), as_half2(scale.x))),
                                   as_bits(__hmul2(as_half2(row.y), as_half2(scale.y))));
        b[n][0] = even(x);
        b[n][1] = odd(x);
    }
}

/* Sum of q times the zero points of one tile, over the member-th of n_shares shares of the channels. */
template <int D, int KB, bool PLAIN, int n_shares, int R>
__device__ void key_constant(float (&constant)[R], const folded_rows &qb, const xq_side &side, const uint8_t *param,
                             int member, int t) {
    using wk = walk<KB, D>;
    // the products of the low part cover every channel once; q carries 2^-(B p), a sum for each plane takes it back
    constexpr int share = wk::low::products / n_shares, planes = wk::low::planes, bits = 8 / planes;
    constexpr int n_sums = planes < share ? planes : share; // of planes that follow each other
    float sum[n_sums][4] = {};
#pragma unroll
    for (int k = 0; k < share; ++k) {
        const int n = member * share + k;
        uint2 scale = {}, zero = {};
        if (wk::has(n, t)) {
            load_four<PLAIN>(side, param, D, wk::row(n, t), scale, zero);
        }
        const uint2 row = qb[n];
        multiply(sum[k % n_sums], zero.x, zero.x, zero.y, zero.y, row.x, row.y);
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

/* The masks of a warp's share of a page, of tokens 32 c + 4 g .. + 3. */
template <int E, int R> struct masks {
    static constexpr int chunks = team_warp<E>::chunks;
    uint32_t at[R][2 * chunks];

    __device__ void load(const rows<R> &q, int page, const team_warp<E> &warp, int g) {
#pragma unroll
        for (int n = 0; n < chunks; ++n) {
            for (int r = 0; r < R; ++r) {
                const uint2 x =
                    q.mask[r] ? *(const uint2 *)(q.mask[r] + page * XQ_PAGE + 32 * warp.chunk(n) + 4 * g) : uint2{};
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

/* shared: the page's parts as `at` says.  masked: whether this warp's masks are not all 0.  p: room of the team.  tops:
 * room for what the block's warps know of a page's scores, maximum and share of the constant.  met(): called when the
 * whole team has done with the page before. */
template <int D, int E, int KB, typename VALUES, bool PLAIN, int R, typename F>
__device__ void sealed_page(typename VALUES::state_of &st, const rows<R> &q, const folded_rows &qb, const xq_side &k,
                            const xq_side &v, const uint8_t *shared, const staged &at, int page, bool masked,
                            const typename VALUES::room &p, float2 (*tops)[n_rows<R>], const team_warp<E> &warp,
                            int lane, const F &met) {
    using wk = walk<KB, D>;
    using team = team_warp<E>;
    const int g = lane / 4, t = lane % 4;
    const uint8_t *k_param = shared + at.k_param, *v_param = shared + at.v_param;

    uint32_t b[wk::products][2];
    float s[R][4 * team::chunks], max[R], constant[R] = {}, factor[R];
    affine<R> to = {};
    for (int r = 0; r < R; ++r) {
        factor[r] = q.factor[r] * code_unit;
    }
    const int chunks_a_tile = PLAIN ? 4 : k.group / 32;
#pragma unroll
    for (int n = 0; n < team::chunks; ++n) {
        const int c = warp.chunk(n);
        if (n == 0 || (!PLAIN && c % chunks_a_tile == 0)) {
            const uint8_t *param = k_param + c / chunks_a_tile * parameter_bytes(k, D);
            fold_keys<D, KB, PLAIN>(b, qb, k, param, t);
            key_constant<D, KB, PLAIN, PLAIN ? team::size : 1>(constant, qb, k, param, PLAIN ? warp.member : 0, t);
        }
        uint4 words[wk::steps];
        wk::load(words, shared, c, lane);
        float y[2][4] = {};
        wk::add(y, words, b);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float x = y[k / 4][k % 4];
            if (k % 2 < R) { // constants of each tile, if there are several
                s[k % 2][4 * n + k / 2] =
                    PLAIN ? x : x * factor[k % 2] + (constant[k % 2] * q.factor[k % 2] + q.absent[k % 2]);
            }
        }
    }
    masks<E, R> mask = {};
    if (masked) {
        mask.load(q, page, warp, g);
    }
    if (!PLAIN) {
        for (int r = 0; r < R; ++r) {
            constant[r] = 0.0f;
            to.factor[r] = 1.0f;
        }
        finish_scores<false>(s, to, q, mask.at);
    } else if (masked) {
        mask_scores(s, factor, mask.at);
    }
    score_max(max, s);
    for (int r = 0; r < R && g == 0; ++r) {
        tops[warp.first() + warp.member][R * t + r] = make_float2(max[r], constant[r]);
    }
    warp.meet();
    met();
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float2 all = make_float2(-INFINITY, 0.0f);
        for (int n = 0; n < team::size; ++n) {
            const float2 one = tops[warp.first() + n][R * t + r];
            all = make_float2(fmaxf(all.x, one.x), all.y + one.y);
        }
        if (PLAIN) {
            to.factor[r] = factor[r];
            to.constant[r] = all.y * q.factor[r] + q.absent[r];
        }
        max[r] = all.x * to.factor[r] + to.constant[r];
    }
    VALUES::store(st, s, to, max, v, v_param, p, warp, lane);
    warp.meet();
    VALUES::add(st, shared + at.v_codes, v_param, p, warp, lane);
}

} // namespace

} // namespace xq
