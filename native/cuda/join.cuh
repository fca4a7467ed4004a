/* join.cuh: the end of decode attention: the states of a block's teams, and of its warps over open pages, then those of
 * the parts of a row, to its output.
 *
 *     out = sum_i w_i H_i out_i / (sum_i w_i sum_i + 2^(sink - m))        w_i = 2^(max_i - m)
 *
 * H_i: the normalised Hadamard matrix for sums over sealed pages whose values were rotated, else 1.  Each block writes
 * its rows' states; the last block of a group (KV head, tile of rows, stream) finishes them, a warp each row.
 * `arrivals` counts blocks of each group and is 0 again afterwards.
 *
 * Loops here are short code, not fast code: in a model the layers' weights have passed through the caches since it last
 * ran, and each instruction on the way takes longer to come than to run.
 *
 * States in memory: out [part][token][head][E], then (max, sum) [part][token][head].
 */
#pragma once

#include "attend_open.cuh"
#include "decode_shape.h"

namespace xq {

namespace {

constexpr int max_open = 8; /* warps of a block over open pages */

/* What a team, or a warp over open pages, sums up.  A warp's p of open pages lies there at first. */
template <int E, int R> struct sums {
    float2 head[n_rows<R>]; /* maximum, sum of p */
    float out[n_rows<R>][E + 4];
};

template <typename SUMS> __device__ float4 channels_of(SUMS &x, int c, int r, float add) {
    return make_float4(x.at(c, r, 0) + add, x.at(c, r, 1) + add, x.at(c, r, 2) + add, x.at(c, r, 3) + add);
}

/* A team's state to shared memory; zero: this warp's share of what is added to every channel.  shares: room for each
 * warp of the block. */
template <int E, int R, typename STATE>
__device__ void store_state(sums<E, R> &all, STATE &state, const float (&zero)[R], float2 (*shares)[n_rows<R>],
                            const warp_place<E> &warp) {
    const int g = warp.g, t = warp.t;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        for (int step = 4; step < 32; step *= 2) {
            state.sum[r] += __shfl_xor_sync(~0u, state.sum[r], step);
        }
        if (g == 0) {
            shares[warp.first_warp() + warp.member][R * t + r] = make_float2(state.sum[r], zero[r]);
        }
    }
    warp.meet();
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float2 total = shares[warp.first_warp()][R * t + r];
        for (int k = 1; k < warp.size; ++k) {
            const float2 other = shares[warp.first_warp() + k][R * t + r];
            total.x += other.x, total.y += other.y;
        }
        all.head[R * t + r] = make_float2(state.max[r], total.x);
#pragma unroll
        for (int n = 0; n < warp.channel_chunks; ++n) {
            *(float4 *)&all.out[R * t + r][32 * warp.channel_chunk(n) + 4 * g] = channels_of(state.sums, n, r, total.y);
        }
    }
}
template <int E, int R> __device__ void store_state(sums<E, R> &all, open_state<E, R> &state, const lane_place &place) {
    const int g = place.g, t = place.t;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        for (int step = 4; step < 32; step *= 2) {
            state.sum[r] += __shfl_xor_sync(~0u, state.sum[r], step);
        }
        all.head[R * t + r] = make_float2(state.max[r], state.sum[r]);
#pragma unroll
        for (int c = 0; c < E / 32; ++c) {
            *(float4 *)&all.out[R * t + r][32 * c + 4 * g] = channels_of(state.sums, c, r, 0.0f);
        }
    }
}

__device__ inline float warp_max_of(float x) {
    for (int step = 1; step < 32; step *= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    }
    return x;
}

template <int N> __device__ void store_channels(float *to, const float (&x)[N]) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        *(float2 *)(to + k) = make_float2(x[k], x[k + 1]);
    }
}

/* Joins n states of a row: x gets the lane's channels, E / 32 lane .., of the sums; sum and top are the same on all
 * lanes.  out, head: of the first state; steps: elements from one to the next.  BY_OTHERS: other blocks wrote them to
 * memory, so that several are to be on their way at a time; else they lie in shared memory. */
template <int E, bool BY_OTHERS>
__device__ void join_states(float (&x)[E / 32], float &sum, float &top, const float *out, int64_t step_out,
                            const float2 *head, int64_t step_head, int n, int lane) {
    constexpr int width = E / 32, at_a_time = BY_OTHERS ? 8 : 1;
    out += width * lane;
    top = -INFINITY;
    sum = 0.0f;
    for (int k = 0; k < width; ++k) {
        x[k] = 0.0f;
    }
#pragma unroll 1
    for (int base = 0; base < n; base += 32) {
        float2 mine = make_float2(-INFINITY, 0.0f);
        if (base + lane < n) {
            const float2 *at = head + (base + lane) * step_head;
            mine = BY_OTHERS ? __ldcg(at) : *at;
        }
        const float max = warp_max_of(fmaxf(mine.x, top)), safe = max == -INFINITY ? 0.0f : max;
        const float back = quick_exp2(top - safe), weight = quick_exp2(mine.x - safe);
        sum = sum * back + weight * mine.y; // this lane's share
        for (int k = 0; k < width; ++k) {
            x[k] *= back;
        }
        const int length = min(n - base, 32);
#pragma unroll at_a_time
        for (int k = 0; k < length; ++k, out += step_out) {
            const float w = __shfl_sync(~0u, weight, k);
#pragma unroll
            for (int j = 0; j < width; j += 2) {
                const float2 y = BY_OTHERS ? __ldcg((const float2 *)(out + j)) : *(const float2 *)(out + j);
                x[j] += w * y.x;
                x[j + 1] += w * y.y;
            }
        }
        top = max;
    }
    for (int step = 1; step < 32; step *= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
    }
}

/* x [E] of a row, E / 32 each lane, *= normalised Hadamard matrix. */
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
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) {
        for (int k = 0; k < width; ++k) {
            const float other = __shfl_xor_sync(~0u, x[k], step);
            x[k] = lane & step ? other - x[k] : x[k] + other;
        }
    }
    for (int k = 0; k < width; ++k) {
        x[k] *= rsqrtf((float)E);
    }
}

/* Writes a row's output, [E] at `out`. */
template <int E>
__device__ void finish_row(float (&x)[E / 32], float sum, float top, const float *sinks, int head, float *out,
                           int lane) {
    constexpr int width = E / 32;
    const float sink = sinks ? sinks[head] * log2e : -INFINITY;
    const float max = fmaxf(top, sink), weight = top == -INFINITY ? 0.0f : quick_exp2(top - max);
    const float total = sum * weight + (sink == -INFINITY ? 0.0f : quick_exp2(sink - max));
    const float factor = total > 0.0f ? weight / total : 0.0f;
    for (int k = 0; k < width; ++k) {
        x[k] *= factor;
    }
    store_channels(out + width * lane, x);
}

/* Row r of a block: what its teams summed up, and what its warps did over open pages, null: none. */
template <int E, int R>
__device__ void join_block(float (&x)[E / 32], float &sum, float &top, const sums<E, R> *teams, const sums<E, R> *open,
                           const decode_shape &shape, bool rotate, int r, int lane) {
    constexpr int step = sizeof(sums<E, R>) / sizeof(float);
    join_states<E, false>(x, sum, top, teams->out[r], step, &teams->head[r], step / 2, shape.n_teams, lane);
    if (rotate) {
        transform_row<E>(x, lane);
    }
    if (!open) {
        return;
    }
    float y[E / 32], open_sum, open_top;
    join_states<E, false>(y, open_sum, open_top, open->out[r], step, &open->head[r], step / 2, shape.n_open, lane);
    const float max = fmaxf(top, open_top), safe = max == -INFINITY ? 0.0f : max;
    const float weight = quick_exp2(top - safe), other = quick_exp2(open_top - safe);
    for (int k = 0; k < E / 32; ++k) {
        x[k] = x[k] * weight + y[k] * other;
    }
    sum = sum * weight + open_sum * other;
    top = max;
}

/* Whether this block is the last of its group to come here; its writes, and those of blocks before it, are in memory.
 * Called by all threads. */
__device__ inline bool arrives_last(uint32_t *arrivals, int n_parts) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned last = n_parts - 1;
        __threadfence(); // the barrier's writes too
        is_last = last == 0 || atomicInc(arrivals + blockIdx.y + gridDim.y * blockIdx.z, last) == last;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

/* The end of a block, called by all its threads. */
template <int E, int R>
__device__ void finish_rows(sums<E, R> *teams, const sums<E, R> *open, bool rotate, const xq_attend_args &args,
                            const decode_call &call, const block_task &task, int lane) {
    const int n_warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const int64_t n_all = (int64_t)args.n_streams * args.n_tokens * args.n_head; // rows of a part
    float *out = args.partial;
    auto *heads = (float2 *)(out + args.n_parts * n_all * E);
    const auto head_of = [&](int r) { return task.head * call.n_rep + call.rest_of(task.first_row + r); };
    const auto row_of = [&](int r) {
        return (task.nth_stream * args.n_tokens + call.token_of(task.first_row + r)) * args.n_head + head_of(r);
    };
    float x[E / 32], sum, top;
    const int n = min(n_rows<R>, call.rows_of_head - task.first_row);
#pragma unroll 1
    for (int r = warp; r < n; r += n_warps) {
        join_block(x, sum, top, teams, open, call.shape, rotate, r, lane);
        const int64_t nth = task.part * n_all + row_of(r);
        store_channels(out + nth * E + E / 32 * lane, x);
        if (lane == 0) {
            heads[nth] = make_float2(top, sum);
        }
    }
    if (!arrives_last(args.arrivals, args.n_parts)) {
        return;
    }
#pragma unroll 1
    for (int r = warp; r < n; r += n_warps) {
        const int64_t row = row_of(r);
        join_states<E, true>(x, sum, top, out + row * E, n_all * E, heads + row, n_all, args.n_parts, lane);
        finish_row<E>(x, sum, top, args.sinks, head_of(r), args.out + row * E, lane);
    }
}

} // namespace

} // namespace xq
