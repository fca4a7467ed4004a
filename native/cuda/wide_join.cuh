/* wide_join.cuh: the end of the wide kernel: the states of a block's teams to memory.
 *
 *     out = H sum_i w_i sealed_i + sum_i w_i open_i        sum = sum_i w_i sum_i        w_i = 2^(max_i - max)
 *
 * H: the normalised Hadamard matrix if values were rotated, else 1.
 *
 * A state in shared memory, in place of a team's pages: (max, sum) [row], then [row][E + 4]: sums over its sealed
 * pages, and behind it, if it took any, over open ones.  In memory: out [part][stream][token][head][E], then (max, sum)
 * [part][stream][token][head].
 */
#pragma once

#include "wide_team.cuh"

namespace xq {

namespace {

/* Sums of values that a row of a state has, and its numbers from row to row. */
XQ_BOTH int state_row(int width) {
    return width + 4;
}
template <int NT> XQ_BOTH int state_bytes(int width) {
    return 8 * NT * (8 + 4 * state_row(width));
}
template <int NT> __device__ float *state_values(uint8_t *state, int row, int width) {
    return (float *)(state + 64 * NT) + row * state_row(width);
}

/* The sums of a team in place of its own: of p, and of `zero` times it.  By the whole team, which meets in here. */
template <int W, int T, int NT, bool LATENT>
__device__ void total_over_team(wide_state<T, NT> &state, const wide_team<W, T, NT, LATENT> &team, bool with_zero) {
    const auto &place = team.place;
    float2 *shares = team.shares();
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        float sum = state.sum[r], zero = with_zero ? state.zero[r / 2][r % 2] : 0.0f;
        for (int step = 4; step < 32; step *= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
            zero += __shfl_xor_sync(~0u, zero, step);
        }
        if (place.g == 0) {
            shares[place.member * wide_rows<NT> + row_of(r, place.t)] = make_float2(sum, zero);
        }
    }
    place.meet();
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        float2 total = {};
        for (int m = 0; m < W; ++m) {
            const float2 x = shares[m * wide_rows<NT> + row_of(r, place.t)];
            total = make_float2(total.x + x.x, total.y + x.y);
        }
        state.sum[r] = total.x;
        if (with_zero) {
            state.zero[r / 2][r % 2] = total.y;
        }
    }
    place.meet(); // the shares may be overwritten
}

/* Writes a team's state.  unit: of its sums; channel(c): of a lane's c-th four tiles' channels, the first; exists(c);
 * add(c, r): what is added to every one of them. */
template <int W, int T, int NT, bool LATENT, typename CHANNEL, typename ADD>
__device__ void store_wide_state(uint8_t *to, const wide_state<T, NT> &state, const wide_team<W, T, NT, LATENT> &team,
                                 float unit, int n, const CHANNEL &channel, const ADD &add) {
    const auto &place = team.place;
    const int width = team.call.width;
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        const int row = row_of(r, place.t), nt = r / 2, odd = r % 2;
        if (place.member == 0 && place.g == 0) {
            ((float2 *)to)[row] = make_float2(state.max[r], state.sum[r]);
        }
#pragma unroll
        for (int c = 0; c < T / 2; ++c) {
            if (c < n && channel(c) < width) {
                const float more = add(c, r);
                *(float4 *)(state_values<NT>(to, row, width) + channel(c)) = make_float4(
                    state.out[2 * c][nt][odd] * unit + more, state.out[2 * c][nt][2 + odd] * unit + more,
                    state.out[2 * c + 1][nt][odd] * unit + more, state.out[2 * c + 1][nt][2 + odd] * unit + more);
            }
        }
    }
}

/* Sums over codes of values.  room: for what groups of channels have of zero points, [warp][group][row]. */
template <int W, int T, int NT, bool LATENT>
__device__ void store_sealed_state(uint8_t *to, uint8_t *room, wide_state<T, NT> &state,
                                   const wide_team<W, T, NT, LATENT> &team) {
    const auto &place = team.place;
    const int n_groups = team.call.n_groups;
    constexpr int rows = wide_rows<NT>;
    auto *zeros = (float *)room;
    if (n_groups > 0) { // total_over_team meets
        for (int nt = 0; nt < NT; ++nt) {
            for (int half = 0; half < 2; ++half) {
                const int group = place.g + 8 * half;
                if (group < n_groups) {
                    *(float2 *)(zeros + (place.member * n_groups + group) * rows + row_of(2 * nt, place.t)) =
                        make_float2(state.zero[nt][2 * half], state.zero[nt][2 * half + 1]);
                }
            }
        }
    }
    total_over_team(state, team, n_groups == 0);
    const float unit = power_of_two(state.exponent - p_bits);
    const auto channel = [&](int c) { return 32 * (place.member + W * c) + 4 * place.g; };
    store_wide_state(to, state, team, unit * code_unit, team.own_chunks(), channel, [&](int c, int r) {
        if (n_groups == 0) {
            return state.zero[r / 2][r % 2] * unit;
        }
        float sum = 0.0f;
#pragma unroll 1
        for (int m = 0; m < W; ++m) {
            sum += zeros[(m * n_groups + (channel(c) >> team.call.log_group)) * rows + row_of(r, place.t)];
        }
        return sum * unit;
    });
    place.meet(); // open pages' sums will lie where zeros do
}

template <int W, int T, int NT, bool LATENT>
__device__ void store_latent_state(uint8_t *to, wide_state<T, NT> &state, const wide_team<W, T, NT, LATENT> &team) {
    total_over_team(state, team, false);
    const latent_place at = team.latent();
    store_wide_state(
        to, state, team, power_of_two(-p_bits), at.exists ? T / 2 : 0, [&](int c) { return at.channel + 4 * c; },
        [](int, int) { return 0.0f; });
}

template <int W, int T, int NT, bool LATENT>
__device__ void store_open_state(uint8_t *to, wide_state<T, NT> &state, const wide_team<W, T, NT, LATENT> &team) {
    const auto &place = team.place;
    total_over_team(state, team, false);
    store_wide_state(
        to, state, team, power_of_two(-p_bits), team.own_chunks(),
        [&](int c) { return 32 * (place.member + W * c) + 4 * place.g; }, [](int, int) { return 0.0f; });
}

/* Rows of a part, and where row r of a block is among those of all parts. */
__device__ inline int64_t rows_of_part(const xq_attend_args &args) {
    return (int64_t)args.n_streams * args.n_tokens * args.n_head;
}
__device__ inline int64_t row_of_part(const xq_attend_args &args, const wide_call &call, const block_task &task,
                                      int r) {
    const int row = task.first_row + r;
    return task.part * rows_of_part(args) +
           attend_row(args, task.nth_stream, call.token_of(row), task.head * call.n_rep + call.rest_of(row));
}

/* A warp's row x, channel 32 k + lane in x [k], times the Hadamard matrix of blocks of `block` channels, which is a
 * power of two; without the norm. */
template <int K> __device__ void transform_row(float (&x)[K], int block, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        if (step < block) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float other = __shfl_xor_sync(~0u, x[k], step);
                x[k] = (lane & step) == 0 ? x[k] + other : other - x[k];
            }
        }
    }
#pragma unroll
    for (int step = 1; step < K; step *= 2) {
        if (32 * step < block) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if ((k & step) == 0 && k + step < K) {
                    const float a = x[k], b = x[k + step];
                    x[k] = a + b;
                    x[k + step] = a - b;
                }
            }
        }
    }
}

/* The states of a block that its rows are put together of: n_sealed in shared memory, `step` bytes apart, and n_open
 * over open pages, max_states at most in all.  OPEN: head(i, row) and values(i, row) of the i-th of these. */
constexpr int max_states = 16;
template <typename OPEN> struct block_states {
    uint8_t *sealed;
    int step, n_sealed, n_open;
    OPEN open;
};

/* The rows of a block to memory: each by a warp.  K: channels of a lane, at most.  By all threads, which have met. */
template <int NT, int K, typename OPEN>
__device__ void join_wide_rows(const block_states<OPEN> &states, const xq_store &store, const xq_attend_args &args,
                               const wide_call &call, const block_task &task) {
    const int width = call.width, n = min(wide_rows<NT>, call.rows_of_head - task.first_row);
    const int lane = threadIdx.x % 32, block = hadamard_block(width);
    const float norm = call.rotate ? rsqrtf((float)block) : 1.0f;
    float2 *heads = (float2 *)(args.partial + args.n_parts * rows_of_part(args) * width);
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < n; r += blockDim.x / 32) {
        float first[K] = {}; // values of the first open state: they may come from afar
        if (states.n_open > 0) {
            const float *values = states.open.values(0, r);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                first[k] = 32 * k + lane < width ? values[32 * k + lane] : 0.0f;
            }
        }
        float2 head = make_float2(-INFINITY, 0.0f); // lane i: of state i
        if (lane < states.n_sealed) {
            head = ((const float2 *)(states.sealed + lane * states.step))[r];
        } else if (lane < states.n_sealed + states.n_open) {
            head = states.open.head(lane - states.n_sealed, r);
        }
        float top = head.x;
        for (int step = 1; step < max_states; step *= 2) {
            top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        }
        const float weight = quick_exp2(head.x - (top == -INFINITY ? 0.0f : top));
        float sum = weight * head.y;
        for (int step = 1; step < max_states; step *= 2) {
            sum += __shfl_xor_sync(~0u, sum, step);
        }
        const auto add = [&](float (&x)[K], const float *values, int state) {
            const float by = __shfl_sync(~0u, weight, state);
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (32 * k + lane < width) {
                    x[k] += by * values[32 * k + lane];
                }
            }
        };
        float x[K] = {};
#pragma unroll 1
        for (int i = 0; i < states.n_sealed; ++i) {
            add(x, state_values<NT>(states.sealed + i * states.step, r, width), i);
        }
        if (call.rotate) {
            transform_row(x, block, lane);
        }
        const float by = __shfl_sync(~0u, weight, states.n_sealed); // 0 if there are no open ones
#pragma unroll
        for (int k = 0; k < K; ++k) {
            x[k] = x[k] * norm + by * first[k];
        }
#pragma unroll 1
        for (int i = 1; i < states.n_open; ++i) {
            add(x, states.open.values(i, r), states.n_sealed + i);
        }
        const int64_t place = row_of_part(args, call, task, r);
        float *out = args.partial + place * width;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (32 * k + lane < width) {
                out[32 * k + lane] = x[k];
            }
        }
        if (lane == 0) {
            heads[place] = make_float2(top, sum);
        }
    }
}

} // namespace

} // namespace xq
