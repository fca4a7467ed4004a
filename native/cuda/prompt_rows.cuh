/* prompt_rows.cuh: the rows of attention over F16 rows: queries come in, scores become weights, rows go out.
 *
 *     factor = 2^(top before - top)      weight = 2^(score - (top - 14))      sum = factor * sum before + weights
 *
 * with top the highest score of a row so far; a score is scale log2(e) q . k + log2(e) mask.
 *
 * Weights are rounded to halves for the product with values.  They count from 2^14 downwards, not from 1: one cell in a
 * hundred thousand that outweighs all others does not make those too small for a half.
 */
#pragma once

#include "prompt_shape.h"
#include "prompt_wgmma.cuh"

#include <cuda_fp16.h>

namespace xq {

constexpr int group_threads = 128, group_rows = 64; /* of a warpgroup */
constexpr int block_channels = 64, row_bytes = 128; /* of a block of a matrix, as prompt_wgmma.cuh has it */
constexpr float most_weight = 14.0f;                /* its exponent */

/* What a block does. */
struct prompt_work {
    int tile, part, head, stream; /* head: KV head */
    int first_page, end_page;
};

__device__ inline prompt_work work_of(const xq_rows_args &a, const prompt_shape &s) {
    const int part = blockIdx.x / s.n_tiles;
    const auto page_of = [&](int n) { return (int)((int64_t)a.n_kv_pages * n / s.n_parts); };
    return {(int)blockIdx.x % s.n_tiles,   part,          (int)blockIdx.y % a.n_head_kv,
            (int)blockIdx.y / a.n_head_kv, page_of(part), page_of(part + 1)};
}

/* A row of the query: which token and head it is. */
struct query_row {
    int token, head;
    bool exists;
};

__device__ inline query_row row_of(const xq_rows_args &a, const prompt_shape &s, const prompt_work &work, int row) {
    const int nth = work.tile * prompt_rows + row, last = a.n_tokens * s.n_rep - 1, safe = min(nth, last);
    return {safe / s.n_rep, work.head * s.n_rep + safe % s.n_rep, nth <= last};
}

/* The group's rows as halves, times all that a score is multiplied by; rows that do not exist are 0. */
template <int WIDTH>
__device__ inline void load_queries(__half *q, const xq_rows_args &a, const prompt_shape &s, const prompt_work &work,
                                    int first_row) {
    constexpr int pieces = WIDTH / 8; // of 16 bytes, of a row
    const float factor = a.scale * log2e;
    for (int i = threadIdx.x % group_threads; i < group_rows * pieces; i += group_threads) {
        const int row = first_row + i / pieces, c = i % pieces;
        const query_row from = row_of(a, s, work, row);
        __half2 x[4] = {};
        if (from.exists) {
            const char *at = (const char *)a.q + work.stream * a.q_stream_stride + from.token * a.q_token_stride +
                             from.head * a.q_head_stride;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float4 four = ((const float4 *)at)[2 * c + k];
                x[2 * k] = __floats2half2_rn(four.x * factor, four.y * factor);
                x[2 * k + 1] = __floats2half2_rn(four.z * factor, four.w * factor);
            }
        }
        const int block = c / 8, place = c % 8 ^ row % 8;
        *(uint4 *)((char *)q + (block * prompt_rows + row) * row_bytes + place * 16) = *(const uint4 *)x;
    }
    publish_shared();
}

__device__ inline float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* What a thread keeps of its two rows: their highest score and, of a quarter of the columns, the sum of weights. */
struct softmax_state {
    float top[2], sum[2];
};

/* Where a weight of 1 lies: weights are 2^(score - exponent). */
__device__ inline float exponent_of(float top) {
    return top - most_weight;
}

/* Adds the mask of a page to scores, which are of the rows of two tokens. */
__device__ inline void add_mask(float (&scores)[64], const __half *const (&mask)[2] /* of the lane's first cell */) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 two = __half22float2(*(const __half2 *)(mask[r] + 8 * j));
            scores[4 * j + 2 * r] = fmaf(two.x, log2e, scores[4 * j + 2 * r]);
            scores[4 * j + 2 * r + 1] = fmaf(two.y, log2e, scores[4 * j + 2 * r + 1]);
        }
    }
}

/* Scores become weights; factor: what all that was summed up before is to be multiplied by. */
__device__ inline void weigh(float (&scores)[64], softmax_state &state, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = state.top[r];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            top = fmaxf(top, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float highest = top == -INFINITY ? 0.0f : top, exponent = exponent_of(highest); // nothing was seen yet
        factor[r] = power_of_2(state.top[r] - highest);
        state.top[r] = top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float &x = scores[4 * j + 2 * r + k];
                x = power_of_2(x - exponent);
                sum += x;
            }
        }
        state.sum[r] = fmaf(state.sum[r], factor[r], sum);
    }
}

__device__ inline void to_halves(const float (&weights)[64], uint32_t (&p)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const __half2 two = __floats2half2_rn(weights[2 * i], weights[2 * i + 1]);
        p[i] = *(const uint32_t *)&two;
    }
}

/* What a row's sums are when all pages were seen: out, or the state of a part. */
template <int WIDTH>
__device__ inline void store_rows(const float (&out)[WIDTH / 2], const softmax_state &state, const xq_rows_args &a,
                                  const prompt_shape &s, const prompt_work &work, int row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = state.sum[r], factor = 1.0f;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const query_row to = row_of(a, s, work, row + 8 * r);
        if (!to.exists) {
            continue;
        }
        const float exponent = exponent_of(state.top[r]);
        const int64_t nth = ((int64_t)work.stream * a.n_tokens + to.token) * a.n_head + to.head;
        float *rows = a.out + nth * WIDTH;
        if (s.n_parts > 1) {
            const int64_t nth_of_all = work.part * s.n_rows + nth;
            rows = (float *)((char *)a.scratch + s.partial) + nth_of_all * WIDTH;
            if (lane % 4 == 0) {
                ((float2 *)((char *)a.scratch + s.states))[nth_of_all] = {exponent, sum};
            }
        } else {
            if (a.sinks) {
                const float sink = a.sinks[to.head] * log2e, top = fmaxf(exponent, sink);
                factor = power_of_2(exponent - top);
                sum = sum * factor + power_of_2(sink - top);
            }
            factor = sum > 0.0f ? factor / sum : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) {
            *(float2 *)(rows + 8 * j + lane % 4 * 2) = {out[4 * j + 2 * r] * factor, out[4 * j + 2 * r + 1] * factor};
        }
    }
}

} // namespace xq
