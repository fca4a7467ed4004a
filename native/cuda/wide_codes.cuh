/* wide_codes.cuh: products of codes with 8 NT query rows, of any width, by teams of W warps (codes_mma.cuh has the
 * layout).
 *
 * Operand B, the vectors that codes are multiplied with, lies in shared memory in the order in which products take it,
 * so that a lane reads what it needs for all NT tiles at once: [product][lane][NT][2] registers.  Of a quad of rows i
 * (wide_shape.h) the first register holds elements 0 and 2, the second 1 and 3.  A mask leaves code * 2^(B p) of plane
 * p: 2^-(B p) is part of what lies there.
 *
 * Latent values contract over tokens, j, so that four words of four tokens are transposed first: a lane has unit g of
 * eight and, of each 16 tokens, 4 t .. 4 t + 3; rows g and g + 8 of operand A are two channels of its unit.
 */
#pragma once

#include "attend_page.cuh"
#include "wide_shape.h"

#include <type_traits>

namespace xq {

namespace {

/* Where a thread stands: the member-th of W warps of a team. */
template <int W> struct wide_place : lane_place {
    static constexpr int size = W;
    static constexpr bool may_lack_values = true; /* of a latent layer */
    int team, member;

    static __device__ wide_place here() {
        const int warp = threadIdx.x / 32;
        return {lane_place::here(), warp / W, warp % W};
    }
    /* Waits for the team's other warps. */
    __device__ void meet() const { asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(32 * W) : "memory"); }
};

/* ---- operand B ---- */

template <int NT> constexpr int lane_bytes = 8 * NT;
template <int NT> constexpr int product_bytes = 32 * lane_bytes<NT>;

template <int NT> struct fragment {
    uint32_t x[NT][2];

    static __device__ fragment load(const uint8_t *at) {
        fragment out;
        if constexpr (NT == 2) {
            const uint4 y = *(const uint4 *)at;
            out.x[0][0] = y.x, out.x[0][1] = y.y, out.x[NT - 1][0] = y.z, out.x[NT - 1][1] = y.w;
        } else {
            const uint2 y = *(const uint2 *)at;
            out.x[0][0] = y.x, out.x[0][1] = y.y;
        }
        return out;
    }
    __device__ void store(uint8_t *at) const {
        if constexpr (NT == 2) {
            *(uint4 *)at = make_uint4(x[0][0], x[0][1], x[NT - 1][0], x[NT - 1][1]);
        } else {
            *(uint2 *)at = make_uint2(x[0][0], x[0][1]);
        }
    }
    /* Times two registers, of all rows alike. */
    __device__ fragment times(uint2 y) const {
        fragment out;
        for (int nt = 0; nt < NT; ++nt) {
            out.x[nt][0] = as_bits(__hmul2(as_half2(x[nt][0]), as_half2(y.x)));
            out.x[nt][1] = as_bits(__hmul2(as_half2(x[nt][1]), as_half2(y.y)));
        }
        return out;
    }
};

/* Where the quad-th four elements of query row `row` lie among the queries; planes: a power of two. */
template <int NT> __device__ int place_of_quad(int planes, int quad, int row) {
    const int log = 31 - __clz(planes), unit = quad >> log, plane = quad & (planes - 1);
    return (unit / 4 * planes + plane) * product_bytes<NT> + (row % 8 * 4 + unit % 4) * lane_bytes<NT> + row / 8 * 8;
}
/* 2^-(B p) of a quad. */
__device__ inline float weight_of_quad(const code_part &part, int quad) {
    return power_of_two(-part.bits * (quad & (part.planes - 1)));
}

/* p of the n-th product: lanes' fragments are interchanged, so that lanes that write, four lanes t and many g at a
 * time, meet few conflicts of banks.  Bytes from the product's start. */
template <int NT> __device__ int place_of_p(int n, int lane) {
    return (lane ^ (lane >> 3 & 1) << 2 ^ (lane >> 4 & 1) << 1 ^ (n & 1)) * lane_bytes<NT>;
}

/* f(number) with a part's bits as a number that the compiler knows. */
template <typename F> __device__ void with_bits(int bits, const F &f) {
    if (bits == 4) {
        f(std::integral_constant<int, 4>());
    } else if (bits == 2) {
        f(std::integral_constant<int, 2>());
    } else {
        f(std::integral_constant<int, 1>());
    }
}

/* ---- keys ---- */

/* Folds one part of the queries with the scales of one tile of keys: this warp's products; param: the tile's.
 * constant: grows by q times the zero points; of the low part, which has every channel once. */
template <int BITS, bool F16, int W, int NT>
__device__ void fold_part(int steps, bool is_low, const xq_side &side, int width, const uint8_t *param,
                          const uint8_t *queries, uint8_t *folded, float (&constant)[NT][2],
                          const wide_place<W> &place) {
    constexpr int planes = 8 / BITS, at_once = W / planes > 0 ? W / planes : 1; // steps that the team takes at once
    constexpr int own = planes > W ? planes / W : 1;                            // planes of a warp
    const int first_plane = place.member % planes;
    int s = place.member / planes;
    int at = (s * planes + first_plane) * product_bytes<NT> + place.lane * lane_bytes<NT>;
    int i = 4 * (planes * (4 * s + place.t) + first_plane);
    float sums[own][NT][4] = {};
#pragma unroll 2
    for (; s < steps; s += at_once, at += at_once * planes * product_bytes<NT>, i += 16 * planes * at_once) {
#pragma unroll
        for (int k = 0; k < own; ++k) {
            uint2 scale = {}, zero = {};
            if (i + 4 * W * k < width) {
                load_four<F16>(side, param, width, i + 4 * W * k, scale, zero);
            }
            const auto q = fragment<NT>::load(queries + at + W * k * product_bytes<NT>);
            q.times(make_uint2(even(scale), odd(scale))).store(folded + at + W * k * product_bytes<NT>);
            if (is_low) {
                const uint32_t z[2] = {even(zero), odd(zero)};
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    multiply(sums[k][nt], z[0], z[0], z[1], z[1], q.x[nt][0], q.x[nt][1]);
                }
            }
        }
    }
    if (is_low) {
#pragma unroll
        for (int k = 0; k < own; ++k) {
            const float back = power_of_two(BITS * (first_plane + W * k));
            for (int nt = 0; nt < NT; ++nt) {
                constant[nt][0] += sums[k][nt][0] * back;
                constant[nt][1] += sums[k][nt][1] * back;
            }
        }
    }
}

/* Adds the products of one part of the codes of N / 2 times 16 tokens with folded queries.  at: this lane's N words of
 * the first step, folded: its first fragment.  N = 4: c[k] has tokens 2 k and 2 k + 1 of the lane's four.  N = 2: both
 * have its two tokens. */
template <int BITS, int N, int NT>
__device__ void add_scores(float (&c)[2][NT][4], int steps, const uint8_t *at, const uint8_t *folded) {
    constexpr int planes = 8 / BITS;
#pragma unroll BITS
    for (int s = 0; s < steps; ++s, at += 256, folded += planes * product_bytes<NT>) {
        uint32_t w[N], v[N];
        if constexpr (N == 4) {
            const uint4 x = *(const uint4 *)at;
            w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
        } else {
            const uint2 x = *(const uint2 *)at;
            w[0] = x.x, w[1] = x.y;
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            v[k] = w[k] >> 8;
        }
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u << (BITS * p);
            const auto b = fragment<NT>::load(folded + p * product_bytes<NT>);
#pragma unroll
            for (int pair = 0; pair < N / 2; ++pair) {
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    multiply(c[N == 4 ? pair : p % 2][nt], w[2 * pair] & mask, w[2 * pair + 1] & mask,
                             v[2 * pair] & mask, v[2 * pair + 1] & mask, b.x[nt][0], b.x[nt][1]);
                }
            }
        }
    }
}

/* ---- values ---- */

/* Adds the products of one part of the codes of T / 2 chunks of 32 channels with p.  at: this lane's words of its first
 * chunk, step_chunk bytes from one to the next, n of which exist; p: all fragments.  GROUPED: each chunk's p are
 * multiplied with scales; of this lane's first quad and of its first chunk's group, chunk c is group_step[c] bytes
 * further. */
template <int BITS, bool GROUPED, int T, int NT>
__device__ void add_values(float (&out)[T][NT][4], const uint8_t *at, int step_chunk, int n, const uint8_t *p,
                           const uint8_t *scales, const int (&group_step)[T / 2]) {
    constexpr int planes = 8 / BITS, steps = BITS;
    const int lane = threadIdx.x % 32;
    const uint8_t *mine[2] = {p + place_of_p<NT>(0, lane), p + place_of_p<NT>(1, lane)};
#pragma unroll
    for (int s = 0; s < steps; ++s) {
        uint4 w[T / 2], v[T / 2];
#pragma unroll
        for (int c = 0; c < T / 2; ++c) {
            w[c] = c < n ? *(const uint4 *)(at + c * step_chunk + 256 * s) : uint4{};
            v[c] = make_uint4(w[c].x >> 8, w[c].y >> 8, w[c].z >> 8, w[c].w >> 8);
        }
#pragma unroll
        for (int k = 0; k < planes; ++k) {
            const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u << (BITS * k);
            const auto all = fragment<NT>::load(mine[k % 2] + (s * planes + k) * product_bytes<NT>);
#pragma unroll
            for (int c = 0; c < T / 2; ++c) {
                auto b = all;
                if (GROUPED) {
                    b = all.times(*(const uint2 *)(scales + group_step[c] + 8 * (4 * planes * s + k)));
                }
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    multiply(out[2 * c][nt], w[c].x & mask, w[c].y & mask, v[c].x & mask, v[c].y & mask, b.x[nt][0],
                             b.x[nt][1]);
                    multiply(out[2 * c + 1][nt], w[c].z & mask, w[c].w & mask, v[c].z & mask, v[c].w & mask, b.x[nt][0],
                             b.x[nt][1]);
                }
            }
        }
    }
}

/* Four channels of a unit by four tokens: the words of tokens 0 .. 3 to even[w], odd[w], which have, of channel w,
 * tokens 0 and 2, 1 and 3 in the low bytes of their halves; the other bytes hold anything. */
struct transposed {
    uint32_t even[4], odd[4];

    static __device__ transposed of(uint4 x) {
        transposed out;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            out.even[w] = __byte_perm(x.x, x.z, 0x0400 + 0x0101 * w);
            out.odd[w] = __byte_perm(x.y, x.w, 0x0400 + 0x0101 * w);
        }
        return out;
    }
    /* f(word) of each. */
    template <typename F> __device__ transposed each(const F &f) const {
        transposed out;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            out.even[w] = f(even[w]);
            out.odd[w] = f(odd[w]);
        }
        return out;
    }
};

/* The value product of a latent layer: T / 2 planes, from `plane` on, of eight units of keys. */
struct latent_place {
    int unit, plane; /* this lane's unit, of the low part */
    int channel;     /* the first of the four of its first plane */
    bool exists;     /* the warp has work */
};

/* y [2 plane + pair of channels] and total, sums of p, over 16-token blocks first .. first + n - 1 of a page.  bytes:
 * of a block; part: the low one; THREE: there is a high one, high_at bytes behind; p: all fragments. */
template <bool THREE, int T, int NT>
__device__ void add_latent(float (&y)[T][NT][4], float (&total)[NT][4], const uint8_t *codes, int bytes,
                           const code_part &part, int high_at, const latent_place &at, int first, int n,
                           const uint8_t *p, const lane_place &place) {
    const uint32_t mask = (((1u << part.bits) - 1) * 0x00010001u) << (part.bits * at.plane);
    const uint8_t *words = codes + first * bytes + 64 * at.unit + 16 * place.t;
    const int to_high = high_at + 64 * (at.unit / 2 - at.unit);
    const int from = 4 * (at.unit & 1) + at.plane; // of the high part: its plane
    p += first * product_bytes<NT>;
    const int mine[2] = {place_of_p<NT>(0, place.lane), place_of_p<NT>(1, place.lane)};
#pragma unroll 2
    for (int j = 0; j < n; ++j, words += bytes, p += product_bytes<NT>) { // n and first are even
        const auto b = fragment<NT>::load(p + mine[j % 2]);
        const auto x = transposed::of(*(const uint4 *)words);
        transposed high;
        if (THREE) {
            high = transposed::of(*(const uint4 *)(words + to_high));
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            multiply(total[nt], 0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u, b.x[nt][0], b.x[nt][1]); // ones
        }
#pragma unroll
        for (int l = 0; l < T / 2; ++l) {
            auto a = x.each([&](uint32_t word) { return word & (mask << (part.bits * l)); });
            if (THREE) { // code 4, in the place after the low part's two bits: of the last plane, beyond the byte
                const auto h = high.each(
                    [&](uint32_t word) { return (word >> (from + l) & 0x00010001u) << (2 * (at.plane + l) + 2); });
                for (int w = 0; w < 4; ++w) {
                    a.even[w] |= h.even[w];
                    a.odd[w] |= h.odd[w];
                }
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                multiply(y[2 * l][nt], a.even[0], a.even[1], a.odd[0], a.odd[1], b.x[nt][0], b.x[nt][1]);
                multiply(y[2 * l + 1][nt], a.even[2], a.even[3], a.odd[2], a.odd[3], b.x[nt][0], b.x[nt][1]);
            }
        }
    }
}

} // namespace

} // namespace xq
