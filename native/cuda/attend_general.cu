/* attend_general.cu: attention for everything that the fast kernels do not cover, in single precision.
 *
 *     score(t) = softcap(scale * q . k_t) + slope * mask_t        p_t = exp(score_t - m)        out = sum_t p_t v_t
 *
 * One block of XQ_PAGE threads takes one query row and one part of the pages; a thread is a token of the page for the
 * scores and a channel for the sums.  The folded vectors q_i s_i and p_t s_t lie in shared memory.  A masked token
 * takes no part, whatever lies in its cell.
 */
#include "attend.cuh"
#include "codec.cuh"
#include "launch.h"

namespace xq {

namespace {

constexpr int threads = XQ_PAGE, n_warps = threads / 32, max_width = XQ_MAX_HEAD_DIM;
constexpr int max_groups = max_width / 32; /* V: groups of channels of a head */

/* Sum (or maximum) over the block, the same on every thread. */
template <typename F> __device__ float over_block(float x, float *scratch /* [n_warps] */, const F &join) {
    for (int step = 16; step > 0; step /= 2) {
        x = join(x, __shfl_xor_sync(~0u, x, step));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = scratch[0];
    for (int i = 1; i < n_warps; ++i) {
        x = join(x, scratch[i]);
    }
    return x;
}

struct scratch {
    float q[max_width];
    float folded[4 * max_width]; /* K: [tile][d].  V: [group][XQ_PAGE] */
    float p[XQ_PAGE];
    float constant[max_groups]; /* sum of vector times zero, by tile or group */
    float reduce[n_warps];
};

__device__ float sum_of(float a, float b) {
    return a + b;
}

/* folded[i] = vector[i] * scale[i], and the sum of vector[i] times zero[i]. */
__device__ void fold(const xq_side &side, const uint8_t *param, int n, const float *vector, float *folded,
                     float *constant, float *reduce) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += threads) {
        const parameters p = load_parameters(side, param, n, i);
        folded[i] = vector[i] * p.scale;
        sum += vector[i] * (p.base - p.scale * p.middle);
    }
    *constant = over_block(sum, reduce, sum_of);
}

__device__ float sealed_score(scratch &s, const side_view &k, int page) {
    const uint8_t *param = k.param + page * k.param_stride, *codes = k.codes + page * k.codes_stride;
    for (int tile = 0; tile < XQ_PAGE / k.plan.group; ++tile) {
        fold(k.plan, param + tile * parameter_bytes(k.plan, k.width), k.width, s.q, s.folded + tile * k.width,
             s.constant + tile, s.reduce);
    }
    __syncthreads();
    const int t = threadIdx.x, tile = t / k.plan.group;
    const float *folded = s.folded + tile * k.width;
    float score = s.constant[tile];
    for (int i = 0; i < k.width && k.plan.bits > 0; i += 4) {
        const uint32_t c = codes_of(k.plan.bits, k.width, codes, t, i);
        score += folded[i] * (float)(c & 0xffu) + folded[i + 1] * (float)(c >> 8 & 0xffu) +
                 folded[i + 2] * (float)(c >> 16 & 0xffu) + folded[i + 3] * (float)(c >> 24);
    }
    return score;
}

__device__ void add_sealed_values(scratch &s, const side_view &v, int page, float *out /* [width / threads] */) {
    const uint8_t *param = v.param + page * v.param_stride, *codes = v.codes + page * v.codes_stride;
    const int length = group_length(v.plan, v.width);
    for (int g = 0; g < v.width / length; ++g) {
        fold(v.plan, param + g * parameter_bytes(v.plan, XQ_PAGE), XQ_PAGE, s.p, s.folded + g * XQ_PAGE, s.constant + g,
             s.reduce);
    }
    __syncthreads();
    for (int j = threadIdx.x, n = 0; j < v.width; j += threads, ++n) {
        const float *folded = s.folded + j / length * XQ_PAGE;
        out[n] += s.constant[j / length];
        for (int t = 0; t < XQ_PAGE && v.plan.bits > 0; t += 4) {
            const uint32_t c = codes_of(v.plan.bits, XQ_PAGE, codes, j, t);
            out[n] += folded[t] * (float)(c & 0xffu) + folded[t + 1] * (float)(c >> 8 & 0xffu) +
                      folded[t + 2] * (float)(c >> 16 & 0xffu) + folded[t + 3] * (float)(c >> 24);
        }
    }
}

/* grid (head, token of all streams, part) */
__global__ void __launch_bounds__(threads) general_kernel(const xq_cuda_layer l, const xq_cuda_attend_args a) {
    __shared__ scratch s;
    const int head = blockIdx.x, token = blockIdx.y, tid = threadIdx.x;
    const int n_rep = a.n_head / l.n_head_kv, of_stream = token % a.n_tokens, nth_stream = token / a.n_tokens;
    const int stream = stream_of(a, nth_stream);
    const side_view k = key_view(l, stream, head / n_rep), v = value_view(l, stream, head / n_rep);
    const float *q = (const float *)((const char *)a.q + head * a.q_head_stride + token * a.q_token_stride);
    const auto *mask = a.mask ? (const __half *)((const char *)a.mask + of_stream * a.mask_token_stride +
                                                 nth_stream * a.mask_stream_stride)
                              : nullptr;
    const int32_t *table = a.table + (int64_t)stream * l.n_pages;
    const float slope = slope_of(a.max_bias, head, a.n_head);
    for (int i = tid; i < l.d; i += threads) {
        s.q[i] = q[i];
    }

    float sealed[max_width / threads] = {}, open[max_width / threads] = {}, source[max_width / threads] = {};
    float top = -INFINITY, total = 0.0f;
    const range pages = pages_of_part(a, blockIdx.z);
    for (int page = pages.begin; page < pages.end; ++page) {
        const int slot = table[page];
        const float m = mask ? __half2float(mask[page * XQ_PAGE + tid]) : 0.0f;
        if (slot == page_free || __syncthreads_and(m == -INFINITY)) {
            continue;
        }
        float score = 0.0f;
        if (slot == page_sealed) {
            score = sealed_score(s, k, page);
        } else {
            const __half *row = k.window + ((int64_t)slot * XQ_PAGE + tid) * l.d;
            for (int i = 0; i < l.d; ++i) {
                score += s.q[i] * __half2float(row[i]);
            }
        }
        score *= a.scale;
        if (a.softcap > 0.0f) {
            score = a.softcap * tanhf(score / a.softcap);
        }
        score = m == -INFINITY ? -INFINITY : score + slope * m;
        const float before = top;
        top = fmaxf(top, over_block(score, s.reduce, [](float x, float y) { return fmaxf(x, y); }));
        if (top == -INFINITY) {
            continue;
        }
        const float factor = expf(before - top), p = expf(score - top);
        s.p[tid] = p;
        total = total * factor + over_block(p, s.reduce, sum_of);
        for (int n = 0; n < max_width / threads; ++n) {
            sealed[n] *= factor;
            open[n] *= factor;
            source[n] *= factor;
        }
        if (slot == page_sealed) {
            add_sealed_values(s, v, page, sealed);
            if (l.mapped) {
                __syncthreads();
                add_sealed_values(s, source_view(l, stream, head / n_rep), page, source);
            }
        } else {
            for (int j = tid, n = 0; j < l.e; j += threads, ++n) {
                for (int t = 0; t < XQ_PAGE; ++t) {
                    if (s.p[t] != 0.0f) {
                        open[n] += s.p[t] * __half2float(v.window[((int64_t)slot * XQ_PAGE + t) * l.e + j]);
                    }
                }
            }
        }
        __syncthreads();
    }
    float *state = state_of(l, a, blockIdx.z, token, head);
    for (int j = tid, n = 0; j < l.e; j += threads, ++n) {
        state[2 + j] = sealed[n];
        state[2 + l.e + j] = open[n];
        if (l.mapped) {
            state[2 + 2 * l.e + j] = source[n];
        }
    }
    if (tid == 0) {
        state[0] = top;
        state[1] = total;
    }
}

} // namespace

int launch_general(const xq_cuda_layer &l, const xq_cuda_attend_args &a, cudaStream_t stream) {
    general_kernel<<<dim3(a.n_head, a.n_tokens * a.n_streams, a.n_parts), threads, 0, stream>>>(l, a);
    return launched("general attention");
}

} // namespace xq
