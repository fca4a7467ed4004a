/* unpack.cu: pages as F16 rows [cell][KV head][width]: for prompts, where one pass over
 * the codes serves hundreds of query rows.
 */
#include "lanes.cuh"
#include "launch.h"

namespace xq {

namespace {

/* grid (slab, page, stream * KV head), one warp each */
__global__ void __launch_bounds__(slab) unpack_kernel(const xq_cuda_layer l, const xq_cuda_unpack_args a) {
    extern __shared__ float shared[];
    const int i0 = blockIdx.x * slab, page = blockIdx.y, head = blockIdx.z % l.n_head_kv;
    const int nth_stream = blockIdx.z / l.n_head_kv, stream = *a.first_stream + nth_stream;
    const int width = a.is_k ? l.d : l.e, slot = a.table[(int64_t)stream * l.n_pages + page];
    const int64_t stride = (int64_t)l.n_head_kv * width;
    const int64_t first = ((int64_t)nth_stream * a.n_kv_pages + page) * XQ_PAGE;
    __half *rows = (__half *)a.rows + first * stride + head * width;
    if (slot == page_sealed) {
        if (i0 < (a.is_k ? l.d : XQ_PAGE)) {
            unseal_slab(l, a.is_k, stream, head, i0, page, rows, stride, shared);
        }
        return;
    }
    const side_view v = view_of(l, a.is_k, stream, head);
    const auto *from = (const uint4 *)(v.window + (int64_t)max(slot, 0) * XQ_PAGE * width);
    const int n = width / 8; // of a row
    for (int k = blockIdx.x * slab + threadIdx.x; k < XQ_PAGE * n; k += gridDim.x * slab) {
        *(uint4 *)(rows + k / n * stride + k % n * 8) = slot >= 0 ? from[k] : uint4{};
    }
}

} // namespace

int launch_unpack(const xq_cuda_layer &l, const xq_cuda_unpack_args &a, cudaStream_t stream) {
    const size_t shared = slab_bytes(l);
    if (shared > 48 * 1024 &&
        cudaFuncSetAttribute(unpack_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared) != cudaSuccess) {
        return launched("unpack");
    }
    unpack_kernel<<<dim3(slabs_of(l), a.n_kv_pages, a.n_streams * l.n_head_kv), slab, shared, stream>>>(l, a);
    return launched("unpack");
}

} // namespace xq
