/* unpack.cu: pages as F16 rows [cell][KV head][width]: for prompts, where one pass over the codes serves hundreds of
 * query rows.
 *
 *     x^ = base + scale * (code - middle)          values then times the Hadamard matrix
 *
 * A lane takes tiles of four tokens by eight channels, whose codes are one (keys) or two (values) words of 16 bytes
 * and whose rows it stores 16 bytes at a time, so that memory is all that is waited for.  The transform is done in
 * registers: three steps in a lane, the others between lanes.  Same operations as the CPU codec's, in an order that
 * changes no operand: same bits.  Mapped values and blocks of more than 256 channels take slabs (lanes.cuh).
 */
#include "lanes.cuh"
#include "launch.h"

namespace xq {

namespace {

/* One page of one KV head, and where its rows go. */
struct target {
    int stream, head, page, slot;
    __half *rows;
    int64_t stride; /* elements, of a cell */
};

__device__ target target_of(const xq_store &store, const xq_unpack_args &args, bool is_k, int page,
                            int stream_and_head) {
    const int nth_stream = stream_and_head / args.n_heads, nth_head = stream_and_head % args.n_heads;
    const int stream = safe_stream(store, stream_of(args.first_stream, nth_stream));
    return {stream,
            args.first_head + nth_head,
            page,
            safe_slot(store, page, table_of(store, args.table, stream)[page]),
            (__half *)unpacked_row(store, args, nth_stream, page, 0, nth_head),
            (int64_t)args.n_heads * side_of(store, is_k).width};
}

/* ---- tiles ---- */

constexpr int tile_tokens = 4, tile_channels = 8, tile_threads = 128;

__device__ uint32_t word_of(const uint4 &four, int n) {
    return n == 0 ? four.x : n == 1 ? four.y : n == 2 ? four.z : four.w;
}

/* Codes of one part of 1, 2 or 4 bits, four rows i a word, or-ed into `codes` at bit `to`.  column: of the 16 columns;
 * N words at columns j, j + 1, ... and the rows from i on, ROWS words of four rows each. */
template <int BITS, int N, int ROWS>
__device__ void add_part(const uint8_t *column, int j, int i, int to, uint32_t (&codes)[N][ROWS]) {
    constexpr int rows = 32 / BITS;
    constexpr uint32_t mask = ((1u << BITS) - 1) * 0x01010101u;
    const uint4 *at = (const uint4 *)(column + 64 * (i / rows) + 4 * (j % 16));
#pragma unroll
    for (int n = 0; n < N; n += 4) {
        const uint4 four = __ldg(at + n / 4);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                codes[n + k][r] |= (word_of(four, k) >> (BITS * (i % rows / 4 + r)) & mask) << to;
            }
        }
    }
}

template <int BITS, int N, int ROWS>
__device__ void load_codes(const uint8_t *codes, int n_i, int j, int i, uint32_t (&out)[N][ROWS]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            out[n][r] = 0;
        }
    }
    const uint8_t *column = codes + (int64_t)(j / 16) * column_bytes(BITS, n_i);
    if constexpr (BITS == 3) {
        add_part<2>(column, j, i, 0, out);
        add_part<1>(column + 64 * units_of(2, n_i), j, i, 2, out);
    } else if constexpr (BITS > 0) {
        add_part<BITS>(column, j, i, 0, out);
    }
}

/* Byte n of four codes, less middle: by way of 2^15 + code, which bytes make up. */
__device__ float centred(uint32_t four, int n, float middle) {
    return __uint_as_float(__byte_perm(four, 0x47000000u, 0x7404u | n << 4)) - (32768.0f + middle);
}

/* Scale and base of N rows from i on; at: the group's. */
template <int N>
__device__ void load_rows(const xq_side &side, const uint8_t *at, int n_i, int i, float (&scale)[N], float (&base)[N]) {
    if (side.bits == 0 || side.param == XQ_PARAM_F16) {
        const __half2 *h[] = {(const __half2 *)((const __half *)at + i),
                              (const __half2 *)((const __half *)at + n_i + i)};
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            const float2 first = __half22float2(h[0][n / 2]);
            const float2 second = side.bits == 0 ? first : __half22float2(h[1][n / 2]);
            scale[n] = first.x, scale[n + 1] = first.y;
            base[n] = second.x, base[n + 1] = second.y;
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        scale[n] = log8_scale(at[i + n]);
        base[n] = (float)(int8_t)at[n_i + i + n] * (scale[n] * 0.125f);
    }
}

/* x [token][channel] of a page's tile, as it is stored. */
template <bool IS_K, int BITS>
__device__ void load_tile(const side_view &side, int page, int t, int c, float (&x)[tile_tokens][tile_channels]) {
    const uint8_t *codes = page_codes(side, page), *param = page_param(side, page);
    const bool f16 = side.plan.param == XQ_PARAM_F16;
    const float middle = f16 ? 0.0f : (float)((1 << BITS) - 1) * 0.5f;
    const int n_i = IS_K ? side.width : XQ_PAGE, n_j = IS_K ? XQ_PAGE : side.width;
    param += (IS_K ? t : c) / group_length(side.plan, n_j) * parameter_bytes(side.plan, n_i);
    constexpr int n_param = IS_K ? tile_channels : tile_tokens;
    float scale[n_param], base[n_param];
    load_rows(side.plan, param, n_i, IS_K ? c : t, scale, base);
    uint32_t four[IS_K ? tile_tokens : tile_channels][IS_K ? 2 : 1];
    load_codes<BITS>(codes, n_i, IS_K ? t : c, IS_K ? c : t, four);
#pragma unroll
    for (int n = 0; n < tile_tokens; ++n) {
#pragma unroll
        for (int k = 0; k < tile_channels; ++k) {
            const int p = IS_K ? k : n;
            const float code = IS_K ? centred(four[n][k / 4], k % 4, middle) : centred(four[k][0], n, middle);
            x[n][k] = BITS == 0 ? base[p] : base[p] + scale[p] * code;
        }
    }
}

/* The rows of a tile times the Hadamard matrix; neighbouring lanes hold neighbouring channels. */
__device__ void transform_tile(float (&x)[tile_tokens][tile_channels], int block, float norm, int c) {
#pragma unroll
    for (int h = 1; h < tile_channels; h *= 2) {
#pragma unroll
        for (int n = 0; n < tile_tokens; ++n) {
#pragma unroll
            for (int k = 0; k < tile_channels; ++k) {
                if ((k & h) == 0) {
                    const float a = x[n][k], b = x[n][k + h];
                    x[n][k] = a + b;
                    x[n][k + h] = a - b;
                }
            }
        }
    }
    for (int h = tile_channels; h < block; h *= 2) {
        const float sign = c & h ? -1.0f : 1.0f; // the product is exact: a + b or a - b
#pragma unroll
        for (int n = 0; n < tile_tokens; ++n) {
#pragma unroll
            for (int k = 0; k < tile_channels; ++k) {
                const float other = __shfl_xor_sync(0xffffffffu, x[n][k], h / tile_channels);
                x[n][k] = __fmaf_rn(sign, x[n][k], other);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < tile_tokens; ++n) {
#pragma unroll
        for (int k = 0; k < tile_channels; ++k) {
            x[n][k] = x[n][k] * norm;
        }
    }
}

/* As to_half: what is too large becomes an infinity first; of a half that is not a number no bit is kept. */
__device__ uint32_t two_halves(float a, float b) {
    const __half2 top = __float2half2_rn(65504.0f), x = __floats2half2_rn(a, b);
    const __half2 both = __hmax2(__hmin2(x, top), __hneg2(top));
    uint32_t bits;
    memcpy(&bits, &both, 4);
    return bits & __heq2_mask(x, x);
}

/* Eight channels from c on of token t of a page in bytes, as halves. */
__device__ uint4 widened(const byte_page &page, int t, int c) {
    const uint2 codes = *(const uint2 *)(page.codes + t * page.width + c);
    const __half *scale = (const __half *)page.scale + (page.by_channel ? c : t);
    float x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const __half *at = scale + (page.by_channel ? k : 0);
        const auto code = (float)(int8_t)((k < 4 ? codes.x : codes.y) >> 8 * (k % 4));
        x[k] = __half2float(at[page.n]) + __half2float(*at) * code;
    }
    return {two_halves(x[0], x[1]), two_halves(x[2], x[3]), two_halves(x[4], x[5]), two_halves(x[6], x[7])};
}

/* grid (page, stream * KV head).  A page has 4 * width tiles, a multiple of 64: warps stay whole. */
template <bool IS_K, int BITS>
__global__ void __launch_bounds__(tile_threads)
    unpack_tiles(const __grid_constant__ xq_store store, const __grid_constant__ xq_unpack_args args,
                 const float norm) {
    const target to = target_of(store, args, IS_K, blockIdx.x, blockIdx.y);
    const side_view side = side_at(side_of(store, IS_K), to.stream, to.head);
    const int n = side.width / tile_channels;
    for (int tile = threadIdx.x; tile < XQ_PAGE / tile_tokens * n; tile += tile_threads) {
        const int t = tile / n * tile_tokens, c = tile % n * tile_channels;
        uint4 rows[tile_tokens] = {};
        if (to.slot == XQ_SLOT_SEALED) {
            float x[tile_tokens][tile_channels];
            load_tile<IS_K, BITS>(side, to.page, t, c, x);
            if (!IS_K && side.plan.rotate) {
                transform_tile(x, hadamard_block(side.width), norm, c);
            }
#pragma unroll
            for (int k = 0; k < tile_tokens; ++k) {
                rows[k] = {two_halves(x[k][0], x[k][1]), two_halves(x[k][2], x[k][3]), two_halves(x[k][4], x[k][5]),
                           two_halves(x[k][6], x[k][7])};
            }
        } else if (is_bytes(to.slot)) {
            const byte_page page = bytes_at(side, IS_K, to.slot);
#pragma unroll
            for (int k = 0; k < tile_tokens; ++k) {
                rows[k] = widened(page, t + k, c);
            }
        } else if (to.slot >= 0) {
#pragma unroll
            for (int k = 0; k < tile_tokens; ++k) {
                rows[k] = *(const uint4 *)(open_rows(side, to.slot) + (int64_t)(t + k) * side.width + c);
            }
        }
#pragma unroll
        for (int k = 0; k < tile_tokens; ++k) {
            *(uint4 *)(to.rows + (t + k) * to.stride + c) = rows[k];
        }
    }
}

bool tiles_cover(const xq_store &store, bool is_k) {
    return is_k || (!store.mapped && hadamard_block(store.v.width) <= 32 * tile_channels);
}

template <bool IS_K> void launch_tiles(const xq_store &store, const xq_unpack_args &args, cudaStream_t stream) {
    const dim3 grid(args.n_kv_pages, args.n_streams * args.n_heads);
    const float norm = (float)(1.0 / std::sqrt((double)hadamard_block(store.v.width)));
    switch (side_of(store, IS_K).plan.bits) {
    case 0:
        return unpack_tiles<IS_K, 0><<<grid, tile_threads, 0, stream>>>(store, args, norm);
    case 1:
        return unpack_tiles<IS_K, 1><<<grid, tile_threads, 0, stream>>>(store, args, norm);
    case 2:
        return unpack_tiles<IS_K, 2><<<grid, tile_threads, 0, stream>>>(store, args, norm);
    case 3:
        return unpack_tiles<IS_K, 3><<<grid, tile_threads, 0, stream>>>(store, args, norm);
    default:
        return unpack_tiles<IS_K, 4><<<grid, tile_threads, 0, stream>>>(store, args, norm);
    }
}

/* ---- slabs ---- */

/* grid (slab, page, stream * KV head), one warp each */
__global__ void __launch_bounds__(slab)
    unpack_slabs(const __grid_constant__ xq_store store, const __grid_constant__ xq_unpack_args args) {
    extern __shared__ float shared[];
    const bool is_k = args.is_k != 0;
    const target to = target_of(store, args, is_k, blockIdx.y, blockIdx.z);
    const int first = blockIdx.x * slab, width = side_of(store, is_k).width;
    if (to.slot == XQ_SLOT_SEALED) {
        if (first < (is_k ? width : XQ_PAGE)) {
            unseal_slab(store, {is_k, to.stream, to.head, to.page, first}, to.rows, to.stride, shared);
        }
        return;
    }
    const side_view side = side_at(side_of(store, is_k), to.stream, to.head);
    const bool open = to.slot >= 0, bytes = is_bytes(to.slot);
    const auto *from = (const uint4 *)open_rows(side, open ? to.slot : 0);
    const byte_page page = bytes_at(side, is_k, bytes ? to.slot : XQ_SLOT_BYTES);
    const int n = width / 8; // of a row
    for (int k = blockIdx.x * slab + threadIdx.x; k < XQ_PAGE * n; k += gridDim.x * slab) {
        *(uint4 *)(to.rows + k / n * to.stride + k % n * 8) = open    ? from[k]
                                                              : bytes ? widened(page, k / n, k % n * 8)
                                                                      : uint4{};
    }
}

} // namespace

int launch_unpack(const xq_store &store, const xq_unpack_args &args, cudaStream_t stream) {
    const bool is_k = args.is_k != 0;
    if (tiles_cover(store, is_k)) {
        is_k ? launch_tiles<true>(store, args, stream) : launch_tiles<false>(store, args, stream);
        return launched("unpack");
    }
    const size_t shared = slab_bytes(store);
    if (allow_shared(unpack_slabs, shared)) {
        const dim3 grid(slabs_of(store), args.n_kv_pages, args.n_streams * args.n_heads);
        unpack_slabs<<<grid, slab, shared, stream>>>(store, args);
    }
    return launched("unpack");
}

} // namespace xq
