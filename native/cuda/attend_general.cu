/* attend_general.cu: attention for everything that the fast kernels do not cover, in single precision.
 *
 *     score(t) = softcap(scale * q . k_t) + slope * mask_t        p_t = exp(score_t - m)        out = sum_t p_t v_t
 *
 * One block of XQ_PAGE threads takes one query row and one part of the pages; a thread is a token of the page for the
 * scores and a channel for the sums.  The folded vectors q_i s_i and p_t s_t lie in shared memory.  A masked token
 * takes no part, whatever lies in its cell.
 */
#include "alibi.h"
#include "codec.cuh"
#include "launch.h"

namespace xq {

namespace {

constexpr int threads = XQ_PAGE, n_warps = threads / 32, max_width = XQ_MAX_HEAD_DIM;
constexpr int max_groups = max_width / 32;                    /* V: groups of channels of a head */
constexpr int channels = (max_width + threads - 1) / threads; /* of a thread */

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

/* q [width] times the normalised Hadamard matrix, of blocks of the largest power of two that divides the width. */
__device__ void rotate_query(float *q, int width) {
    const int block = hadamard_block(width);
    for (int h = 1; h < block; h *= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; pair < width / 2; pair += threads) {
            const int i = 2 * pair - (pair & (h - 1));
            const float a = q[i], b = q[i + h];
            q[i] = a + b;
            q[i + h] = a - b;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += threads) {
        q[i] *= rsqrtf((float)block);
    }
}

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
    const uint8_t *param = page_param(k, page), *codes = page_codes(k, page);
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

__device__ void add_sealed_values(scratch &s, const side_view &v, int page, float *out /* [channels] */) {
    const uint8_t *param = page_param(v, page), *codes = page_codes(v, page);
    const int length = group_length(v.plan, v.width);
    for (int g = 0; g < v.width / length; ++g) {
        fold(v.plan, param + g * parameter_bytes(v.plan, XQ_PAGE), XQ_PAGE, s.p, s.folded + g * XQ_PAGE, s.constant + g,
             s.reduce);
    }
    __syncthreads();
    for (int j = threadIdx.x, n = 0; j < v.width; j += threads, ++n) {
        const float *folded = s.folded + j / length * XQ_PAGE;
        float sum = s.constant[j / length];
        for (int t = 0; t < XQ_PAGE && v.plan.bits > 0; t += 4) {
            const uint32_t c = codes_of(v.plan.bits, XQ_PAGE, codes, j, t);
            sum += folded[t] * (float)(c & 0xffu) + folded[t + 1] * (float)(c >> 8 & 0xffu) +
                   folded[t + 2] * (float)(c >> 16 & 0xffu) + folded[t + 3] * (float)(c >> 24);
        }
        out[n] += sum;
    }
}

/* Values that are channels of keys: out_i += sum over the tiles of scale_i sum_t p_t c[i][t] + zero_i sum_t p_t. */
__device__ void add_latent_values(const scratch &s, const side_view &k, int width, int page, float *out) {
    const uint8_t *codes = page_codes(k, page);
    for (int i = threadIdx.x, n = 0; i < width; i += threads, ++n) {
        for (int t0 = 0; t0 < XQ_PAGE; t0 += k.plan.group) {
            const uint8_t *param = page_param(k, page) + t0 / k.plan.group * parameter_bytes(k.plan, k.width);
            const parameters x = load_parameters(k.plan, param, k.width, i);
            float total = 0.0f, sum = 0.0f;
            for (int t = t0; t < t0 + k.plan.group; ++t) {
                total += s.p[t];
                if (k.plan.bits > 0) {
                    sum += s.p[t] * (float)(codes_of(k.plan.bits, k.width, codes, t, i & ~3) >> 8 * (i & 3) & 0xffu);
                }
            }
            out[n] += x.scale * (sum - x.middle * total) + x.base * total;
        }
    }
}

/* The first width channels of an open page of keys or values; tokens without weight are not read. */
__device__ void add_open_values(const scratch &s, const open_page &page, int width, float *out) {
    for (int j = threadIdx.x, n = 0; j < width; j += threads, ++n) {
        float sum = 0.0f;
        for (int t = 0; t < XQ_PAGE; ++t) {
            if (s.p[t] != 0.0f) {
                sum += s.p[t] * page.at(t, j);
            }
        }
        out[n] += sum;
    }
}

/* grid (head, token of all streams, part) */
__global__ void __launch_bounds__(threads)
    general_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_attend_args args) {
    __shared__ scratch s;
    const int head = blockIdx.x, tid = threadIdx.x;
    const int token = blockIdx.y % args.n_tokens, nth_stream = blockIdx.y / args.n_tokens;
    const int stream = safe_stream(store, stream_of(args.first_stream, nth_stream));
    const int head_kv = head / (args.n_head / store.n_head_kv);
    const side_view k = side_at(store.k, stream, head_kv), v = side_at(store.v, stream, head_kv);
    const float *q = query_at(args, nth_stream, token, head);
    const auto *mask = (const __half *)mask_at(args, nth_stream, token);
    const int32_t *table = table_of(store, args.table, stream);
    const float slope = slope_of(args.max_bias, head, args.n_head);
    for (int i = tid; i < k.width; i += threads) {
        s.q[i] = q[i];
    }
    if (args.rotate) {
        rotate_query(s.q, k.width);
    }

    // sums over values, and over channels of keys that are values
    float sealed[channels] = {}, open[channels] = {}, source[channels] = {};
    float sealed_keys[channels] = {}, open_keys[channels] = {};
    float top = -INFINITY, total = 0.0f;
    const page_range pages = pages_of_part(args, blockIdx.z);
    for (int page = pages.begin; page < pages.end; ++page) {
        const int slot = safe_slot(store, page, table[page]);
        const float m = mask ? __half2float(mask[page * XQ_PAGE + tid]) : 0.0f;
        if (slot == XQ_SLOT_NONE || __syncthreads_and(m == -INFINITY)) {
            continue;
        }
        float score = 0.0f;
        if (slot == XQ_SLOT_SEALED) {
            score = sealed_score(s, k, page);
        } else {
            const open_page keys = open_page_of(k, true, slot);
            for (int i = 0; i < k.width; ++i) {
                score += s.q[i] * keys.at(tid, i);
            }
        }
        score *= args.scale;
        if (args.softcap > 0.0f) {
            score = args.softcap * tanhf(score / args.softcap);
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
        for (int n = 0; n < channels; ++n) {
            sealed[n] *= factor;
            open[n] *= factor;
            sealed_keys[n] *= factor;
            open_keys[n] *= factor;
            source[n] *= factor;
        }
        __syncthreads();
        if (slot == XQ_SLOT_SEALED) {
            add_latent_values(s, k, store.latent, page, sealed_keys);
            if (v.width > 0) {
                add_sealed_values(s, v, page, sealed);
            }
            if (store.mapped) {
                __syncthreads();
                add_sealed_values(s, source_at(store, stream, head_kv), page, source);
            }
        } else {
            add_open_values(s, open_page_of(k, true, slot), store.latent, open_keys);
            add_open_values(s, open_page_of(v, false, slot), v.width, open);
        }
        __syncthreads();
    }
    float *state = state_at(store, args, blockIdx.z, attend_row(args, nth_stream, token, head));
    const int width = value_width(store);
    for (int j = tid, n = 0; j < store.latent; j += threads, ++n) {
        state[2 + j] = sealed_keys[n];
        state[2 + width + j] = open_keys[n];
    }
    for (int j = tid, n = 0; j < v.width; j += threads, ++n) {
        state[2 + store.latent + j] = sealed[n];
        state[2 + width + store.latent + j] = open[n];
        if (store.mapped) {
            state[2 + 2 * width + j] = source[n];
        }
    }
    if (tid == 0) {
        state[0] = top;
        state[1] = total;
    }
}

} // namespace

int launch_general(const xq_store &store, const xq_attend_args &args, cudaStream_t stream) {
    const dim3 grid(args.n_head, args.n_tokens * args.n_streams, args.n_parts);
    general_kernel<<<grid, threads, 0, stream>>>(store, args);
    return launched("general attention");
}

} // namespace xq
