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

/* How a block's threads take its rows: 64 each, several rows at a time. */
struct row_threads {
    static constexpr int of_row = 64;
    int first, step, lane; /* rows first, first + step, ...; lane: among the threads of a row */

    static __device__ row_threads here() {
        return {(int)threadIdx.x / of_row, (int)blockDim.x / of_row, (int)threadIdx.x % of_row};
    }
};

/* The states of a block, in shared memory, as a row's joined sums need them. */
template <int NT> struct wide_states {
    uint8_t *sealed, *open; /* of the first team, and of the first that took open pages */
    int ring, width, n_teams, n_open;

    __device__ float2 &head(bool is_open, int i, int r) const {
        return ((float2 *)((is_open ? open : sealed) + i * ring))[r];
    }
    __device__ float *values(bool is_open, int i, int r) const {
        return state_values<NT>((is_open ? open : sealed) + i * ring, r, width);
    }
    /* Sum of the states' i-th numbers, times the weights that lie in place of their maxima. */
    __device__ float joined(bool is_open, int n, int r, int i) const {
        float x = 0.0f;
#pragma unroll
        for (int k = 0; k < max_teams; ++k) {
            if (k < n) {
                x += head(is_open, k, r).x * values(is_open, k, r)[i];
            }
        }
        return x;
    }
};

/* Maximum and sum of row r over all states; their maxima become weights. */
template <int NT> __device__ float2 weigh(const wide_states<NT> &states, int r) {
    float top = -INFINITY, sum = 0.0f;
    for (int kind = 0; kind < 2; ++kind) {
        for (int k = 0; k < (kind ? states.n_open : states.n_teams); ++k) {
            top = fmaxf(top, states.head(kind, k, r).x);
        }
    }
    for (int kind = 0; kind < 2; ++kind) {
        for (int k = 0; k < (kind ? states.n_open : states.n_teams); ++k) {
            float2 &head = states.head(kind, k, r);
            head.x = quick_exp2(head.x - (top == -INFINITY ? 0.0f : top));
            sum += head.x * head.y;
        }
    }
    return make_float2(top, sum);
}

/* n rows of the first sealed state become the joined ones *= normalised Hadamard matrix, but for the norm.  By all
 * threads. */
template <int NT> __device__ void transform_rows(const wide_states<NT> &states, int n) {
    const auto mine = row_threads::here();
    const int width = states.width, block = hadamard_block(width);
    for (int r = mine.first; r < n; r += mine.step) {
        for (int i = mine.lane; i < width; i += mine.of_row) {
            states.values(false, 0, r)[i] = states.joined(false, states.n_teams, r, i);
        }
    }
    for (int log = 0; 1 << log < block; ++log) {
        __syncthreads();
        for (int r = mine.first; r < n; r += mine.step) {
            float *x = states.values(false, 0, r);
#pragma unroll 2
            for (int k = mine.lane; k < width / 2; k += mine.of_row) {
                const int i = (k >> log << (log + 1)) + (k & ((1 << log) - 1));
                const float a = x[i], b = x[i + (1 << log)];
                x[i] = a + b;
                x[i + (1 << log)] = a - b;
            }
        }
    }
    __syncthreads();
}

/* The rows of a block to memory, by all threads: the states of its teams, the last n_open of which took open pages.
 * shared: the first team's ring. */
template <int NT>
__device__ void join_wide_rows(uint8_t *shared, int n_open, const xq_store &store, const xq_attend_args &args,
                               const wide_call &call, const block_task &task) {
    const int width = call.width, n = min(wide_rows<NT>, call.rows_of_head - task.first_row);
    const wide_states<NT> states = {
        shared, shared + (call.n_teams - n_open) * call.ring + call.state, call.ring, width, call.n_teams, n_open};
    const int64_t n_all = (int64_t)args.n_streams * args.n_tokens * args.n_head; // rows of a part
    const auto place_of = [&](int r) {
        const int row = task.first_row + r;
        return task.part * n_all +
               attend_row(args, task.nth_stream, call.token_of(row), task.head * call.n_rep + call.rest_of(row));
    };
    __syncthreads();
    if ((int)threadIdx.x < n) {
        ((float2 *)(args.partial + args.n_parts * n_all * width))[place_of(threadIdx.x)] = weigh(states, threadIdx.x);
    }
    __syncthreads();
    const bool rotate = call.rotate;
    if (rotate) {
        transform_rows(states, n);
    }
    const float norm = rsqrtf((float)hadamard_block(width));
    const auto mine = row_threads::here();
    for (int r = mine.first; r < n; r += mine.step) {
        float *out = args.partial + place_of(r) * width;
#pragma unroll 2
        for (int i = mine.lane; i < width; i += mine.of_row) {
            const float x = rotate ? states.values(false, 0, r)[i] * norm : states.joined(false, states.n_teams, r, i);
            out[i] = x + states.joined(true, n_open, r, i);
        }
    }
}

} // namespace

} // namespace xq
