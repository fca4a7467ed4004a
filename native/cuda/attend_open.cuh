/* attend_open.cuh: online softmax of a warp over 16 tokens of an open page: F16 rows, or bytes, which become F16 as
 * they are loaded. */
#pragma once

#include "attend_page.cuh"

namespace xq {

namespace {

/* Tokens of an open page that a warp takes at a time. */
constexpr int piece = 16;

template <int R> using piece_p = half_p<piece, R>;
template <int E, int R> using open_state = softmax_state<half_sums<E / 32, R>>;

/* 16 tokens of an open page: [token][D], [token][E] of F16, or of bytes with parameters, of channels and of tokens; and
 * the first one's cell of the stream. */
struct open_piece {
    const void *k, *v;
    const __half *k_param, *v_param; /* scales; null: F16 */
    int first_cell;

    /* k, v: of the KV head; first: token of the page. */
    static __device__ open_piece of(const side_view &k, const side_view &v, int slot, int page, int first) {
        const int cell = page * XQ_PAGE + first;
        if (is_bytes(slot)) {
            const byte_page a = bytes_at(k, true, slot), b = bytes_at(v, false, slot);
            return {a.codes + first * a.width, b.codes + first * b.width, (const __half *)a.scale,
                    (const __half *)b.scale + first, cell};
        }
        return {open_rows(k, slot) + first * k.width, open_rows(v, slot) + first * v.width, nullptr, nullptr, cell};
    }
};

/* What a lane holds of a piece: of keys, the tokens 2 g and 2 g + 1, and of values, the tokens 4 t .. 4 t + 3 and
 * channels 32 c + 4 g .. + 3.  key(n, w), value(c, w): four channels as halves. */
template <int D, int KB, int E> struct half_piece {
    using wk = walk<KB, D>;
    uint2 k[wk::low::products][2], v[E / 32][4];

    __device__ half_piece(const open_piece &at, int g, int t) {
        const auto *k_rows = (const __half *)at.k, *v_rows = (const __half *)at.v;
#pragma unroll
        for (int n = 0; n < wk::low::products; ++n) {
            for (int w = 0; w < 2; ++w) {
                k[n][w] = wk::has(n, t) ? *(const uint2 *)(k_rows + (2 * g + w) * D + wk::row(n, t)) : uint2{};
            }
        }
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            for (int w = 0; w < 4; ++w) {
                v[c][w] = *(const uint2 *)(v_rows + (4 * t + w) * E + 32 * c + 4 * g);
            }
        }
    }
    __device__ uint2 key(int n, int w) const { return k[n][w]; }
    __device__ uint2 value(int c, int w) const { return v[c][w]; }
};

/* Bytes, which become halves when they are multiplied: registers are scarce before. */
template <int D, int KB, int E> struct byte_piece {
    using wk = walk<KB, D>;
    uint32_t k[wk::low::products][2], v[E / 32][4];
    const __half *k_scale;
    uint2 v_scale, v_centre;
    int t;

    __device__ byte_piece(const open_piece &at, int g, int t) : k_scale(at.k_param), t(t) {
        const auto *k_rows = (const uint8_t *)at.k, *v_rows = (const uint8_t *)at.v;
#pragma unroll
        for (int n = 0; n < wk::low::products; ++n) {
            for (int w = 0; w < 2; ++w) {
                k[n][w] = wk::has(n, t) ? *(const uint32_t *)(k_rows + (2 * g + w) * D + wk::row(n, t)) : 0;
            }
        }
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            for (int w = 0; w < 4; ++w) {
                v[c][w] = *(const uint32_t *)(v_rows + (4 * t + w) * E + 32 * c + 4 * g);
            }
        }
        v_scale = *(const uint2 *)(at.v_param + 4 * t);
        v_centre = *(const uint2 *)(at.v_param + XQ_PAGE + 4 * t);
    }
    __device__ uint2 key(int n, int w) const {
        if (!wk::has(n, t)) {
            return {};
        }
        const __half *scale = k_scale + wk::row(n, t);
        return widen_four(k[n][w], *(const uint2 *)scale, *(const uint2 *)(scale + D));
    }
    __device__ uint2 value(int c, int w) const {
        return widen_four(v[c][w], four_times(v_scale, w), four_times(v_centre, w));
    }
};

/* Scores of a piece's tokens 2 g and 2 g + 1, [row][2], without cap and mask; these are rows g and g + 8 of operand A.
 */
template <int D, int KB, int R, typename PIECE>
__device__ void open_scores(float (&s)[R][2], const row_tile<R> &rows, const PIECE &piece, const lane_place &place) {
    using wk = walk<KB, D>; // q lies in the order of the codes
    constexpr int planes = wk::low::planes, bits = 8 / planes;
    float y[planes][4] = {};
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        const uint2 query = rows.queries[n][place.lane];
        const uint2 k[2] = {piece.key(n, 0), piece.key(n, 1)};
        multiply(y[n % planes], k[0].x, k[1].x, k[0].y, k[1].y, query.x, query.y);
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
template <int D, int KB, bool PLAIN, typename PIECE, int E, int R>
__device__ void add_open_piece(open_state<E, R> &state, const row_tile<R> &rows, const open_piece &at,
                               const piece_p<R> &p, const warp_place<E> &warp) {
    const int g = warp.g, t = warp.t;
    const PIECE piece(at, g, t);
    uint32_t mask[R][1];
    for (int r = 0; r < R; ++r) {
        mask[r][0] = rows.mask[r] ? *(const uint32_t *)(rows.mask[r] + at.first_cell + 2 * g) : 0;
    }
    float s[R][2], max[R];
    open_scores<D, KB>(s, rows, piece, warp);
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
        const uint2 x[4] = {piece.value(c, 0), piece.value(c, 1), piece.value(c, 2), piece.value(c, 3)};
        multiply(state.sums.out[c][0], __byte_perm(x[0].x, x[1].x, 0x5410), __byte_perm(x[0].x, x[1].x, 0x7632),
                 __byte_perm(x[2].x, x[3].x, 0x5410), __byte_perm(x[2].x, x[3].x, 0x7632), pb.x, pb.y);
        multiply(state.sums.out[c][1], __byte_perm(x[0].y, x[1].y, 0x5410), __byte_perm(x[0].y, x[1].y, 0x7632),
                 __byte_perm(x[2].y, x[3].y, 0x5410), __byte_perm(x[2].y, x[3].y, 0x7632), pb.x, pb.y);
    }
    __syncwarp();
}

} // namespace

} // namespace xq
