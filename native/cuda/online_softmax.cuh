/* online_softmax.cuh: scores of pages to probabilities, in registers, in the layout of codes_mma.cuh's sums: a lane
 * holds query rows R t .. R t + R - 1, R = 1 or 2, and of every chunk of 32 tokens its tokens 4 g .. 4 g + 3.
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

/* Running softmax over pages, R query rows and the channels that SUMS holds. */
template <typename SUMS> struct softmax_state {
    static constexpr int R = SUMS::rows;
    float max[R], sum[R], zero[R]; /* sum, zero, p times zero points: this lane's share */
    SUMS sums;

    __device__ void clear() {
        for (int r = 0; r < R; ++r) {
            max[r] = -INFINITY;
            sum[r] = zero[r] = 0.0f;
        }
        sums = {};
    }
    __device__ void scale(int r, float by) {
        zero[r] *= by;
#pragma unroll
        for (int c = 0; c < SUMS::chunks; ++c) {
            for (int k = 0; k < 4; ++k) {
                sums.at(c, r, k) *= by;
            }
        }
    }
};

/* Query rows of a tile, which lie in shared memory, for registers are scarce, and what a lane keeps of its own R. */
template <int R> struct row_tile {
    const uint2 (*queries)[32]; /* [product][lane]: four channels of q as halves, in the order of the codes */
    const __half *mask[R];      /* [cell]; null: none */
    float slope[R];             /* times log2 e */
    float softcap;              /* times log2 e */
    float factor[R];            /* of a product with the rounded q to a score of base 2; above 0 */
    float absent[R];            /* 0, or -inf for a row that does not exist */
};

/* Scores of base 2, s [row][N], that are still to be multiplied by a factor and moved by a constant. */
template <int R> struct pending_scale {
    float factor[R], constant[R];
};

/* N masks of a row, as many as fit into words. */
template <int N> __device__ inline float mask_of(const uint32_t (&mask)[N / 2], int k) {
    const float2 two = __half22float2(as_half2(mask[k / 2]));
    return k % 2 == 0 ? two.x : two.y;
}

/* Caps and masks N scores of each row; mask: F16 [row][N], as many as fit into words. */
template <bool PLAIN, int R, int N>
__device__ inline void finish_scores(float (&s)[R][N], const pending_scale<R> &pending, const row_tile<R> &rows,
                                     const uint32_t (&mask)[R][N / 2]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float x = s[r][k] * pending.factor[r] + pending.constant[r];
            if (!PLAIN && rows.softcap > 0.0f) {
                x = x == -INFINITY ? x : rows.softcap * tanhf(x / rows.softcap);
            }
            const float m = mask_of<N>(mask[r], k);
            s[r][k] = m == -INFINITY ? -INFINITY : x + (PLAIN ? log2e : rows.slope[r]) * m;
        }
    }
}

/* Masks N scores of each row before they are multiplied by a factor. */
template <int R, int N>
__device__ inline void mask_scores(float (&s)[R][N], const float (&factor)[R], const uint32_t (&mask)[R][N / 2]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const float unit = log2e / factor[r];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float m = mask_of<N>(mask[r], k);
            s[r][k] = m == -INFINITY ? -INFINITY : m == 0.0f ? s[r][k] : s[r][k] + m * unit;
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

/* Likewise their sum. */
__device__ inline float sum_over_tokens(float x) {
    for (int step = 4; step < 32; step *= 2) {
        x += __shfl_xor_sync(~0u, x, step);
    }
    return x;
}

/* Maximum of N scores of each row, over the warp. */
template <int R, int N> __device__ inline void score_max(float (&max)[R], const float (&s)[R][N]) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
        max[r] = s[r][0];
#pragma unroll
        for (int k = 1; k < N; ++k) {
            max[r] = fmaxf(max[r], s[r][k]);
        }
        max[r] = over_tokens(max[r]);
    }
}

/* Raises the running maximum of each row to at least max. */
template <typename SUMS, int R> __device__ inline void raise_max(softmax_state<SUMS> &state, const float (&max)[R]) {
    if (__any_sync(~0u, max[0] > state.max[0] || max[R - 1] > state.max[R - 1])) {
        for (int r = 0; r < R; ++r) {
            const float top = fmaxf(state.max[r], max[r]);
            const float alpha = top == -INFINITY ? 1.0f : quick_exp2(state.max[r] - top);
            state.max[r] = top;
            state.sum[r] *= alpha;
            state.scale(r, alpha);
        }
    }
}

/* s [N] = 2^(s factor + constant); their sum. */
template <int N> __device__ inline float exponentiate(float (&s)[N], float factor, float constant) {
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < N; ++k) {
        s[k] = quick_exp2(s[k] * factor + constant);
        sum[k % 2] += s[k];
    }
    return sum[0] + sum[1];
}

/* s [row][N]: scores become 2^(score - maximum so far). */
template <typename SUMS, int R, int N>
__device__ inline void exponentiate(softmax_state<SUMS> &state, float (&s)[R][N], const pending_scale<R> &pending) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const float safe = state.max[r] == -INFINITY ? 0.0f : state.max[r];
        state.sum[r] += exponentiate(s[r], pending.factor[r], pending.constant[r] - safe);
    }
}

} // namespace xq
