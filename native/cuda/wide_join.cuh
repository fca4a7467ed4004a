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
    const int width = team.store.v.width;
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

/* x [width] *= normalised Hadamard matrix, by a warp. */
__device__ inline void transform_wide_row(float *x, int width, int lane) {
    const int block = hadamard_block(width);
    for (int log = 0; 1 << log < block; ++log) {
        __syncwarp();
#pragma unroll 4
        for (int k = lane; k < width / 2; k += 32) {
            const int i = (k >> log << (log + 1)) + (k & ((1 << log) - 1));
            const float a = x[i], b = x[i + (1 << log)];
            x[i] = a + b;
            x[i + (1 << log)] = a - b;
        }
    }
    __syncwarp();
    const float by = rsqrtf((float)block);
    for (int i = lane; i < width; i += 32) {
        x[i] *= by;
    }
}

/* Weights of n states of a row, `step` bytes apart, to the maximum `top`; returns their sum of p. */
template <int NT>
__device__ float weights_of(const uint8_t *states, int step, int n, int r, float top, float *weights) {
    float sum = 0.0f;
    for (int i = 0; i < max_teams; ++i) {
        weights[i] = 0.0f;
        if (i < n) {
            const float2 head = ((const float2 *)(states + i * step))[r];
            weights[i] = quick_exp2(head.x - (top == -INFINITY ? 0.0f : top));
            sum += weights[i] * head.y;
        }
    }
    return sum;
}

/* x [i] of n states, times their weights. */
template <int NT>
__device__ float joined(uint8_t *states, int step, int n, int r, int width, int i, const float *weights) {
    float x = 0.0f;
#pragma unroll
    for (int k = 0; k < max_teams; ++k) {
        if (k < n) {
            x += weights[k] * state_values<NT>(states + k * step, r, width)[i];
        }
    }
    return x;
}

/* Row r of a block to memory, by a warp: the states of its teams, the first n_open of which, from the last one on, took
 * open pages.  states: of the first team. */
template <int NT>
__device__ void join_wide_row(uint8_t *states, int n_open, int r, const xq_store &store, const xq_attend_args &args,
                              const wide_call &call, const block_task &task, int lane) {
    const int width = store.v.width, n_teams = call.n_teams;
    uint8_t *open = states + (n_teams - n_open) * call.ring + call.state;
    float top = -INFINITY, weights[max_teams], open_weights[max_teams];
    for (int i = 0; i < n_teams; ++i) {
        top = fmaxf(top, ((const float2 *)(states + i * call.ring))[r].x);
    }
    for (int i = 0; i < n_open; ++i) {
        top = fmaxf(top, ((const float2 *)(open + i * call.ring))[r].x);
    }
    float sum = weights_of<NT>(states, call.ring, n_teams, r, top, weights);
    sum += weights_of<NT>(open, call.ring, n_open, r, top, open_weights);
    float *first = state_values<NT>(states, r, width);
    if (store.v.plan.rotate) {
        for (int i = lane; i < width; i += 32) {
            first[i] = joined<NT>(states, call.ring, n_teams, r, width, i, weights);
        }
        transform_wide_row(first, width, lane);
        for (int i = 0; i < max_teams; ++i) {
            weights[i] = i == 0;
        }
    }
    const int64_t n_all = (int64_t)args.n_streams * args.n_tokens * args.n_head; // rows of a part
    const int head = task.head * call.n_rep + call.rest_of(task.first_row + r);
    const int64_t row = attend_row(args, task.nth_stream, call.token_of(task.first_row + r), head);
    const int64_t nth = task.part * n_all + row;
    float *out = args.partial + nth * width;
    for (int i = lane; i < width; i += 32) {
        out[i] = joined<NT>(states, call.ring, store.v.plan.rotate ? 1 : n_teams, r, width, i, weights) +
                 joined<NT>(open, call.ring, n_open, r, width, i, open_weights);
    }
    if (lane == 0) {
        ((float2 *)(args.partial + args.n_parts * n_all * width))[nth] = make_float2(top, sum);
    }
}

} // namespace

} // namespace xq
