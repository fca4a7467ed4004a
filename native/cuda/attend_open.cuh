/* attend_open.cuh: online softmax of a warp over 16 tokens of an open page, whose rows are F16. */
#pragma once

#include "attend_page.cuh"

namespace xq {

namespace {

/* Tokens of an open page that a warp takes at a time. */
constexpr int piece = 16;

template <int R> using piece_p = half_p<piece, R>;
template <int E, int R> using open_state = state<half_sums<E / 32, R>>;

/* Tokens 2 g and 2 g + 1 of the piece are rows g and g + 8 of operand A; k_rows, v_rows: of its first token. */
template <int D, int E, int KB, bool PLAIN, int R>
__device__ void open_piece(open_state<E, R> &st, const rows<R> &q, const folded_rows &qb, const __half *k_rows,
                           const __half *v_rows, int first_cell, const piece_p<R> &p, int lane) {
    using wk = walk<KB, D>; // q lies in the order of the codes
    constexpr int planes = wk::low::planes, bits = 8 / planes;
    const int g = lane / 4, t = lane % 4;
    uint2 x[wk::low::products][2],
        v[E / 32][4]; // v: [][token 4 t ..] channels 32 c + 4 g .. + 3
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        for (int w = 0; w < 2; ++w) {
            x[n][w] = wk::has(n, t) ? *(const uint2 *)(k_rows + (2 * g + w) * D + wk::row(n, t)) : uint2{};
        }
    }
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        for (int w = 0; w < 4; ++w) {
            v[c][w] = *(const uint2 *)(v_rows + (4 * t + w) * E + 32 * c + 4 * g);
        }
    }
    uint32_t mask[R][1];
    for (int r = 0; r < R; ++r) {
        mask[r][0] = q.mask[r] ? *(const uint32_t *)(q.mask[r] + first_cell + 2 * g) : 0;
    }
    float y[planes][4] = {};
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        const uint2 row = qb[n];
        multiply(y[n % planes], x[n][0].x, x[n][1].x, x[n][0].y, x[n][1].y, row.x, row.y);
    }
    float s[R][2], max[R];
    affine<R> to, same;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        for (int w = 0; w < 2; ++w) {
            s[r][w] = 0.0f;
            for (int n = 0; n < planes; ++n) {
                s[r][w] += y[n][2 * w + r] * (float)(1 << (bits * n));
            }
        }
        to.factor[r] = q.factor[r], to.constant[r] = q.absent[r];
        same.factor[r] = 1.0f, same.constant[r] = 0.0f;
    }
    finish_scores<PLAIN>(s, to, q, mask);
    score_max(max, s);
    raise_max(st, max);
    exponentiate(st, s, same);
    for (int r = 0; r < R; ++r) {
        *(uint32_t *)(p.row(R * t + r) + 2 * g) = halves(s[r][0], s[r][1]);
    }
    __syncwarp();
    const uint2 pb = *(const uint2 *)(p.row(row_of_column<R>(g)) + 4 * t);
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        const uint2(&x)[4] = v[c];
        multiply(st.sums.out[c][0], __byte_perm(x[0].x, x[1].x, 0x5410), __byte_perm(x[0].x, x[1].x, 0x7632),
                 __byte_perm(x[2].x, x[3].x, 0x5410), __byte_perm(x[2].x, x[3].x, 0x7632), pb.x, pb.y);
        multiply(st.sums.out[c][1], __byte_perm(x[0].y, x[1].y, 0x5410), __byte_perm(x[0].y, x[1].y, 0x7632),
                 __byte_perm(x[2].y, x[3].y, 0x5410), __byte_perm(x[2].y, x[3].y, 0x7632), pb.x, pb.y);
    }
    __syncwarp();
}

} // namespace

} // namespace xq
