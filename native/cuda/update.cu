/* update.cu: what changes pages: makes them smaller or larger, or writes new rows.
 *
 * A call moves pages or writes rows, never both (check.h).  The host knows how many of each there are: grids have just
 * as many blocks, and nothing that a kernel reads says how far a loop goes.
 *
 * Writing rows is what attention may overtake (attend_decode.cuh).  It waits for the launch before it to end, and only
 * then lets the next one begin: all that was enqueued before the update is in memory by then, and only the open rows
 * and the counter that it writes are not.
 */
#include "fit.cuh"
#include "launch.h"

namespace xq {

namespace {

__device__ void count_bad(uint64_t *n_nonfinite, int bad) {
    if (bad > 0) {
        atomicAdd((unsigned long long *)n_nonfinite, (unsigned long long)bad);
    }
}

constexpr int seal_warps = 4; /* of a block: all load and pack, the first one fits */

/* For tokens first .. first + slab - 1, N of them at a time, whose loads are on their way together: few warps run, and
 * they would mostly wait for memory. */
template <int N, typename LOAD, typename STORE>
__device__ void each_token(int first, const LOAD &load, const STORE &store) {
    for (const int end = first + slab; first < end; first += N) {
        __half some[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            some[k] = load(first + k);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            store(first + k, some[k]);
        }
    }
}

/* The values of a slab of an open page to x, as finite ones; value(t, j): channel j of token t.  Returns how many were
 * not finite. */
template <int N, typename VALUE>
__device__ int load_values(const slab_place &at, const matrix &m, float *shared, const VALUE &value) {
    static_assert(seal_warps * slab == XQ_PAGE, "each warp takes a slab of tokens");
    const int lane = threadIdx.x % slab, warp = threadIdx.x / slab;
    const column x = column_of(shared, m.n_j, lane);
    int bad = 0;
    if (at.is_k) {
        const int i = min(at.first + lane, m.n_i - 1); // lanes beyond the channels: the last one's, which counts once
        each_token<N>(
            warp * slab, [&](int t) { return value(t, i); },
            [&](int t, __half of) { x[t] = finite(__half2float(of), bad); });
        return at.first + lane < m.n_i ? bad : 0;
    }
    for (int j = (int)threadIdx.x; j < m.n_j; j += seal_warps * slab) {
        each_token<N>(
            at.first, [&](int t) { return value(t, j); },
            [&](int t, __half of) { column_of(shared, m.n_j, t - at.first)[j] = finite(__half2float(of), bad); });
    }
    return bad;
}

/* The same of a page; tokens that do not count have the values of the first that does. */
__device__ int load_slab(const slab_place &at, const matrix &m, const page_move &move, const open_page &page,
                         float *shared) {
    if ((move.valid[0] & move.valid[1] & move.valid[2] & move.valid[3]) != ~0u) {
        return load_values<4>(at, m, shared, [&](int t, int j) { return half_of(page, source_of(move.valid, t), j); });
    }
    if (page.rows) {
        return load_values<slab>(at, m, shared, [&](int t, int j) { return page.rows[t * page.width + j]; });
    }
    return load_values<slab>(at, m, shared, [&](int t, int j) { return to_half(page.at(t, j)); });
}

/* The side and KV head of a block, by its number of those of a page: a latent layer has keys alone. */
__device__ bool is_key(const xq_store &store, unsigned number) {
    return number % n_sides(store) == 0;
}
__device__ int head_of(const xq_store &store, unsigned number) {
    return (int)number / n_sides(store);
}

/* grid (slab, side of a KV head, move): an open page becomes bytes or codes. */
__global__ void __launch_bounds__(seal_warps *slab, 3)
    seal_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_update_args args) {
    extern __shared__ float shared[];
    const page_move &move = move_at(args.seals, blockIdx.z);
    const slab_place at = {is_key(store, blockIdx.y), move.stream, head_of(store, blockIdx.y), move.page,
                           (int)blockIdx.x * slab};
    const side_view side = side_at(side_of(store, at.is_k), at.stream, at.head);
    const matrix m = matrix_of(side, at.is_k);
    if (at.first >= m.n_i || !can_seal(store, move)) {
        return;
    }
    const int lane = threadIdx.x % slab, i = at.first + lane;
    const column x = column_of(shared, m.n_j, lane);
    count_bad(args.n_nonfinite, load_slab(at, m, move, open_page_of(side, at.is_k, move.slot), shared));
    __syncthreads();
    if (is_bytes(move.small)) {
        shrink_slab(bytes_at(side, at.is_k, move.small), shared, at.first);
        return;
    }
    const bool own = own_codes(side);
    uint8_t *codes = page_codes(side, at.page);
    if (m.side.rotate) {
        const auto all = [] { __syncthreads(); };
        transform_column<XQ_PAGE / seal_warps>(x, m.n_j, threadIdx.x / slab, seal_warps, all);
    }
    if (threadIdx.x < slab && i < m.n_i) {
        if (!at.is_k && store.mapped) {
            add_predicted(store, at, i, x, column_of(shared + m.n_j * x.stride, m.n_j, lane), -1.0f);
        }
        seal_lane(m, x, i, own ? nullptr : codes, page_param(side, at.page));
    }
    __syncthreads();
    if (own) {
        pack_codes(m, shared, at.first, codes);
    }
}

/* A slab of a page in bytes to its rows. */
__device__ void widen_slab(const slab_place &at, const open_page &page, __half *rows) {
    const int lane = threadIdx.x % slab;
    if (at.is_k) {
        for (int t = 0; at.first + lane < page.width && t < XQ_PAGE; ++t) {
            rows[t * page.width + at.first + lane] = half_of(page, t, at.first + lane);
        }
        return;
    }
    for (int t = at.first; t < at.first + slab; ++t) {
        for (int j = lane; j < page.width; j += slab) {
            rows[t * page.width + j] = half_of(page, t, j);
        }
    }
}

/* grid (slab, side of a KV head, move), one warp each: bytes or codes become rows again. */
__global__ void __launch_bounds__(slab)
    unseal_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_update_args args) {
    extern __shared__ float shared[];
    const page_move &move = move_at(args.unseals, blockIdx.z);
    const slab_place at = {is_key(store, blockIdx.y), move.stream, head_of(store, blockIdx.y), move.page,
                           (int)blockIdx.x * slab};
    const side_view side = side_at(side_of(store, at.is_k), at.stream, at.head);
    if (at.first >= (at.is_k ? side.width : XQ_PAGE) || !can_unseal(store, move)) {
        return;
    }
    __half *rows = open_rows(side, move.slot);
    if (is_bytes(move.small)) {
        widen_slab(at, open_page_of(side, at.is_k, move.small), rows);
    } else {
        unseal_slab(store, at, rows, side.width, shared);
    }
}

constexpr int refill_threads = 256, refill_at_once = 8; /* loads that are on their way */

/* grid (side of a KV head, move): rows of the stage to a slot whose page is sealed by now. */
__global__ void __launch_bounds__(refill_threads)
    refill_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_update_args args) {
    const page_move &move = move_at(args.seals, blockIdx.y);
    if (can_seal(store, move) && is_refilled(store, move)) {
        const side_view side =
            side_at(side_of(store, is_key(store, blockIdx.x)), move.stream, head_of(store, blockIdx.x));
        const auto *from = (const uint4 *)open_rows(side, move.refill);
        auto *to = (uint4 *)open_rows(side, move.slot);
        const int n = XQ_PAGE * side.width / 8;
        for (int first = threadIdx.x; first < n; first += refill_threads * refill_at_once) {
            uint4 some[refill_at_once];
#pragma unroll
            for (int k = 0; k < refill_at_once; ++k) {
                some[k] = first + k * refill_threads < n ? from[first + k * refill_threads] : uint4{};
            }
#pragma unroll
            for (int k = 0; k < refill_at_once; ++k) {
                if (first + k * refill_threads < n) {
                    to[first + k * refill_threads] = some[k];
                }
            }
        }
    }
    if (args.serial && threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0) {
        *args.done = *args.serial;
    }
}

constexpr unsigned max_shares = 256; /* of the tokens */

/* x, the thread's channel, times the normalised Hadamard matrix of blocks of so many channels, at least 16; called by
 * all threads. */
__device__ float rotated(float x, int block) {
    __shared__ float row[XQ_MAX_HEAD_DIM];
    const int j = threadIdx.x;
#pragma unroll 1
    for (int h = 1; h < block && h < 32; h *= 2) {
        x = fmaf(x, j & h ? -1.0f : 1.0f, __shfl_xor_sync(~0u, x, h));
    }
    if (block > 32) { // the same channel of the block's other warps
        __syncthreads();
        row[j] = x;
        __syncthreads();
        const int first = (j & -block) | j % 32, own = j % block / 32;
        x = 0.0f;
#pragma unroll 1
        for (int w = 0; w < block / 32; ++w) {
            x += __popc(w & own) & 1 ? -row[first + 32 * w] : row[first + 32 * w];
        }
    }
    return x * rsqrtf((float)block);
}

/* grid (side of a KV head, share of the tokens), a thread each channel: new keys or values to the open rows that they
 * belong to.  In decoding each instruction takes longer to come than to run: the code is short. */
__global__ void rows_kernel(const __grid_constant__ xq_store store, const __grid_constant__ xq_update_args args) {
    const bool is_k = is_key(store, blockIdx.x);
    const int head = head_of(store, blockIdx.x), j = threadIdx.x;
    const int width = side_of(store, is_k).width;
    wait_for_previous();
    launch_next();
    int bad = 0; // a masked infinity would spoil the sums of the tensor cores: 0 * inf
#pragma unroll 1
    for (int t = blockIdx.y; t < args.n_tokens; t += gridDim.y) {
        const int32_t row = args.rows[t];
        if (!is_row(store, row)) {
            continue;
        }
        float x = j < width ? finite(new_row(args, is_k, t, head)[j], bad) : 0.0f;
        if (is_k && args.rotate) {
            x = clamped(rotated(x, hadamard_block(width)));
        }
        if (j < width) {
            ((__half *)row_at(store, is_k, head, row))[j] = __float2half_rn(x);
        }
    }
    count_bad(args.n_nonfinite, bad);
}

} // namespace

int launch_update(const xq_store &store, const xq_update_args &args, cudaStream_t stream) {
    const size_t shared = slab_bytes(store);
    const unsigned n_slabs = slabs_of(store), sides = n_sides(store) * (unsigned)store.n_head_kv;
    if (args.n_seals > 0 && allow_shared(seal_kernel, shared)) {
        seal_kernel<<<dim3(n_slabs, sides, args.n_seals), seal_warps * slab, shared, stream>>>(store, args);
    }
    if (args.n_seals > 0 && (store.n_staged > 0 || args.serial)) {
        refill_kernel<<<dim3(sides, args.n_seals), refill_threads, 0, stream>>>(store, args);
    }
    if (args.n_unseals > 0 && allow_shared(unseal_kernel, shared)) {
        unseal_kernel<<<dim3(n_slabs, sides, args.n_unseals), slab, shared, stream>>>(store, args);
    }
    if (args.n_tokens > 0 && store.n_staged > 0) { // masked rows take part as 0 * x: x must be finite
        const int64_t width = store.k.width + store.v.width;
        cudaMemsetAsync(store.k.stage, 0, store.n_staged * width * store.n_head_kv * XQ_PAGE * sizeof(__half), stream);
    }
    if (args.n_tokens > 0) {
        const unsigned n_tokens = (unsigned)args.n_tokens, n_shares = n_tokens < max_shares ? n_tokens : max_shares;
        const int width = store.k.width > store.v.width ? store.k.width : store.v.width;
        launch_early(rows_kernel, dim3(sides, n_shares), (unsigned)(width + 31) / 32 * 32, 0, stream, store, args);
    }
    return launched("update");
}

} // namespace xq
