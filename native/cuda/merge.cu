/* merge.cu: the states of the parts of one row to the row's output, after the general kernel.
 *
 *     out = (H (sum_i w_i sealed_i + W^T sum_i w_i source_i) + sum_i w_i open_i) / (sum_i w_i sum_i + exp(sink - m))
 *
 * with w_i = exp(max_i - m), H the normalised Hadamard matrix if values were rotated, W the map of the KV head if they
 * were mapped.  One block a row, one thread a channel.
 */
#include "attend.cuh"
#include "codec.cuh"
#include "launch.h"

#include <cmath>

namespace xq {

namespace {

__global__ void merge_kernel(const xq_cuda_layer l, const xq_cuda_attend_args a) {
    __shared__ float x[XQ_MAX_HEAD_DIM];
    const int row = blockIdx.x, j = threadIdx.x, e = l.e, size = state_width(l), n_rows = gridDim.x;
    const int n_parts = a.n_parts, n_head = a.n_head;
    const float *partial = a.partial;
    float *out = a.out;
    const float sink = a.sinks ? a.sinks[row % n_head] : -INFINITY;
    float max = sink;
    for (int i = 0; i < n_parts; ++i) {
        max = fmaxf(max, partial[((int64_t)i * n_rows + row) * size]);
    }
    if (max == -INFINITY) { // nothing is visible
        out[(int64_t)row * e + j] = 0.0f;
        return;
    }
    float sum = expf(sink - max), sealed = 0.0f, open = 0.0f, source = 0.0f;
#pragma unroll 8
    for (int i = 0; i < n_parts; ++i) {
        const float *state = partial + ((int64_t)i * n_rows + row) * size;
        const float weight = expf(state[0] - max);
        sum += weight * state[1];
        sealed += weight * state[2 + j];
        open += weight * state[2 + e + j];
        if (l.mapped) {
            source += weight * state[2 + 2 * e + j];
        }
    }
    if (l.mapped) {
        const float *map = l.map + (int64_t)(row % n_head / (n_head / l.n_head_kv)) * e * e;
        x[j] = source;
        __syncthreads();
        for (int k = 0; k < e; ++k) {
            sealed += x[k] * map[(int64_t)k * e + j];
        }
        __syncthreads();
    }
    if (l.plan.v.rotate) {
        const int block = hadamard_block(e);
        for (int h = 1; h < block; h *= 2) {
            x[j] = sealed;
            __syncthreads();
            const float other = x[j ^ h];
            sealed = j & h ? other - sealed : sealed + other;
            __syncthreads();
        }
        sealed *= rsqrtf((float)block);
    }
    out[(int64_t)row * e + j] = (sealed + open) / sum;
}

} // namespace

int launch_merge(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    merge_kernel<<<a.n_streams * a.n_tokens * a.n_head, l.e, 0, stream>>>(l, a);
    return launched("merge");
}

} // namespace xq
