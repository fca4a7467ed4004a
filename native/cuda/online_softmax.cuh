/* online_softmax.cuh: scores of one warp's pages to probabilities, in registers, in the layout of codes_mma.cuh's sums:
 * a lane holds query rows r = 2 t and 2 t + 1, and of every chunk of 32 tokens its tokens w = 4 g .. 4 g + 3.
 *
 *     m' = max(m, scores)     p = 2^(score - m')     sum, zero, out *= 2^(m - m')
 *
 * Scores use base 2.  PLAIN: no cap on the scores and no slope (ALiBi).
 */
#pragma once

#include "codes_mma.cuh"

#include <cmath>

namespace xq {

constexpr float log2e = 1.44269504f;

/* 2^x within 2^-22; 0 below the smallest normal number. */
__device__ inline float quick_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Running softmax of one warp over its pages; a lane holds query rows 2 t and 2 t + 1. */
template <int E> struct state {
    float max[2], sum[2], zero[2]; /* sum, zero: this lane's share */
    float out[E / 32][2][4];       /* in units of 2^-24 2^-13 2^exponent where codes are summed */
    int exponent;

    __device__ void clear() {
        exponent = -97;
        for (int r = 0; r < 2; ++r) {
            max[r] = -INFINITY;
            sum[r] = zero[r] = 0.0f;
        }
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            for (int k = 0; k < 8; ++k) {
                out[c][k / 4][k % 4] = 0.0f;
            }
        }
    }
    __device__ void scale(float row0, float row1) {
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            for (int k = 0; k < 8; ++k) { // out[.][.][0], [2]: query row 2 t; [1], [3]: 2 t + 1
                out[c][k / 4][k % 4] *= k % 2 == 0 ? row0 : row1;
            }
        }
    }
};

/* What a lane needs of the query rows. */
struct rows {
    const __half *mask[2]; /* of rows 2 t and 2 t + 1; null: none */
    float slope[2];        /* times log2 e */
    float softcap;         /* times log2 e */
    float factor[2];       /* of a product with the rounded q to a score of base 2 */
    float absent[2];       /* 0, or -inf for a row that does not exist */
};

/* The masks of a page, of rows 2 t and 2 t + 1 and tokens 32 c + 4 g .. + 3, which are read ahead. */
struct masks {
    uint2 at[4][2];

    __device__ void load(const rows &q, int page, int g) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            for (int r = 0; r < 2; ++r) {
                at[c][r] = q.mask[r] ? *(const uint2 *)(q.mask[r] + page * XQ_PAGE + 32 * c + 4 * g) : uint2{};
            }
        }
    }
};

/* Caps and masks scores of base 2, s [chunk][row][4]; row r's mask lies at mask[chunk][r]. */
template <int CHUNKS, bool PLAIN>
__device__ inline void finish_scores(float s[CHUNKS][2][4], const rows &q, const uint2 (*mask)[2]) {
    if (!PLAIN && q.softcap > 0.0f) {
#pragma unroll
        for (int k = 0; k < 8 * CHUNKS; ++k) {
            float &x = s[k / 8][k / 4 % 2][k % 4];
            x = x == -INFINITY ? x : q.softcap * tanhf(x / q.softcap);
        }
    }
    uint32_t any = 0;
#pragma unroll
    for (int k = 0; k < 2 * CHUNKS; ++k) {
        any |= mask[k / 2][k % 2].x | mask[k / 2][k % 2].y;
    }
    if (!__any_sync(~0u, any != 0)) {
        return;
    }
#pragma unroll
    for (int k = 0; k < 2 * CHUNKS; ++k) {
        const int c = k / 2, r = k % 2;
        const float2 m0 = __half22float2(as_half2(mask[c][r].x)), m1 = __half22float2(as_half2(mask[c][r].y));
        const float m[4] = {m0.x, m0.y, m1.x, m1.y};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            s[c][r][w] = m[w] == -INFINITY ? -INFINITY : s[c][r][w] + (PLAIN ? log2e : q.slope[r]) * m[w];
        }
    }
}

/* Maximum over the lanes that share t. */
__device__ inline float over_tokens(float x) {
    for (int step = 4; step < 32; step *= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    }
    return x;
}

/* s [chunk][row][4]: scores become 2^(score - maximum so far).  false: nothing was seen up to here. */
template <int CHUNKS, int E> __device__ inline bool softmax(state<E> &st, float s[CHUNKS][2][4]) {
    float max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        max[r] = s[0][r][0];
#pragma unroll
        for (int k = 1; k < 4 * CHUNKS; ++k) {
            max[r] = fmaxf(max[r], s[k / 4][r][k % 4]);
        }
        max[r] = fmaxf(st.max[r], over_tokens(max[r]));
    }
    if (__any_sync(~0u, max[0] > st.max[0] || max[1] > st.max[1])) {
        float alpha[2];
        for (int r = 0; r < 2; ++r) {
            alpha[r] = max[r] == -INFINITY ? 1.0f : quick_exp2(st.max[r] - max[r]);
            st.max[r] = max[r];
            st.sum[r] *= alpha[r];
            st.zero[r] *= alpha[r];
        }
        st.scale(alpha[0], alpha[1]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float base = max[r] == -INFINITY ? 0.0f : max[r];
#pragma unroll
        for (int k = 0; k < 4 * CHUNKS; ++k) {
            s[k / 4][r][k % 4] = quick_exp2(s[k / 4][r][k % 4] - base);
            st.sum[r] += s[k / 4][r][k % 4];
        }
    }
    return __any_sync(~0u, max[0] != -INFINITY || max[1] != -INFINITY);
}

} // namespace xq
