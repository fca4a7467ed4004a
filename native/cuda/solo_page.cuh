/* solo_page.cuh: what a warp that meets no other does with its share of a sealed page, for 8 NT query rows.
 *
 *     s = q . k    ->    p = 2^(s - max)    ->    out += sum_t p_t v_t
 *
 * The sums over a page's tokens are eight products (codes_mma.cuh), of which a warp takes Q, two or four, with all
 * channels of them.  So its scores are those of 16 Q tokens, and p need not leave the warp: lane (g, t) ends with the
 * scores of the A = Q / 2 quads of tokens that value products member Q + (g % 2) A + a ask of lane g / 2, for query
 * rows 2 t and 2 t + 1; transposing 8 by 8 matrices among the lanes (movmatrix) makes these operand B.
 *
 * q times the zero points of keys, and p times the centres of values, are the same for all tokens, or channels.  There
 * operand B of the others, two registers of eight rows each, is operand A of half a product, whose rows g and g + 8 are
 * query row g times the one and the other register: in even columns B has what the first is to be multiplied with, in
 * odd ones what the second is.
 */
#pragma once

#include "wide_softmax.cuh"

namespace xq {

namespace {

/* Where a thread stands: the member-th of W warps that share a page, each of which has an equal share of its tokens. */
template <int W> struct solo_place : wide_place<W> {
    static constexpr int Q = page_products / W, A = Q / 2;
    static constexpr bool may_lack_values = false;

    static __device__ solo_place here() { return {wide_place<W>::here()}; }
};

/* First token of the quad that product number n of a page has for lane t; VB: bits of values. */
template <int VB> __device__ int token_of_quad(int n, int t) {
    constexpr int planes = 8 / VB;
    return 16 * planes * (n / planes) + 4 * planes * t + 4 * (n % planes);
}
template <int VB, int W> __device__ int first_solo_token(const solo_place<W> &place) {
    return token_of_quad<VB>(place.Q * place.member + place.g % 2 * place.A, place.g / 2);
}

/* Sums of a warp over its tokens of sealed pages.  out [tile of 16 channels]: as products give them. */
template <int E, int NT> struct solo_state {
    float out[E / 16][NT][4];
    float zero[NT][4]; /* p times centres of row g + 8 nt: the sum of the first and the last */
    float max[2 * NT], sum[2 * NT];
    int exponent; /* of the unit of sums over values */

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < E / 16; ++i) {
            for (int nt = 0; nt < NT; ++nt) {
                for (int k = 0; k < 4; ++k) {
                    out[i][nt][k] = 0.0f;
                }
            }
        }
        for (int k = 0; k < 4 * NT; ++k) {
            zero[k / 4][k % 4] = 0.0f;
        }
        for (int r = 0; r < 2 * NT; ++r) {
            max[r] = -INFINITY;
            sum[r] = 0.0f;
        }
        exponent = least_exponent;
    }
    /* by: of a lane's rows, the same for all g. */
    __device__ void scale(const float (&by)[2 * NT], const lane_place &place) {
#pragma unroll
        for (int i = 0; i < E / 16; ++i) {
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                for (int k = 0; k < 4; ++k) {
                    out[i][nt][k] *= by[2 * nt + k % 2];
                }
            }
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) { // row g is row g % 2 of lane g / 2
            const float even = __shfl_sync(~0u, by[2 * nt], place.g / 2);
            const float odd = __shfl_sync(~0u, by[2 * nt + 1], place.g / 2);
            zero[nt][0] *= place.g % 2 == 0 ? even : odd;
            zero[nt][3] *= place.g % 2 == 0 ? even : odd;
        }
    }
};

/* ---- scores ---- */

/* Of four halves, elements 0 and 2 where g is even, 1 and 3 where it is odd. */
__device__ inline uint32_t half_of(uint2 x, const lane_place &place) {
    return __byte_perm(x.x, x.y, place.g % 2 == 0 ? 0x5410 : 0x7632);
}

/* Products of one part of the codes of A quads of tokens with q times the scales of keys: c [quad][pair of tokens].
 * sums: q times zero points, if ZEROS, as solo_state has them, times the weight of the last plane.  codes: this lane's
 * words of the first step; queries: its first fragment; param: of D channels. */
template <int BITS, bool ZEROS, int D, int A, int NT>
__device__ void add_solo_scores(float (&c)[A][2][NT][4], float (&sums)[NT][4], const uint8_t *codes,
                                const uint8_t *queries, const uint8_t *param, const lane_place &place) {
    constexpr int planes = 8 / BITS, units = D * BITS / 32, steps = (units + 3) / 4;
    static_assert(units % 4 == 0, "every lane has a unit in every step");
    param += 8 * planes * place.t;
#pragma unroll(BITS == 4 ? 2 : 1)
    for (int s = 0; s < steps; ++s, codes += 256, queries += planes * product_bytes<NT>, param += 32 * planes) {
        uint32_t w[A][4], v[A][4];
#pragma unroll
        for (int a = 0; a < A; ++a) {
            const uint4 x = *(const uint4 *)(codes + 16 * a);
            w[a][0] = x.x, w[a][1] = x.y, w[a][2] = x.z, w[a][3] = x.w;
            for (int k = 0; k < 4; ++k) {
                v[a][k] = w[a][k] >> 8;
            }
        }
        uint4 scales = {}, zeros = {};
#pragma unroll
        for (int p = 0; p < planes; ++p) {
            const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u << (BITS * p);
            if (p % 2 == 0) { // of two planes
                scales = *(const uint4 *)(param + 8 * p);
                zeros = ZEROS ? *(const uint4 *)(param + 2 * D + 8 * p) : uint4{};
            }
            const uint2 scale = p % 2 == 0 ? make_uint2(scales.x, scales.y) : make_uint2(scales.z, scales.w);
            const auto q = fragment<NT>::load(queries + p * product_bytes<NT>);
            if (ZEROS) { // q carries 2^-(B p), which is taken back here but for the last plane's
                const uint2 zero = p % 2 == 0 ? make_uint2(zeros.x, zeros.y) : make_uint2(zeros.z, zeros.w);
                const __half2 back = __float2half2_rn(1.0f / (float)(1 << (BITS * (planes - 1 - p))));
                const uint32_t z = as_bits(__hmul2(as_half2(half_of(zero, place)), back));
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    multiply_half(sums[nt], q.x[nt][0], q.x[nt][1], z);
                }
            }
            const auto b = q.times(make_uint2(even(scale), odd(scale)));
#pragma unroll
            for (int a = 0; a < A; ++a) {
#pragma unroll
                for (int u = 0; u < 2; ++u) {
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
                        multiply(c[a][u][nt], w[a][2 * u] & mask, w[a][2 * u + 1] & mask, v[a][2 * u] & mask,
                                 v[a][2 * u + 1] & mask, b.x[nt][0], b.x[nt][1]);
                    }
                }
            }
        }
    }
}

/* s = c * factor + shift are the scores of base 2 of a lane's A quads of tokens, c [quad][pair][tile][4]. */
template <int A, int NT> struct solo_scores {
    float c[A][2][NT][4];
    float factor[2 * NT], shift[2 * NT]; /* factor: above 0 */

    /* page: codes and parameters of D keys of KB bits; first: of the lane's tokens. */
    template <int KB, int D>
    __device__ void compute(const uint8_t *page, const uint8_t *param, const uint8_t *queries,
                            const wide_tile<NT> &tile, int first, const lane_place &place) {
        constexpr int bits = KB == 3 ? 2 : KB, low = 2 * D * bits, column = low + (KB == 3 ? 2 * D : 0);
        const uint8_t *codes = page + first / 16 * column + 64 * place.t + 4 * (first % 16);
        const uint8_t *own = queries + place.lane * lane_bytes<NT>;
        float sums[NT][4] = {};
#pragma unroll
        for (int a = 0; a < A; ++a) {
            for (int k = 0; k < 8 * NT; ++k) {
                c[a][k / (4 * NT)][k / 4 % NT][k % 4] = 0.0f;
            }
        }
        add_solo_scores<bits, true, D>(c, sums, codes, own, param, place);
        if constexpr (KB == 3) {
            float none[NT][4];
            add_solo_scores<1, false, D>(c, none, codes + low, own + D / 16 * product_bytes<NT>, param, place);
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const float2 x = *(const float2 *)(tile.factor + row_of(2 * nt, place.t));
            factor[2 * nt] = x.x * code_unit, factor[2 * nt + 1] = x.y * code_unit;
            const float zeros = (sums[nt][0] + sums[nt][3]) * (float)(1 << (8 - bits)); // of row g + 8 nt
            shift[2 * nt] = __shfl_sync(~0u, zeros, 8 * place.t) * x.x;
            shift[2 * nt + 1] = __shfl_sync(~0u, zeros, 8 * place.t + 4) * x.y;
        }
    }

    /* mask: of the lane's first token. */
    __device__ void add_mask(const __half *mask) {
        float unit[2 * NT];
        for (int r = 0; r < 2 * NT; ++r) {
            unit[r] = log2e / factor[r];
        }
#pragma unroll
        for (int a = 0; a < A; ++a) {
            const uint2 four = *(const uint2 *)(mask + 4 * a);
            const uint32_t words[2] = {four.x, four.y};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float m = mask_of<4>(words, e);
#pragma unroll
                for (int r = 0; r < 2 * NT; ++r) {
                    float &x = c[a][e / 2][r / 2][e % 2 * 2 + r % 2];
                    x = m == -INFINITY ? -INFINITY : x + m * unit[r];
                }
            }
        }
    }
};

/* Largest scores that state.max allows for, and sums scaled anew if one is beyond by more than `slack`. */
template <int E, int NT, int A>
__device__ void raise_solo_max(solo_state<E, NT> &state, const solo_scores<A, NT> &s, const lane_place &place) {
    float top[2 * NT];
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        float max = s.c[0][0][r / 2][r % 2];
#pragma unroll
        for (int k = 1; k < 4 * A; ++k) {
            max = fmaxf(max, s.c[k / 4][k / 2 % 2][r / 2][k % 2 * 2 + r % 2]);
        }
        top[r] = max * s.factor[r] + s.shift[r];
        grows |= top[r] > state.max[r] + slack;
    }
    if (!__any_sync(~0u, grows)) {
        return;
    }
    float by[2 * NT];
#pragma unroll
    for (int r = 0; r < 2 * NT; ++r) {
        top[r] = fmaxf(over_tokens(top[r]), state.max[r]);
        by[r] = top[r] == -INFINITY ? 1.0f : quick_exp2(state.max[r] - top[r]);
        state.max[r] = top[r];
        state.sum[r] *= by[r];
    }
    state.scale(by, place);
}

/* ---- p ---- */

/* An 8 by 8 matrix of halves, two of a row in each lane, transposed. */
__device__ inline uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* Makes place for the scales of a lane's A words of LOG8 exponents, four tokens each. */
template <int E, int NT, int A>
__device__ void raise_solo_exponent(solo_state<E, NT> &state, const uint32_t (&e)[A], const lane_place &place) {
    uint32_t top = 0;
#pragma unroll
    for (int a = 0; a < A; ++a) {
        top = __vmaxu2(top, __vmaxu2(e[a] & 0x00ff00ffu, e[a] >> 8 & 0x00ff00ffu));
    }
    const int to = ((int)warp_max(max(top & 0xffffu, top >> 16)) - log8_zero) >> 3;
    if (to > state.exponent) {
        float by[2 * NT];
        for (int r = 0; r < 2 * NT; ++r) {
            by[r] = power_of_two(max(state.exponent - to, -126));
        }
        state.scale(by, place);
        state.exponent = to;
    }
}

/* Scores to p, summed up, and times the scales of their values and the weights of the products' planes, to operand B:
 * b [product][tile].  e: exponents of the lane's tokens. */
template <int VB, int E, int NT, int W, int A = solo_place<W>::A>
__device__ void solo_p(uint32_t (&b)[2 * A][NT][2], solo_state<E, NT> &state, const solo_scores<A, NT> &s,
                       const uint32_t (&e)[A], const solo_place<W> &place) {
    const int product = place.Q * place.member + place.g % 2 * A; // the lane's first
    float shift[2 * NT];
    for (int r = 0; r < 2 * NT; ++r) {
        shift[r] = s.shift[r] - (state.max[r] == -INFINITY ? 0.0f : state.max[r]);
    }
    // 2^23 + exponent, times 1/8: exact, and so is what it is moved by
    const float base = (float)(p_bits - state.exponent) - 0.125f * log8_zero - 1048576.0f;
#pragma unroll
    for (int a = 0; a < A; ++a) {
        const float from = base - (float)(VB * ((product + a) % (8 / VB)));
        uint32_t y[4][NT];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float scale = quick_exp2(__uint_as_float(__byte_perm(e[a], 0x4b000000u, 0x7540 + k)) * 0.125f + from);
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                float x[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    x[r] = quick_exp2(s.c[a][k / 2][nt][k % 2 * 2 + r] * s.factor[2 * nt + r] + shift[2 * nt + r]);
                    state.sum[2 * nt + r] += x[r];
                }
                y[k][nt] = transpose(halves(x[0] * scale, x[1] * scale));
            }
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            b[a][nt][0] = __byte_perm(y[0][nt], y[2][nt], 0x5410);
            b[a][nt][1] = __byte_perm(y[1][nt], y[3][nt], 0x5410);
            b[A + a][nt][0] = __byte_perm(y[0][nt], y[2][nt], 0x7632);
            b[A + a][nt][1] = __byte_perm(y[1][nt], y[3][nt], 0x7632);
        }
    }
}

/* ---- values ---- */

/* p times the centres of values, in units of their scales: q / 8 - middle.  centres: of the page's tokens. */
template <int VB, int E, int NT, int W, int Q = solo_place<W>::Q>
__device__ void add_centres(solo_state<E, NT> &state, const uint32_t (&b)[Q][NT][2], const uint8_t *centres,
                            const solo_place<W> &place) {
    constexpr float middle = 0.5f * ((1 << VB) - 1);
#pragma unroll
    for (int i = 0; i < Q; ++i) {
        const int n = Q * place.member + i;
        const float back = (float)(1 << (VB * (Q % (8 / VB) == 0 ? i % (8 / VB) : n % (8 / VB)))); // of p's weight
        const uint32_t four = *(const uint32_t *)(centres + token_of_quad<VB>(n, place.t)) ^ 0x80808080u;
        const uint32_t x = __byte_perm(four, 0x64646464u, place.g % 2 == 0 ? 0x4240 : 0x4341); // 1024 + 128 + q
        const uint32_t z =
            as_bits(__hfma2(as_half2(x), __float2half2_rn(0.125f * back), __float2half2_rn((-144.0f - middle) * back)));
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            multiply_half(state.zero[nt], b[i][nt][0], b[i][nt][1], z);
        }
    }
}

/* p times codes.  codes: of the page. */
template <int VB, int E, int NT, int W, int Q = solo_place<W>::Q>
__device__ void add_solo_values(solo_state<E, NT> &state, const uint32_t (&b)[Q][NT][2], const uint8_t *codes,
                                const solo_place<W> &place) {
    constexpr int planes = 8 / VB, column = 256 * VB;
    constexpr int steps = Q > planes ? Q / planes : 1, of_step = Q / steps; // products of a step
    const int first = Q * place.member, plane = Q % planes == 0 ? 0 : first % planes;
    codes += place.g / 4 * column + 256 * (first / planes) + 64 * place.t + 16 * (place.g % 4);
    uint32_t masks[of_step];
#pragma unroll
    for (int i = 0; i < of_step; ++i) {
        masks[i] = ((1u << VB) - 1) * 0x00010001u << (VB * (plane + i));
    }
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            const uint4 w = *(const uint4 *)(codes + 2 * c * column + 256 * s);
            const uint4 v = make_uint4(w.x >> 8, w.y >> 8, w.z >> 8, w.w >> 8);
#pragma unroll
            for (int i = 0; i < of_step; ++i) {
                const uint32_t mask = masks[i];
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    const uint32_t (&x)[2] = b[s * of_step + i][nt];
                    multiply(state.out[2 * c][nt], w.x & mask, w.y & mask, v.x & mask, v.y & mask, x[0], x[1]);
                    multiply(state.out[2 * c + 1][nt], w.z & mask, w.w & mask, v.z & mask, v.w & mask, x[0], x[1]);
                }
            }
        }
    }
}

} // namespace

} // namespace xq
