/* wide_open.cuh: products of open pages with 8 NT query rows: F16 rows, or bytes, which become F16 as they are loaded.
 * wide_codes.cuh says where the other operand lies.
 */
#pragma once

#include "wide_codes.cuh"

namespace xq {

namespace {

/* What open pages lie in, from some token and channel on: the k-th token's channels i .. i + 3 as halves, and the rows
 * of the product's next 16 tokens.  keys_at_once, values_at_once: how many loads are on their way together, as
 * registers allow. */
struct half_rows {
    static constexpr int keys_at_once = 4, values_at_once = 2;
    const __half *at;
    int token; /* elements from token to token */

    __device__ uint2 four(int k, int i) const { return *(const uint2 *)(at + k * token + i); }
    __device__ uint4 eight(int k, int i) const { return *(const uint4 *)(at + k * token + i); }
    __device__ void forward() { at += 16 * token; }
};
/* Bytes whose parameters are channels'. */
struct key_bytes {
    static constexpr int keys_at_once = 1, values_at_once = 1;
    const int8_t *at;
    int token;
    const __half *scale, *centre; /* of the same channel */

    __device__ uint2 four(int k, int i) const {
        return widen_four(*(const uint32_t *)(at + k * token + i), *(const uint2 *)(scale + i),
                          *(const uint2 *)(centre + i));
    }
    __device__ uint4 eight(int k, int i) const {
        const uint2 bytes = *(const uint2 *)(at + k * token + i);
        const uint4 s = *(const uint4 *)(scale + i), c = *(const uint4 *)(centre + i);
        const uint2 a = widen_four(bytes.x, make_uint2(s.x, s.y), make_uint2(c.x, c.y));
        const uint2 b = widen_four(bytes.y, make_uint2(s.z, s.w), make_uint2(c.z, c.w));
        return make_uint4(a.x, a.y, b.x, b.y);
    }
    __device__ void forward() { at += 16 * token; }
};
/* Bytes whose parameters are tokens'. */
struct value_bytes {
    static constexpr int values_at_once = 1;
    const int8_t *at;
    int token;
    const __half *scale, *centre; /* of the same token, the first of four */

    __device__ uint2 four(int k, int i) const {
        return widen_four(*(const uint32_t *)(at + k * token + i), four_times(*(const uint2 *)scale, k),
                          four_times(*(const uint2 *)centre, k));
    }
    __device__ void forward() {
        at += 16 * token;
        scale += 16;
        centre += 16;
    }
};
/* f(what a page of keys or values lies in, from a token and a channel on). */
template <bool KEYS, typename F>
__device__ void with_rows(const side_view &side, int slot, int token, int channel, const F &f) {
    const int at = token * side.width + channel;
    if (!is_bytes(slot)) {
        f(half_rows{open_rows(side, slot) + at, side.width});
        return;
    }
    const byte_page page = bytes_at(side, KEYS, slot);
    const auto *scale = (const __half *)page.scale + (KEYS ? channel : token);
    using rows = std::conditional_t<KEYS, key_bytes, value_bytes>;
    f(rows{page.codes + at, side.width, scale, scale + page.n});
}

/* Scores of open rows: y grows by their products with the queries.  rows: of this lane's first token, which the other
 * N - 1 follow; part: the low one, which has every channel once; queries: this lane's first fragment. */
template <int N, int NT, typename ROWS>
__device__ void add_open_scores(float (&y)[N / 2][NT][4], const code_part &part, int width, const ROWS &rows,
                                const uint8_t *queries, int t) {
    const int log = 31 - __clz(part.planes);
#pragma unroll ROWS::keys_at_once
    for (int n = 0; n < part.products(); n += 2, queries += 2 * product_bytes<NT>) { // two planes: eight channels
        const int plane = n & (part.planes - 1), i = 4 * (part.planes * (4 * (n >> log) + t) + plane);
        uint4 x[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            x[k] = i < width ? rows.eight(k, i) : uint4{};
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto b = fragment<NT>::load(queries + half * product_bytes<NT>);
            const float back = power_of_two(part.bits * (plane + half));
            uint32_t a[N][2];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const uint2 four = half == 0 ? make_uint2(x[k].x, x[k].y) : make_uint2(x[k].z, x[k].w);
                a[k][0] = even(four), a[k][1] = odd(four);
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
                for (int pair = 0; pair < N / 2; ++pair) {
                    float c[4] = {};
                    multiply(c, a[2 * pair][0], a[2 * pair + 1][0], a[2 * pair][1], a[2 * pair + 1][1], b.x[nt][0],
                             b.x[nt][1]);
                    for (int k = 0; k < 4; ++k) {
                        y[pair][nt][k] += c[k] * back;
                    }
                }
            }
        }
    }
}

/* Adds what open rows say of T / 2 chunks of 32 channels, step apart, n of which exist.  rows: this lane's four
 * channels of its first chunk, of the page's token 4 t; has: its channels of the last chunk exist; p: all fragments, in
 * the order of tokens. */
template <int T, int NT, typename ROWS>
__device__ void add_open_values(float (&out)[T][NT][4], ROWS rows, int step, int n, bool has, const uint8_t *p) {
    const int lane = threadIdx.x % 32, mine[2] = {place_of_p<NT>(0, lane), place_of_p<NT>(1, lane)};
#pragma unroll ROWS::values_at_once
    for (int j = 0; j < page_products; ++j, rows.forward(), p += product_bytes<NT>) {
        const auto b = fragment<NT>::load(p + mine[j % 2]);
#pragma unroll
        for (int c = 0; c < T / 2; ++c) {
            if (c > 0 && c >= n) {
                break;
            }
            uint2 x[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                x[k] = c + 1 < n || has ? rows.four(k, c * step) : uint2{};
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                multiply(out[2 * c][nt], __byte_perm(x[0].x, x[2].x, 0x5410), __byte_perm(x[0].x, x[2].x, 0x7632),
                         __byte_perm(x[1].x, x[3].x, 0x5410), __byte_perm(x[1].x, x[3].x, 0x7632), b.x[nt][0],
                         b.x[nt][1]);
                multiply(out[2 * c + 1][nt], __byte_perm(x[0].y, x[2].y, 0x5410), __byte_perm(x[0].y, x[2].y, 0x7632),
                         __byte_perm(x[1].y, x[3].y, 0x5410), __byte_perm(x[1].y, x[3].y, 0x7632), b.x[nt][0],
                         b.x[nt][1]);
            }
        }
    }
}

} // namespace

} // namespace xq
