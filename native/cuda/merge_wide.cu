/* merge_wide.cu: the parts of a row that the wide kernel left in memory to the row's output.
 *
 *     out = sum_i w_i out_i / (sum_i w_i sum_i + 2^(sink - m))        w_i = 2^(max_i - m)
 *
 * One block takes 64 channels of a row, each warp of it some of the parts.  out, max and sum: wide_join.cuh.
 */
#include "launch.h"

#include <cmath>

namespace xq {

namespace {

constexpr int merge_warps = 8, merge_channels = 64;
constexpr float log2e = 1.44269504f;

/* grid (row, channels) */
__global__ void __launch_bounds__(32 * merge_warps)
    merge_wide_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_attend_args args,
                      int first_channel, int width) {
    __shared__ float2 shares[merge_warps][merge_channels / 2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = args.n_parts;
    const int channel = merge_channels * blockIdx.y + 2 * lane;
    const int64_t row = blockIdx.x, n_all = (int64_t)args.n_streams * args.n_tokens * args.n_head;
    wait_for_previous();
    launch_next();
    const float2 *heads = (const float2 *)(args.partial + n * n_all * width) + row;
    const float sink = args.sinks ? args.sinks[row % args.n_head] * log2e : -INFINITY;
    constexpr int first_parts = 8; // of a warp: on their way while the weights are worked out
    float2 first[first_parts] = {};
    const auto values_of = [&](int i) { return *(const float2 *)(args.partial + (i * n_all + row) * width + channel); };
#pragma unroll
    for (int k = 0; k < first_parts; ++k) {
        const int i = warp + merge_warps * k;
        if (i < n && channel < width) {
            first[k] = values_of(i);
        }
    }
    float max = sink, sum = 0.0f;
#pragma unroll 8
    for (int i = lane; i < n; i += 32) {
        max = fmaxf(max, heads[i * n_all].x);
    }
    for (int step = 1; step < 32; step *= 2) {
        max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
    }
    const float safe = max == -INFINITY ? 0.0f : max;
#pragma unroll 8
    for (int i = lane; i < n; i += 32) {
        const float2 head = heads[i * n_all];
        sum += exp2f(head.x - safe) * head.y;
    }
    for (int step = 1; step < 32; step *= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
    }
    sum += exp2f(sink - safe);
    float2 x = {};
    const auto add = [&](int i, float2 y) {
        const float weight = exp2f(heads[i * n_all].x - safe);
        x.x += weight * y.x;
        x.y += weight * y.y;
    };
#pragma unroll
    for (int k = 0; k < first_parts; ++k) {
        if (warp + merge_warps * k < n) {
            add(warp + merge_warps * k, first[k]);
        }
    }
    if (channel < width) {
#pragma unroll 8
        for (int i = warp + merge_warps * first_parts; i < n; i += merge_warps) {
            add(i, values_of(i));
        }
    }
    shares[warp][lane] = x;
    __syncthreads();
    if (warp == 0 && channel < width) {
        for (int w = 1; w < merge_warps; ++w) {
            const float2 y = shares[w][lane];
            x = make_float2(x.x + y.x, x.y + y.y);
        }
        const float by = sum > 0.0f ? 1.0f / sum : 0.0f; // 0: nothing is visible
        *(float2 *)(out_at(store, args, row) + first_channel + channel) = make_float2(x.x * by, x.y * by);
    }
}

} // namespace

int launch_merge_wide(const xq_store &store, const xq_attend_args &args, int first_channel, int width,
                      cudaStream_t stream) {
    const dim3 grid(args.n_streams * args.n_tokens * args.n_head, (width + merge_channels - 1) / merge_channels);
    launch_early(merge_wide_kernel, grid, 32 * merge_warps, 0, stream, store, args, first_channel, width);
    return launched("merge");
}

} // namespace xq
