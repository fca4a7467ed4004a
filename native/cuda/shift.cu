/* shift.cu: the two ends of a context shift: keys of a few pages as F32, and stored again as they were.
 *
 * In between llama.cpp's own operation rotates them.  Sealed keys are rounded to F16 on both ways, as on the CPU: same
 * bytes.
 */
#include "fit.cuh"
#include "launch.h"

namespace xq {

namespace {

constexpr int page_words = 7; /* stream, page, slot, valid[4] */

struct shifted {
    const int32_t *op;
    int stream, page, slot, head;
    char *keys; /* of token 0 */
};

/* Block (slab, page, KV head), one warp each. */
__device__ shifted shifted_of(const xq_cuda_shift_args &a) {
    const int32_t *op = a.pages + page_words * blockIdx.y;
    char *keys = (char *)a.keys + (int64_t)blockIdx.y * XQ_PAGE * a.token_stride + blockIdx.z * a.head_stride;
    return {op, op[0], op[1], op[2], (int)blockIdx.z, keys};
}

__global__ void __launch_bounds__(slab) read_kernel(const xq_cuda_layer l, const xq_cuda_shift_args a) {
    extern __shared__ float shared[];
    const shifted p = shifted_of(a);
    const side_view v = key_view(l, p.stream, p.head);
    const int lane = threadIdx.x, i = blockIdx.x * slab + lane;
    if (i >= v.width) {
        return;
    }
    const column x = {shared, lane};
    if (p.slot == page_sealed) {
        unseal_lane(matrix_of(v, true), x, i, v.codes + p.page * v.codes_stride, v.param + p.page * v.param_stride);
    }
    for (int t = 0; t < XQ_PAGE; ++t) {
        const __half h =
            p.slot == page_sealed ? to_half(x[t]) : v.window[((int64_t)p.slot * XQ_PAGE + t) * v.width + i];
        ((float *)(p.keys + t * a.token_stride))[i] = __half2float(h);
    }
}

__global__ void __launch_bounds__(slab) write_kernel(const xq_cuda_layer l, const xq_cuda_shift_args a) {
    extern __shared__ float shared[];
    const shifted p = shifted_of(a);
    const side_view v = key_view(l, p.stream, p.head);
    const int lane = threadIdx.x, i0 = blockIdx.x * slab, i = i0 + lane;
    const bool active = i < v.width;
    const auto rotated = [&](int t) { return __float2half_rn(((const float *)(p.keys + t * a.token_stride))[i]); };
    if (p.slot != page_sealed) {
        for (int t = 0; active && t < XQ_PAGE; ++t) {
            v.window[((int64_t)p.slot * XQ_PAGE + t) * v.width + i] = rotated(t);
        }
        return;
    }
    const matrix m = matrix_of(v, true);
    const column x = {shared, lane};
    uint8_t *codes = v.codes + p.page * v.codes_stride, *param = v.param + p.page * v.param_stride;
    int bad = 0; // was counted when the page was sealed first
    for (int t = 0; t < XQ_PAGE; ++t) {
        x[t] = active ? finite(__half2float(rotated(source_of(p.op + 3, t))), bad) : 0.0f;
    }
    if (active) {
        seal_lane(m, x, i, v.own ? nullptr : codes, param);
    }
    __syncwarp();
    if (v.own) {
        pack_codes(m, shared, i0, codes);
    }
}

int launch(void (*kernel)(xq_cuda_layer, xq_cuda_shift_args), const xq_cuda_layer &l, const xq_cuda_shift_args &a,
           cudaStream_t stream) {
    const unsigned n_slabs = (unsigned)(l.d + slab - 1) / slab;
    kernel<<<dim3(n_slabs, a.n_pages, l.n_head_kv), slab, XQ_PAGE * slab * sizeof(float), stream>>>(l, a);
    return launched("shift");
}

} // namespace

int launch_read_keys(const xq_cuda_layer &l, const xq_cuda_shift_args &a, cudaStream_t stream) {
    return launch(read_kernel, l, a, stream);
}

int launch_write_keys(const xq_cuda_layer &l, const xq_cuda_shift_args &a, cudaStream_t stream) {
    return launch(write_kernel, l, a, stream);
}

} // namespace xq
