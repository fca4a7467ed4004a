/* attend_open.cuh: online softmax of a warp over 16 tokens of an open page, whose rows are F16. */
#pragma once

#include "attend_page.cuh"

namespace xq {

namespace {

/* Tokens of an open page that a warp takes at a time. */
constexpr int piece = 16;

template <int R> using piece_p = half_p<piece, R>;
template <int E, int R> using open_state = softmax_state<half_sums<E / 32, R>>;

/* 16 tokens of an open page: F16 rows [token][D], [token][E], and the first one's cell of the stream. */
struct open_piece {
    const __half *k_rows, *v_rows;
    int first_cell;
};

/* Scores of a piece's tokens 2 g and 2 g + 1, [row][2], without cap and mask; these are rows g and g + 8 of operand A.
 */
template <int D, int KB, int R>
__device__ void open_scores(float (&s)[R][2], const row_tile<R> &rows, const uint2 (*k)[2], const lane_place &place) {
    using wk = walk<KB, D>; // q lies in the order of the codes
    constexpr int planes = wk::low::planes, bits = 8 / planes;
    float y[planes][4] = {};
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        const uint2 query = rows.queries[n][place.lane];
        multiply(y[n % planes], k[n][0].x, k[n][1].x, k[n][0].y, k[n][1].y, query.x, query.y);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        for (int w = 0; w < 2; ++w) {
            s[r][w] = 0.0f;
            for (int n = 0; n < planes; ++n) {
                s[r][w] += y[n][2 * w + r] * (float)(1 << (bits * n));
            }
        }
    }
}

/* Adds a piece to `state`; p: room of the warp. */
template <int D, int KB, bool PLAIN, int E, int R>
__device__ void add_open_piece(open_state<E, R> &state, const row_tile<R> &rows, const open_piece &at,
                               const piece_p<R> &p, const warp_place<E> &warp) {
    using wk = walk<KB, D>;
    const int g = warp.g, t = warp.t;
    uint2 k[wk::low::products][2], v[E / 32][4]; // v: [][token 4 t ..] channels 32 c + 4 g .. + 3
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        for (int w = 0; w < 2; ++w) {
            k[n][w] = wk::has(n, t) ? *(const uint2 *)(at.k_rows + (2 * g + w) * D + wk::row(n, t)) : uint2{};
        }
    }
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        for (int w = 0; w < 4; ++w) {
            v[c][w] = *(const uint2 *)(at.v_rows + (4 * t + w) * E + 32 * c + 4 * g);
        }
    }
    uint32_t mask[R][1];
    for (int r = 0; r < R; ++r) {
        mask[r][0] = rows.mask[r] ? *(const uint32_t *)(rows.mask[r] + at.first_cell + 2 * g) : 0;
    }
    float s[R][2], max[R];
    open_scores<D, KB>(s, rows, k, warp);
    pending_scale<R> pending, none;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        pending.factor[r] = rows.factor[r], pending.constant[r] = rows.absent[r];
        none.factor[r] = 1.0f, none.constant[r] = 0.0f;
    }
    finish_scores<PLAIN>(s, pending, rows, mask);
    score_max(max, s);
    raise_max(state, max);
    exponentiate(state, s, none);
    for (int r = 0; r < R; ++r) {
        *(uint32_t *)(p.row(R * t + r) + 2 * g) = halves(s[r][0], s[r][1]);
    }
    __syncwarp();
    const uint2 pb = *(const uint2 *)(p.row(row_of_column<R>(g)) + 4 * t);
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        const uint2(&x)[4] = v[c];
        multiply(state.sums.out[c][0], __byte_perm(x[0].x, x[1].x, 0x5410), __byte_perm(x[0].x, x[1].x, 0x7632),
                 __byte_perm(x[2].x, x[3].x, 0x5410), __byte_perm(x[2].x, x[3].x, 0x7632), pb.x, pb.y);
        multiply(state.sums.out[c][1], __byte_perm(x[0].y, x[1].y, 0x5410), __byte_perm(x[0].y, x[1].y, 0x7632),
                 __byte_perm(x[2].y, x[3].y, 0x5410), __byte_perm(x[2].y, x[3].y, 0x7632), pb.x, pb.y);
    }
    __syncwarp();
}

} // namespace

} // namespace xq
