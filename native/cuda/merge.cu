/* merge.cu: the states of the parts of one row to the row's output, after the general kernel.
 *
 *     out = (H (sum_i w_i sealed_i + W^T sum_i w_i source_i) + sum_i w_i open_i) / (sum_i w_i sum_i + exp(sink - m))
 *
 * with w_i = exp(max_i - m), H the normalised Hadamard matrix if values were rotated, W the map of the KV head if they
 * were mapped; H for channels that are stored as values.  One block a row, one thread a channel.
 */
#include "launch.h"

#include <cmath>

namespace xq {

namespace {

__global__ void merge_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_attend_args args) {
    __shared__ float x[XQ_MAX_HEAD_DIM];
    const int row = blockIdx.x, head = row % args.n_head, j = threadIdx.x, e = store.v.width;
    const int width = value_width(store), own = j - store.latent; // own: channel of what is stored of V
    float *out = out_at(store, args, row);
    const float sink = args.sinks ? args.sinks[head] : -INFINITY;
    float max = sink;
    for (int i = 0; i < args.n_parts; ++i) {
        max = fmaxf(max, *state_at(store, args, i, row));
    }
    if (max == -INFINITY) { // nothing is visible
        out[j] = 0.0f;
        return;
    }
    float sum = expf(sink - max), sealed = 0.0f, open = 0.0f, source = 0.0f;
#pragma unroll 8
    for (int i = 0; i < args.n_parts; ++i) {
        const float *state = state_at(store, args, i, row);
        const float weight = expf(state[0] - max);
        sum += weight * state[1];
        sealed += weight * state[2 + j];
        open += weight * state[2 + width + j];
        if (store.mapped) {
            source += weight * state[2 + 2 * width + j];
        }
    }
    if (store.mapped) {
        const float *map = map_of(store, head / (args.n_head / store.n_head_kv));
        x[j] = source;
        __syncthreads();
        for (int k = 0; k < e; ++k) {
            sealed += x[k] * map[(int64_t)k * e + j];
        }
        __syncthreads();
    }
    if (store.v.plan.rotate) {
        const int block = hadamard_block(e);
        for (int h = 1; h < block; h *= 2) {
            x[j] = sealed;
            __syncthreads();
            if (own >= 0) {
                const float other = x[store.latent + (own ^ h)];
                sealed = own & h ? other - sealed : sealed + other;
            }
            __syncthreads();
        }
        sealed *= own >= 0 ? rsqrtf((float)block) : 1.0f;
    }
    out[j] = (sealed + open) / sum;
}

} // namespace

int launch_merge(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    merge_kernel<<<args.n_streams * args.n_tokens * args.n_head, value_width(store), 0, stream>>>(store, args);
    return launched("merge");
}

} // namespace xq
