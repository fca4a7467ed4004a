/* join.cuh: the end of decode attention: the states of a block's teams, and of its warps over open pages, then those of
 * the parts of a row, to its output.
 *
 *     out = H sum_i w_i out_i / (sum_i w_i sum_i + 2^(sink - m))        w_i = 2^(max_i - m)
 *
 * H: the normalised Hadamard matrix if values were rotated; sums over open pages are brought to the space of sealed
 * ones by it.  Each block writes its rows' states; the last block of a group (KV head, tile of rows, stream) finishes
 * them, a warp each row.  `arrivals` counts blocks of each group and is 0 again afterwards.
 *
 * States in memory: out [part][token][head][E], then (max, sum) [part][token][head].
 */
#pragma once

#include "attend.cuh"
#include "attend_page.cuh"
#include "decode_shape.h"

namespace xq {

namespace {

constexpr int max_warps = 12, max_open = 8; /* of a block; of them, over open pages */

/* Over sealed pages; zero: to be added to every channel. */
template <int E> struct joined {
    float max[max_warps][n_rows]; /* of teams */
    float sum[max_warps][n_rows], zero[max_warps][n_rows];
    float out[1 /* n_teams */][n_rows][E + 4];
};
/* Of one warp, over open pages; at first, its p. */
template <int E> struct open_sums {
    float max[n_rows], sum[n_rows];
    float out[n_rows][E + 4];
};

template <int E> constexpr int joined_bytes(int n_teams) {
    return (int)sizeof(joined<E>) + (n_teams - 1) * (int)sizeof(joined<E>::out);
}

__device__ inline float4 channels_of(const float (&x)[2][4], int r) {
    return make_float4(x[0][r], x[0][2 + r], x[1][r], x[1][2 + r]);
}

/* A warp's state to shared memory. */
template <int E>
__device__ void store(joined<E> &all, sealed_state<E> &st, const float (&zero)[2], const team_warp<E> &warp, int lane) {
    const int g = lane / 4, t = lane % 4, nth = warp.first() + warp.member;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        for (int step = 4; step < 32; step *= 2) {
            st.sum[r] += __shfl_xor_sync(~0u, st.sum[r], step);
        }
        all.max[warp.number][2 * t + r] = st.max[r];
        all.sum[nth][2 * t + r] = st.sum[r];
        all.zero[nth][2 * t + r] = zero[r];
#pragma unroll
        for (int n = 0; n < warp.channel_chunks; ++n) {
            *(float4 *)&all.out[warp.number][2 * t + r][32 * warp.channel_chunk(n) + 4 * g] = channels_of(st.out[n], r);
        }
    }
}
template <int E> __device__ void store(open_sums<E> &all, state<E / 32> &st, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        for (int step = 4; step < 32; step *= 2) {
            st.sum[r] += __shfl_xor_sync(~0u, st.sum[r], step);
        }
        all.max[2 * t + r] = st.max[r];
        all.sum[2 * t + r] = st.sum[r];
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            *(float4 *)&all.out[2 * t + r][32 * c + 4 * g] = channels_of(st.out[c], r);
        }
    }
}

__device__ inline float warp_max_of(float x) {
    for (int step = 1; step < 32; step *= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    }
    return x;
}

/* What other blocks wrote. */
template <int N> __device__ void load_written(float (&x)[N], const float *from) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        const float2 y = __ldcg((const float2 *)(from + k));
        x[k] = y.x, x[k + 1] = y.y;
    }
}
template <int N> __device__ void load_shared(float (&x)[N], const float *from) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        const float2 y = *(const float2 *)(from + k);
        x[k] = y.x, x[k + 1] = y.y;
    }
}
template <int N> __device__ void store(float *to, const float (&x)[N]) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        *(float2 *)(to + k) = make_float2(x[k], x[k + 1]);
    }
}

/* Joins n states of a row: x gets the lane's channels, E / 32 lane .., of the sums; sum and top are the same on all
 * lanes.  load(y, i): these channels of state i; head_of(i): its maximum and sum. */
template <int E, int BATCH, typename L, typename H>
__device__ void join_states(float (&x)[E / 32], float &sum, float &top, int n, int lane, const L &load,
                            const H &head_of) {
    constexpr int width = E / 32;
    top = -INFINITY;
    sum = 0.0f;
    for (int k = 0; k < width; ++k) {
        x[k] = 0.0f;
    }
#pragma unroll 1
    for (int base = 0; base < n; base += BATCH) {
        float y[BATCH][width];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            load(y[k], min(base + k, n - 1));
        }
        const float2 head = lane < BATCH && base + lane < n ? head_of(base + lane) : make_float2(-INFINITY, 0.0f);
        const float max = warp_max_of(fmaxf(head.x, top));
        if (max == -INFINITY) {
            continue;
        }
        const float back = quick_exp2(top - max);
        const float weight = quick_exp2(head.x - max);
        sum = sum * back + weight * head.y; // this lane's share
        for (int k = 0; k < width; ++k) {
            x[k] *= back;
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const float w = __shfl_sync(~0u, weight, k);
            for (int j = 0; j < width; ++j) {
                x[j] += w * y[k][j];
            }
        }
        top = max;
    }
    for (int step = 1; step < 32; step *= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
    }
}

/* x [E] of a row, E / 32 each lane, *= Hadamard matrix, not normalised. */
template <int E> __device__ void transform_row(float (&x)[E / 32], int lane) {
    constexpr int width = E / 32;
    for (int bit = 1; bit < width; bit *= 2) {
        for (int k = 0; k < width; ++k) {
            if ((k & bit) == 0) {
                const float a = x[k], b = x[k | bit];
                x[k] = a + b;
                x[k | bit] = a - b;
            }
        }
    }
    for (int step = 1; step < 32; step *= 2) {
        for (int k = 0; k < width; ++k) {
            const float other = __shfl_xor_sync(~0u, x[k], step);
            x[k] = lane & step ? other - x[k] : x[k] + other;
        }
    }
}

/* Writes a row's output. */
template <int E>
__device__ void finish_row(float (&x)[E / 32], float sum, float top, const xq_cuda_layer &l,
                           const xq_cuda_attend_args &a, int64_t row, int head, int lane) {
    constexpr int width = E / 32;
    const float sink = a.sinks ? a.sinks[head] * log2e : -INFINITY;
    const float max = fmaxf(top, sink), weight = top == -INFINITY ? 0.0f : quick_exp2(top - max);
    const float total = sum * weight + (sink == -INFINITY ? 0.0f : quick_exp2(sink - max));
    if (l.plan.v.rotate) {
        transform_row<E>(x, lane);
    }
    const float factor = total > 0.0f ? weight / total * (l.plan.v.rotate ? rsqrtf((float)E) : 1.0f) : 0.0f;
    for (int k = 0; k < width; ++k) {
        x[k] *= factor;
    }
    store(a.out + row * E + width * lane, x);
}

/* Row r of a block: what its teams summed up, and what its warps did over open pages, null: none. */
template <int E>
__device__ void join_block(float (&x)[E / 32], float &sum, float &top, const joined<E> &all, const open_sums<E> *open,
                           const decode_call &c, bool rotate, int r, int lane) {
    constexpr int width = E / 32, size = team_warp<E>::size;
    join_states<E, max_warps / size>(
        x, sum, top, c.n_teams, lane,
        [&](float (&y)[width], int i) {
            load_shared(y, &all.out[i][r][width * lane]);
            float add = 0.0f;
            for (int k = 0; k < size; ++k) {
                add += all.zero[i * size + k][r];
            }
            for (int k = 0; k < width; ++k) {
                y[k] += add;
            }
        },
        [&](int i) {
            float of_team = 0.0f;
            for (int k = 0; k < size; ++k) {
                of_team += all.sum[i * size + k][r];
            }
            return make_float2(all.max[i][r], of_team);
        });
    if (!open) {
        return;
    }
    float y[width], open_sum, open_top;
    join_states<E, max_open>(
        y, open_sum, open_top, c.n_open, lane,
        [&](float (&z)[width], int i) { load_shared(z, &open[i].out[r][width * lane]); },
        [&](int i) { return make_float2(open[i].max[r], open[i].sum[r]); });
    if (rotate) {
        transform_row<E>(y, lane);
    }
    const float max = fmaxf(top, open_top), safe = max == -INFINITY ? 0.0f : max;
    const float weight = quick_exp2(top - safe), other = quick_exp2(open_top - safe);
    const float scaled = other * (rotate ? rsqrtf((float)E) : 1.0f);
    for (int k = 0; k < width; ++k) {
        x[k] = x[k] * weight + y[k] * scaled;
    }
    sum = sum * weight + open_sum * other;
    top = max;
}

/* Called by all threads of a block at its end.  first: the tile's first row of the KV head. */
template <int E>
__device__ void finish_rows(joined<E> &all, const open_sums<E> *open, sealed_state<E> &st, const float (&zero)[2],
                            const xq_cuda_layer &l, const xq_cuda_attend_args &a, const decode_call &c, int first,
                            int nth_stream, const team_warp<E> &of_team, int lane) {
    constexpr int width = E / 32;
    const int n_warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const int64_t n_all = (int64_t)a.n_streams * a.n_tokens * a.n_head; // rows of a part
    float *sums = a.partial, *heads = sums + a.n_parts * n_all * E;
    const auto row_of = [&](int r) {
        return (int64_t)(nth_stream * a.n_tokens + c.token_of(first + r)) * a.n_head + blockIdx.y * c.n_rep +
               c.rest_of(first + r);
    };
    __syncthreads();
    store(all, st, zero, of_team, lane);
    __syncthreads();
    float x[width], sum, top;
    const int n = min(n_rows, c.rows_of_head - first);
    for (int r = warp; r < n; r += n_warps) {
        join_block(x, sum, top, all, open, c, l.plan.v.rotate, r, lane);
        const int64_t row = row_of(r), nth = blockIdx.x * n_all + row;
        if (a.n_parts == 1) {
            finish_row<E>(x, sum, top, l, a, row, blockIdx.y * c.n_rep + c.rest_of(first + r), lane);
            continue;
        }
        store(sums + nth * E + width * lane, x);
        if (lane == 0) {
            *(float2 *)(heads + 2 * nth) = make_float2(top, sum);
        }
    }
    if (a.n_parts == 1) {
        return;
    }
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned last = a.n_parts - 1;
        __threadfence(); // the barrier's writes too
        is_last = atomicInc(a.arrivals + blockIdx.y + gridDim.y * blockIdx.z, last) == last;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) {
        return;
    }
    for (int r = warp; r < n; r += n_warps) {
        const int64_t row = row_of(r);
        join_states<E, 16>(
            x, sum, top, a.n_parts, lane,
            [&](float (&y)[width], int i) { load_written(y, sums + (i * n_all + row) * E + width * lane); },
            [&](int i) { return __ldcg((const float2 *)heads + i * n_all + row); });
        finish_row<E>(x, sum, top, l, a, row, blockIdx.y * c.n_rep + c.rest_of(first + r), lane);
    }
}

} // namespace

} // namespace xq
