/* prompt.cu: attention of prompts over F16 rows: what prompt_attend.cu needs beside it, and when it is used.
 *
 *     view of a page by a tile of query rows: from the mask F16 [stream][token][cell] of the tile's tokens
 *     out = sum over parts of 2^(e - E) y / (2^(sink - E) + sum over parts of 2^(e - E) sum),     E = max(e, sink)
 *
 * with e, sum and y [width] the state of a part, all in scratch memory (prompt_shape.h).
 */
#include "check.h"
#include "launch.h"
#include "prompt_shape.h"

namespace xq {

namespace {

constexpr int view_threads = 128;

/* Whether all eight halves are 0, or all are minus infinity. */
__device__ bool are_zero(const uint4 &x) {
    return ((x.x | x.y | x.z | x.w) & 0x7fff7fffu) == 0;
}
__device__ bool are_hidden(const uint4 &x) {
    constexpr uint32_t hidden = 0xfc00fc00u;
    return x.x == hidden && x.y == hidden && x.z == hidden && x.w == hidden;
}

/* grid (page, tile, stream) */
__global__ void __launch_bounds__(view_threads)
    find_views(const __grid_constant__ xq_rows_args a, const __grid_constant__ prompt_shape s) {
    launch_next(); // it waits where it reads views
    const int page = blockIdx.x, tile = blockIdx.y, stream = blockIdx.z;
    const int last = min((tile + 1) * prompt_rows, a.n_tokens * s.n_rep) - 1;
    const int first_token = tile * prompt_rows / s.n_rep, n_tokens = last / s.n_rep - first_token + 1;
    constexpr int pieces = XQ_PAGE / 8; // of 16 bytes
    bool zero = true, hidden = true;
    for (int i = threadIdx.x; i < n_tokens * pieces; i += view_threads) {
        const auto *of_token =
            (const char *)a.mask + stream * a.mask_stream_stride + (first_token + i / pieces) * a.mask_token_stride;
        const uint4 eight = ((const uint4 *)of_token)[page * pieces + i % pieces];
        zero = zero && are_zero(eight);
        hidden = hidden && are_hidden(eight);
    }
    zero = __syncthreads_and(zero);
    hidden = __syncthreads_and(hidden);
    if (threadIdx.x == 0) {
        auto *views = (uint8_t *)a.scratch;
        views[((int64_t)stream * s.n_tiles + tile) * a.n_kv_pages + page] = hidden ? view_none
                                                                            : zero ? view_all
                                                                                   : view_some;
    }
}

/* grid (row of the output), a thread for four channels */
__global__ void join_parts(const __grid_constant__ xq_rows_args a, const __grid_constant__ prompt_shape s) {
    const int64_t row = blockIdx.x;
    const auto *states = (const float2 *)((const char *)a.scratch + s.states) + row; // exponent, sum
    const auto *partial = (const float4 *)((const char *)a.scratch + s.partial);
    const float sink = a.sinks ? a.sinks[row % a.n_head] * log2e : -INFINITY;
    float top = sink;
    for (int part = 0; part < s.n_parts; ++part) {
        top = fmaxf(top, states[part * s.n_rows].x);
    }
    top = top == -INFINITY ? 0.0f : top; // nothing is seen
    float sum = exp2f(sink - top);
    float4 out = {};
    for (int part = 0; part < s.n_parts; ++part) {
        const float2 state = states[part * s.n_rows];
        const float4 four = partial[(part * s.n_rows + row) * blockDim.x + threadIdx.x];
        const float factor = exp2f(state.x - top);
        sum = fmaf(state.y, factor, sum);
        out.x = fmaf(four.x, factor, out.x);
        out.y = fmaf(four.y, factor, out.y);
        out.z = fmaf(four.z, factor, out.z);
        out.w = fmaf(four.w, factor, out.w);
    }
    const float norm = sum > 0.0f ? 1.0f / sum : 0.0f;
    ((float4 *)a.out)[row * blockDim.x + threadIdx.x] = {out.x * norm, out.y * norm, out.z * norm, out.w * norm};
}

} // namespace

#ifdef XQUANT_WGMMA
/* The copy engine and loads of 16 bytes want addresses and strides that are multiples of 16. */
bool prompt_covers(const xq_rows_args &a) {
    constexpr int most_blocks = 65535; // along y or z of a grid
    const auto whole = [](int64_t x) { return x >= 0 && x % 16 == 0; };
    const auto at = [](const void *p) { return (int64_t)(uintptr_t)p; };
    if (!has_wgmma() || (a.width != 64 && a.width != 128) || a.n_head_kv < 1 || a.n_head < 1 || a.n_tokens < 1 ||
        a.n_streams < 1 || a.n_kv_pages < 1 || a.n_head % a.n_head_kv != 0) {
        return false;
    }
    const int64_t n_rows = (int64_t)a.n_tokens * (a.n_head / a.n_head_kv),
                  n_tiles = (n_rows + prompt_rows - 1) / prompt_rows;
    return n_tiles <= most_blocks && (int64_t)a.n_streams * a.n_head_kv <= most_blocks &&
           (int64_t)a.n_kv_pages * XQ_PAGE <= INT32_MAX && n_rows * a.n_head_kv * a.n_streams <= INT32_MAX &&
           whole(at(a.q)) && whole(a.q_head_stride) && whole(a.q_token_stride) && whole(a.q_stream_stride) &&
           whole(at(a.mask)) && whole(a.mask_token_stride) && whole(a.mask_stream_stride) && whole(at(a.k)) &&
           whole(at(a.v)) && whole(at(a.out));
}
#else
bool prompt_covers(const xq_rows_args &) {
    return false;
}
int launch_prompt_attend(const xq_rows_args &, const prompt_shape &, cudaStream_t) {
    return fail(XQ_ERR_KERNELS, "attend_rows: this library was built without it");
}
#endif

int64_t prompt_scratch(const xq_rows_args &args) {
    return prompt_shape_of(args, processors()).bytes;
}

int launch_prompt(const xq_rows_args &args, cudaStream_t stream) {
    const prompt_shape s = prompt_shape_of(args, processors());
    find_views<<<dim3(args.n_kv_pages, s.n_tiles, args.n_streams), view_threads, 0, stream>>>(args, s);
    const int status = launch_prompt_attend(args, s, stream);
    if (status == XQ_OK && s.n_parts > 1) {
        join_parts<<<(unsigned)s.n_rows, args.width / 4, 0, stream>>>(args, s);
    }
    return status == XQ_OK ? launched("attend_rows") : status;
}

} // namespace xq
