/* solo_open.cuh: open pages of a stream, in pieces of 16 tokens that the blocks of a KV head share out.
 *
 * A block owns every n_parts-th piece, whichever part the page is in: a page takes a block as long as many sealed ones.
 * All warps work on a piece: each takes an eighth of the channels of keys to a share of the scores, then, when the
 * shares are added up, an eighth of the channels of values.
 */
#pragma once

#include "solo_page.cuh"
#include "solo_shape.h"
#include "wide_join.cuh"

namespace xq {

namespace {

constexpr int piece_tokens = 16; /* tokens */
constexpr int page_pieces = XQ_PAGE / piece_tokens;

/* Sums of a warp over pieces; max and sum are those of the whole block. */
template <int E, int NT> struct open_sums {
    static constexpr int tiles = E / 16 / solo_warps; /* of 16 channels; two by two, chunks warp + 8 c of 32 */
    float out[tiles][NT][4], max[2 * NT], sum[2 * NT];

    __device__ void clear() {
        for (int k = 0; k < tiles * NT * 4; ++k) {
            out[k / (4 * NT)][k / 4 % NT][k % 4] = 0.0f;
        }
        for (int r = 0; r < 2 * NT; ++r) {
            max[r] = -INFINITY;
            sum[r] = 0.0f;
        }
    }
};

/* Which pages are open, a bit each: notes `step` words of 32 pages, `first` of them the first, by a warp. */
__device__ inline void find_open_pages(uint32_t *bits, const xq_store &store, const int32_t *table, int n_pages,
                                       int first, int step, int lane) {
#pragma unroll 4
    for (int word = first; 32 * word < n_pages; word += step) {
        const int page = 32 * word + lane;
        const bool open = page < n_pages && is_open(safe_slot(store, page, table[page]));
        const uint32_t all = __ballot_sync(~0u, open);
        if (lane == 0) {
            bits[word] = all;
        }
    }
}

/* The n-th open page, by a warp; -1: there are fewer. */
__device__ inline int nth_open_page(const uint32_t *bits, int n_pages, int n, int lane) {
    const int n_words = (n_pages + 31) / 32;
#pragma unroll 1
    for (int base = 0; base < n_words; base += 32) {
        uint32_t own = base + lane < n_words ? bits[base + lane] : 0;
        int end = __popc(own); // of the open pages up to this lane's
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(~0u, end, step);
            end += lane >= step ? before : 0;
        }
        const uint32_t beyond = __ballot_sync(~0u, end > n);
        if (beyond) {
            const int lane_of = __ffs(beyond) - 1;
            uint32_t word = __shfl_sync(~0u, own, lane_of);
            for (int k = n - __shfl_sync(~0u, end - __popc(own), lane_of); k > 0; --k) {
                word &= word - 1;
            }
            return 32 * (base + lane_of) + __ffs(word) - 1;
        }
        n -= __shfl_sync(~0u, end, 31);
    }
    return -1;
}

/* A piece: [16][E] of F16, or of bytes with scales of channels and of tokens, and centres behind all scales of a page.
 */
struct piece_rows {
    const void *k, *v;
    const __half *k_scale, *v_scale; /* null: F16 */
};
template <int E> __device__ piece_rows rows_of_piece(const side_view &k, const side_view &v, int slot, int nth) {
    const int first = nth * piece_tokens;
    if (is_bytes(slot)) {
        const byte_page a = bytes_at(k, true, slot), b = bytes_at(v, false, slot);
        return {a.codes + first * E, b.codes + first * E, (const __half *)a.scale, (const __half *)b.scale + first};
    }
    return {open_rows(k, slot) + first * E, open_rows(v, slot) + first * E, nullptr, nullptr};
}

/* What a warp needs of a piece, in registers. */
template <int KB, int E> struct open_piece {
    static constexpr int bits = KB == 3 ? 2 : KB, planes = 8 / bits; // q lies in the order of the low part of the codes
    static constexpr int products = E / 16 / solo_warps, chunks = E / 32 / solo_warps;
    uint4 k[products / 2][2]; // of tokens 2 g and 2 g + 1: eight channels of two planes
    uint2 v[chunks][4];       // of tokens 4 t ..: channels 4 g .. + 3
    uint32_t masks[1];
    const __half *k_scale, *v_scale; // not null: k and v begin with bytes

    static __device__ int channel(int h, int warp, int t) { // the first of eight
        const int n = products * warp + 2 * h;
        return 4 * (planes * (4 * (n / planes) + t) + n % planes);
    }
    /* mask: of the first token, or null. */
    __device__ void load(const piece_rows &rows, const __half *mask, int warp, const lane_place &place) {
#pragma unroll
        for (int h = 0; h < products / 2; ++h) {
            for (int w = 0; w < 2; ++w) {
                const int at = (2 * place.g + w) * E + channel(h, warp, place.t);
                if (rows.k_scale) {
                    const uint2 x = *(const uint2 *)((const int8_t *)rows.k + at);
                    k[h][w] = {x.x, x.y, 0, 0};
                } else {
                    k[h][w] = *(const uint4 *)((const __half *)rows.k + at);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
            for (int w = 0; w < 4; ++w) {
                const int at = (4 * place.t + w) * E + 32 * (warp + solo_warps * c) + 4 * place.g;
                if (rows.k_scale) {
                    v[c][w] = {*(const uint32_t *)((const int8_t *)rows.v + at), 0};
                } else {
                    v[c][w] = *(const uint2 *)((const __half *)rows.v + at);
                }
            }
        }
        k_scale = rows.k_scale;
        v_scale = rows.v_scale;
        masks[0] = mask ? *(const uint32_t *)(mask + 2 * place.g) : 0;
    }

    /* Bytes become halves, when they are wanted: whoever loads a piece does not wait for it. */
    __device__ void widen(int warp, const lane_place &place) {
        if (!k_scale) {
            return;
        }
#pragma unroll
        for (int h = 0; h < products / 2; ++h) {
            const __half *at = k_scale + channel(h, warp, place.t);
            const uint4 scale = *(const uint4 *)at, centre = *(const uint4 *)(at + E);
            for (uint4 &x : k[h]) {
                const uint2 low = widen_four(x.x, {scale.x, scale.y}, {centre.x, centre.y});
                const uint2 high = widen_four(x.y, {scale.z, scale.w}, {centre.z, centre.w});
                x = {low.x, low.y, high.x, high.y};
            }
        }
        const auto *at = (const uint2 *)(v_scale + 4 * place.t),
                   *behind = (const uint2 *)(v_scale + 4 * place.t + XQ_PAGE);
        const uint2 scale = *at, centre = *behind;
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
            for (int w = 0; w < 4; ++w) {
                v[c][w] = widen_four(v[c][w].x, four_times(scale, w), four_times(centre, w));
            }
        }
    }
};

/* Adds a piece, by all warps, which meet in here.  shares: [warp][tile][lane] scores, which the block has done with. */
template <int KB, int E, int NT>
__device__ void add_open_piece(open_sums<E, NT> &sums, open_piece<KB, E> &piece, const uint8_t *queries,
                               const wide_tile<NT> &tile, float4 *shares, int warp, const lane_place &place) {
    constexpr int bits = piece.bits, planes = piece.planes, products = piece.products, chunks = piece.chunks;
    piece.widen(warp, place);
    float s[NT][4] = {};
#pragma unroll
    for (int n = 0; n < products; ++n) {
        const auto q =
            fragment<NT>::load(queries + (products * warp + n) * product_bytes<NT> + place.lane * lane_bytes<NT>);
        const float back = power_of_two(bits * ((products * warp + n) % planes));
        const auto four = [&](const uint4 &x) { return n % 2 == 0 ? make_uint2(x.x, x.y) : make_uint2(x.z, x.w); };
        const uint2 a = four(piece.k[n / 2][0]), b = four(piece.k[n / 2][1]);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            float c[4] = {};
            multiply(c, even(a), even(b), odd(a), odd(b), q.x[nt][0], q.x[nt][1]);
            for (int i = 0; i < 4; ++i) {
                s[nt][i] += c[i] * back;
            }
        }
    }
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        shares[(warp * NT + nt) * 32 + place.lane] = make_float4(s[nt][0], s[nt][1], s[nt][2], s[nt][3]);
    }
    __syncthreads();
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
        const float2 factor = *(const float2 *)(tile.factor + row_of(2 * nt, place.t));
        float4 all = {};
#pragma unroll
        for (int w = 0; w < solo_warps; ++w) {
            const float4 x = shares[(w * NT + nt) * 32 + place.lane];
            all = make_float4(all.x + x.x, all.y + x.y, all.z + x.z, all.w + x.w);
        }
        float p[2][2] = {{all.x * factor.x, all.y * factor.y}, {all.z * factor.x, all.w * factor.y}}; // [token][row]
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            for (int w = 0; w < 2; ++w) {
                const float m = mask_of<2>(piece.masks, w);
                p[w][r] = m == -INFINITY ? -INFINITY : p[w][r] + m * log2e;
            }
            float &max = sums.max[2 * nt + r];
            const float top = fmaxf(max, over_tokens(fmaxf(p[0][r], p[1][r]))), safe = top == -INFINITY ? 0.0f : top;
            const float by = quick_exp2(max - safe);
            for (int w = 0; w < 2; ++w) {
                p[w][r] = quick_exp2(p[w][r] - safe);
            }
            sums.sum[2 * nt + r] = sums.sum[2 * nt + r] * by + p[0][r] + p[1][r];
            max = top;
#pragma unroll
            for (int i = 0; i < sums.tiles; ++i) {
                sums.out[i][nt][r] *= by;
                sums.out[i][nt][2 + r] *= by;
            }
        }
        constexpr float unit = 1 << p_bits;
        const uint32_t b[2] = {transpose(halves(p[0][0] * unit, p[0][1] * unit)),
                               transpose(halves(p[1][0] * unit, p[1][1] * unit))};
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
            const uint2(&x)[4] = piece.v[c];
            multiply(sums.out[2 * c][nt], __byte_perm(x[0].x, x[2].x, 0x5410), __byte_perm(x[0].x, x[2].x, 0x7632),
                     __byte_perm(x[1].x, x[3].x, 0x5410), __byte_perm(x[1].x, x[3].x, 0x7632), b[0], b[1]);
            multiply(sums.out[2 * c + 1][nt], __byte_perm(x[0].y, x[2].y, 0x5410), __byte_perm(x[0].y, x[2].y, 0x7632),
                     __byte_perm(x[1].y, x[3].y, 0x5410), __byte_perm(x[1].y, x[3].y, 0x7632), b[0], b[1]);
        }
    }
}

/* Where a block's sums over open pages lie till its rows are joined: where these will lie. */
struct open_in_memory {
    const xq_attend_args &args;
    const wide_call &call;
    const block_task &task;

    __device__ float2 *heads() const {
        return (float2 *)(args.partial + args.n_parts * rows_of_part(args) * call.width);
    }
    __device__ float2 head(int, int row) const { return heads()[row_of_part(args, call, task, row)]; }
    __device__ float *values(int, int row) const {
        return args.partial + row_of_part(args, call, task, row) * call.width;
    }

    template <int E, int NT>
    __device__ void store(const open_sums<E, NT> &sums, int warp, const lane_place &place) const {
        const int n = min(wide_rows<NT>, call.rows_of_head - task.first_row);
        constexpr float unit = 1.0f / (1 << p_bits);
#pragma unroll
        for (int r = 0; r < 2 * NT; ++r) {
            const int row = row_of(r, place.t), nt = r / 2, odd = r % 2;
            const float sum = sum_over_tokens(sums.sum[r]);
            if (row >= n) {
                continue;
            }
            if (warp == 0 && place.g == 0) {
                heads()[row_of_part(args, call, task, row)] = make_float2(sums.max[r], sum);
            }
#pragma unroll
            for (int c = 0; c < sums.tiles / 2; ++c) {
                auto *out = (float2 *)(values(0, row) + 32 * (warp + solo_warps * c) + 4 * place.g);
                const auto &a = sums.out[2 * c][nt], &b = sums.out[2 * c + 1][nt];
                out[0] = make_float2(a[odd] * unit, a[2 + odd] * unit);
                out[1] = make_float2(b[odd] * unit, b[2 + odd] * unit);
            }
        }
    }
};

} // namespace

} // namespace xq
