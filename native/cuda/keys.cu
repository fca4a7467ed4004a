/* keys.cu: the two ends of a context shift: keys of a few pages as F32, and stored again as they were.
 *
 * In between somebody rotates them.  Sealed keys are rounded to F16 on both ways, as on the CPU: same bytes.
 */
#include "fit.cuh"
#include "launch.h"

namespace xq {

namespace {

/* grid (slab, page, KV head), one warp each. */
__global__ void __launch_bounds__(slab)
    read_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_keys_args args) {
    extern __shared__ float shared[];
    const page_move &page = move_at(args.pages, blockIdx.y);
    const side_view side = side_at(store.k, page.stream, blockIdx.z);
    const int lane = threadIdx.x, i = blockIdx.x * slab + lane;
    if (i >= side.width || !has_keys(store, page)) {
        return;
    }
    const column x = column_of(shared, XQ_PAGE, lane);
    const bool sealed = page.slot == XQ_SLOT_SEALED;
    if (sealed) {
        unseal_lane(matrix_of(side, true), x, i, page_codes(side, page.page), page_param(side, page.page));
    }
    const open_page open = open_page_of(side, true, sealed ? 0 : page.slot);
    for (int t = 0; t < XQ_PAGE; ++t) {
        const __half h = sealed ? to_half(x[t]) : half_of(open, t, i);
        key_at(args, blockIdx.y, t, blockIdx.z)[i] = __half2float(h);
    }
}

__global__ void __launch_bounds__(slab)
    write_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_keys_args args) {
    extern __shared__ float shared[];
    const page_move &page = move_at(args.pages, blockIdx.y);
    const side_view side = side_at(store.k, page.stream, blockIdx.z);
    const int lane = threadIdx.x, first = blockIdx.x * slab, i = first + lane;
    const bool active = i < side.width;
    if (!has_keys(store, page)) {
        return;
    }
    const auto rotated = [&](int t) { return to_half(key_at(args, blockIdx.y, t, blockIdx.z)[i]); };
    if (page.slot >= 0) {
        __half *rows = open_rows(side, page.slot);
        for (int t = 0; active && t < XQ_PAGE; ++t) {
            rows[t * side.width + i] = rotated(t);
        }
        return;
    }
    const matrix m = matrix_of(side, true);
    const column x = column_of(shared, XQ_PAGE, lane);
    uint8_t *codes = page_codes(side, page.page);
    for (int t = 0; t < XQ_PAGE; ++t) {
        x[t] = active ? __half2float(rotated(source_of(page.valid, t))) : 0.0f;
    }
    if (is_bytes(page.slot)) {
        __syncthreads(); // of one warp
        shrink_slab(bytes_at(side, true, page.slot), shared, first);
        return;
    }
    const bool own = own_codes(side);
    if (active) {
        seal_lane(m, x, i, own ? nullptr : codes, page_param(side, page.page));
    }
    __syncthreads();
    if (own) {
        pack_codes(m, shared, first, codes);
    }
}

int launch(void (*kernel)(xq_store, xq_keys_args), const xq_store &store, const xq_keys_args &args,
           cudaStream_t stream) {
    const unsigned n_slabs = (unsigned)(store.k.width + slab - 1) / slab;
    kernel<<<dim3(n_slabs, args.n_pages, store.n_head_kv), slab, XQ_PAGE * slab_stride(XQ_PAGE) * sizeof(float),
             stream>>>(store, args);
    return launched("reading or writing keys");
}

} // namespace

int launch_read_keys(const xq_store &store, const xq_keys_args &args, cudaStream_t stream) {
    return launch(read_kernel, store, args, stream);
}

int launch_write_keys(const xq_store &store, const xq_keys_args &args, cudaStream_t stream) {
    return launch(write_kernel, store, args, stream);
}

} // namespace xq
