/* wide_softmax.cuh: online softmax of a team of W warps over a page, for 8 NT query rows.
 *
 *     m' = max(m, scores)     p = 2^(score - m')     sum, zero, out *= 2^(m - m')          m' = m if it grew little
 *
 * A lane has N tokens of a page, first + 0 .. N - 1, and of every tile of eight query rows 2 t and 2 t + 1: its rows
 * r = 0 .. 2 NT - 1.  Scores use base 2.
 */
#pragma once

#include "wide_codes.cuh"

namespace xq {

namespace {

/* Sums are scaled anew only when a maximum has grown by `slack`: till then p is below 2^slack.  It is stored times
 * 2^p_bits: no product with a scale is beyond F16. */
constexpr float slack = 3.0f;
constexpr int p_bits = 11;

template <int NT> constexpr int wide_rows = 8 * NT;

/* What a block knows of its query rows, in shared memory. */
template <int NT> struct wide_tile {
    float factor[wide_rows<NT>];       /* of a product with the rounded q to a score of base 2 */
    float slope[wide_rows<NT>];        /* times log2 e */
    const __half *mask[wide_rows<NT>]; /* [cell]; null: none */
};

/* The order of floats as that of integers, and back. */
__device__ inline int ordered(int bits) {
    return bits ^ (bits >> 31 & 0x7fffffff);
}

/* The row that a lane's r-th is. */
__device__ inline int row_of(int r, int t) {
    return r / 2 * 8 + 2 * t + r % 2;
}

/* Sums of a lane over pages of one kind: out [tile][.][k], columns as products give them: row k % 2 of two rows. */
template <int T, int NT> struct wide_state {
    float out[T][NT][4];
    float zero[NT][4]; /* p times zero points: groups of values in two rows, or, for the whole head, [0] and [1] */
    float max[2 * NT], sum[2 * NT];
    int exponent; /* of the unit of sums over values */

    __device__ void clear() {
        for (int nt = 0; nt < NT; ++nt) {
            for (int k = 0; k < 4; ++k) {
                for (int i = 0; i < T; ++i) {
                    out[i][nt][k] = 0.0f;
                }
                zero[nt][k] = 0.0f;
            }
        }
        for (int r = 0; r < 2 * NT; ++r) {
            max[r] = -INFINITY;
            sum[r] = 0.0f;
        }
        exponent = least_exponent;
    }
    __device__ void scale(const float (&by)[2 * NT]) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int i = 0; i < T; ++i) {
                    out[i][nt][k] *= by[2 * nt + k % 2];
                }
                zero[nt][k] *= by[2 * nt + k % 2];
            }
        }
    }
    /* Makes place for values of up to 2^(new exponent + 1). */
    __device__ void raise_exponent(int to) {
        if (to > exponent) {
            float by[2 * NT];
            for (int r = 0; r < 2 * NT; ++r) {
                by[r] = power_of_two(::max(exponent - to, -126));
            }
            scale(by);
            exponent = to;
        }
    }
};

/* The masks of a lane's tokens of a page.  one: all rows are of one token, and have the first one's.  Nothing is done
 * with what is loaded before it is needed. */
template <int N, int NT> struct wide_masks {
    uint32_t at[2 * NT][N / 2];
    bool one;

    __device__ void load(const wide_tile<NT> &tile, int first_cell, int t) {
#pragma unroll
        for (int r = 0; r < 2 * NT; ++r) {
            if (r == 0 || !one) {
                const __half *mask = tile.mask[one ? 0 : row_of(r, t)];
                if constexpr (N == 4) {
                    const uint2 x = mask ? *(const uint2 *)(mask + first_cell) : uint2{};
                    at[r][0] = x.x, at[r][N / 2 - 1] = x.y;
                } else {
                    at[r][0] = mask ? *(const uint32_t *)(mask + first_cell) : 0;
                }
            }
        }
    }
    /* The k-th word of row r. */
    __device__ uint32_t word(int r, int k) const { return one ? at[0][k] : at[r][k]; }
    /* Whether one of the warp's is not 0. */
    __device__ bool any() const {
        uint32_t all = 0;
#pragma unroll
        for (int r = 0; r < 2 * NT; ++r) {
            for (int k = 0; k < N / 2; ++k) {
                all |= word(r, k);
            }
        }
        return __any_sync(~0u, all != 0);
    }
};

/* Caps and masks scores s [token][r]. */
template <int N, int NT>
__device__ void finish_wide_scores(float (&s)[N][2 * NT], const wide_masks<N, NT> &masks, const wide_tile<NT> &tile,
                                   float softcap /* times log2 e */, int t) {
    if (softcap > 0.0f) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            for (int r = 0; r < 2 * NT; ++r) {
                s[k][r] = softcap * tanhf(s[k][r] / softcap);
            }
        }
    }
    if (!masks.any()) {
        return;
    }
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        const float slope = tile.slope[row_of(r, t)];
        uint32_t words[N / 2];
        for (int k = 0; k < N / 2; ++k) {
            words[k] = masks.word(r, k);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float m = mask_of<N>(words, k);
            s[k][r] = m == -INFINITY ? -INFINITY : s[k][r] + slope * m;
        }
    }
}

/* Before the first page; the team meets before it is looked at. */
template <int NT> __device__ void clear_tops(int *tops, int nth_thread) {
    if (nth_thread < wide_rows<NT>) {
        tops[nth_thread] = ordered(__float_as_int(-INFINITY));
    }
}

/* Scores of a page become p.  tops: maxima of all rows so far, as ordered() has them; the team meets in here. */
template <int N, int T, int NT, int W>
__device__ void exponentiate_page(wide_state<T, NT> &state, float (&s)[N][2 * NT], int *tops,
                                  const wide_place<W> &place) {
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        float max = s[0][r];
        for (int k = 1; k < N; ++k) {
            max = fmaxf(max, s[k][r]);
        }
        max = over_tokens(max);
        if (place.g == 0) {
            atomicMax(tops + row_of(r, place.t), ordered(__float_as_int(max)));
        }
    }
    place.meet();
    float top[2 * NT];
    bool grows = false;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const int2 x = *(const int2 *)(tops + row_of(2 * nt, place.t));
        top[2 * nt] = __int_as_float(ordered(x.x)), top[2 * nt + 1] = __int_as_float(ordered(x.y));
        grows |= top[2 * nt] > state.max[2 * nt] + slack || top[2 * nt + 1] > state.max[2 * nt + 1] + slack;
    }
    if (__any_sync(~0u, grows)) {
        float by[2 * NT];
#pragma unroll
        for (int r = 0; r < 2 * NT; ++r) {
            by[r] = top[r] == -INFINITY ? 1.0f : quick_exp2(state.max[r] - top[r]);
            state.max[r] = top[r];
            state.sum[r] *= by[r];
        }
        state.scale(by);
    }
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        const float safe = state.max[r] == -INFINITY ? 0.0f : state.max[r];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            s[k][r] = quick_exp2(s[k][r] - safe);
            state.sum[r] += s[k][r];
        }
    }
}

/* Where a lane's p lie, and what plane of the codes they are multiplied with takes off. */
template <int NT> struct p_place {
    int even, odd; /* of rows 2 t and 2 t + 1 */
    float weight;

    /* part: of the codes; token: the first of the lane's, of the page. */
    static __device__ p_place of(const code_part &part, int token, int t) {
        const int log = 31 - __clz(part.planes), quad = token / 4, unit = quad >> log;
        const int n = unit / 4 * part.planes + (quad & (part.planes - 1)), lane = 8 * t + unit % 4;
        return {n * product_bytes<NT> + place_of_p<NT>(n, lane), n * product_bytes<NT> + place_of_p<NT>(n, lane + 4),
                weight_of_quad(part, quad)};
    }
    __device__ int at(int r) const { return (r % 2 == 0 ? even : odd) + r / 2 * 8; }
};

/* Stores x [token][r] * by[token] as halves. */
template <int N, int NT>
__device__ void store_p(uint8_t *p, const p_place<NT> &to, const float (&x)[N][2 * NT], const float (&by)[N], int g) {
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        float y[N];
        for (int k = 0; k < N; ++k) {
            y[k] = x[k][r] * by[k];
        }
        if constexpr (N == 4) {
            *(uint2 *)(p + to.at(r)) = make_uint2(halves(y[0], y[2]), halves(y[1], y[3]));
        } else { // the first or second two tokens of a quad
            auto *at = (__half *)(p + to.at(r)) + g % 2;
            at[0] = __float2half_rn(y[0]);
            at[2] = __float2half_rn(y[1]);
        }
    }
}

} // namespace

} // namespace xq
