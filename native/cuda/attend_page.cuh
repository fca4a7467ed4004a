/* attend_page.cuh: one warp's online softmax over a sealed page, or over 32 tokens of an open one, for eight query
 * rows.
 *
 * q lies in B's order of codes_mma.cuh, scaled by a power of two to below 1; p s is scaled by the largest scale so far
 * before it is rounded to F16: nothing overflows, no page vanishes.
 */
#pragma once

#include "online_softmax.cuh"
#include "stage.cuh"

namespace xq {

namespace {

constexpr int n_rows = 8;             /* query rows */
constexpr int n_warps = 8;            /* of a block */
constexpr int p_stride = XQ_PAGE + 8; /* halves of one row of p in shared memory */
constexpr int p_bytes = n_warps * n_rows * p_stride * (int)sizeof(__half);

/* The least shared memory of a block: p and one stage for each warp. */
inline int decode_shared_bytes(const xq_cuda_layer &l) {
    return p_bytes + n_warps * staging(l).bytes;
}

/* B operands of the sum over tokens. */
template <int PRODUCTS, typename F>
__device__ void load_p(uint32_t (*b)[2], const __half *p /* [n_rows][p_stride] */, int lane, const F &row) {
#pragma unroll
    for (int k = 0; k < PRODUCTS; ++k) {
        const uint2 x = *(const uint2 *)(p + lane / 4 * p_stride + row(k, lane % 4));
        b[k][0] = even(x);
        b[k][1] = odd(x);
    }
}

/* ---- a sealed page ---- */

/* Scale and zero point (code 0) of four rows i .. i + 3. */
__device__ void load_four(const xq_side &side, const uint8_t *at, int n, int i, float scale[4], float zero[4]) {
    if (side.param == XQ_PARAM_F16) {
        const uint2 s = *(const uint2 *)((const __half *)at + i), z = *(const uint2 *)((const __half *)at + n + i);
        const float2 s0 = __half22float2(as_half2(s.x)), s1 = __half22float2(as_half2(s.y));
        const float2 z0 = __half22float2(as_half2(z.x)), z1 = __half22float2(as_half2(z.y));
        scale[0] = s0.x, scale[1] = s0.y, scale[2] = s1.x, scale[3] = s1.y;
        zero[0] = z0.x, zero[1] = z0.y, zero[2] = z1.x, zero[3] = z1.y;
        return;
    }
    const uint32_t es = *(const uint32_t *)(at + i), qs = *(const uint32_t *)(at + n + i);
    const float middle = (float)((1 << side.bits) - 1) * 0.5f;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        scale[w] = quick_exp2((float)(es >> 8 * w & 0xffu) * 0.125f - log8_zero * 0.125f);
        zero[w] = scale[w] * ((float)(int8_t)(qs >> 8 * w) * 0.125f - middle);
    }
}

/* Scale (or 0 where there is no row) and zero point, code 0, of four channels, as halves. */
template <bool F16>
__device__ void load_four(const xq_side &side, const uint8_t *at, int n, int i, uint2 &scale, uint2 &zero) {
    if (F16 || side.param == XQ_PARAM_F16) {
        scale = *(const uint2 *)((const __half *)at + i);
        zero = *(const uint2 *)((const __half *)at + n + i);
        return;
    }
    float s[4], z[4];
    load_four(side, at, n, i, s, z);
    for (int w = 0; w < 4; ++w) {
        z[w] = fminf(fmaxf(z[w], -65504.0f), 65504.0f);
    }
    scale = make_uint2(halves(s[0], s[1]), halves(s[2], s[3]));
    zero = make_uint2(halves(z[0], z[1]), halves(z[2], z[3]));
}

/* b = q s, constant = sum of q times zero, for one tile of the page. */
template <int D, int KB, bool PLAIN>
__device__ void fold_keys(uint32_t (*b)[2], float constant[2], const uint32_t (*qb)[2], const xq_side &side,
                          const uint8_t *param, int t) {
    using wk = walk<KB, D>;
    // the products of the low part cover every channel once; q carries 2^-(B p), a sum for each plane takes it back
    constexpr int planes = wk::low::planes, bits = 8 / planes;
    float zero[planes][4] = {};
#pragma unroll
    for (int n = 0; n < wk::products; ++n) {
        uint2 scale = {}, z = {};
        if (wk::has(n, t)) {
            load_four<PLAIN>(side, param, D, wk::row(n, t), scale, z);
        }
        b[n][0] = as_bits(__hmul2(as_half2(qb[n][0]), as_half2(even(scale))));
        b[n][1] = as_bits(__hmul2(as_half2(qb[n][1]), as_half2(odd(scale))));
        if (n < wk::low::products) {
            multiply(zero[n % planes], even(z), even(z), odd(z), odd(z), qb[n][0], qb[n][1]);
        }
    }
    constant[0] = constant[1] = 0.0f;
#pragma unroll
    for (int p = 0; p < planes; ++p) {
        constant[0] += zero[p][0] * (float)(1 << (bits * p));
        constant[1] += zero[p][1] * (float)(1 << (bits * p));
    }
}

/* shared: the page's parts as `at` says. */
template <int D, int E, int KB, int VB, bool PLAIN>
__device__ void sealed_page(state<E> &st, const rows &q, const uint32_t (*qb)[2], const xq_side &k, const xq_side &v,
                            const uint8_t *shared, const staged &at, const masks &mask, __half *p, int lane) {
    using wk = walk<KB, D>;
    using wv = walk<VB, XQ_PAGE>;
    const int g = lane / 4, t = lane % 4;
    const uint8_t *k_param = shared + at.k_param, *v_param = shared + at.v_param;

    uint32_t b[wk::products][2];
    float constant[2];
    float s[4][2][4];
    const int chunks_a_tile = PLAIN ? 4 : k.group / 32;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        if (c % chunks_a_tile == 0) {
            fold_keys<D, KB, PLAIN>(b, constant, qb, k, k_param + c / chunks_a_tile * parameter_bytes(k, D), t);
            for (int r = 0; r < 2; ++r) {
                constant[r] = constant[r] * q.factor[r] + q.absent[r];
            }
        }
        uint4 words[wk::steps];
        wk::load(words, shared, c, lane);
        float y[2][4] = {};
        wk::add(y, words, b);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            s[c][k % 2][k / 2] = y[k / 4][k % 4] * (q.factor[k % 2] * code_unit) + constant[k % 2];
        }
    }
    finish_scores<4, PLAIN>(s, q, mask.at);
    if (!softmax<4>(st, s)) {
        return;
    }

    // p times the values' scales, in units of the largest scale so far
    float scale[4][4], zeros[4][4], top = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        load_four(v, v_param, XQ_PAGE, 32 * c + 4 * g, scale[c], zeros[c]);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            top = fmaxf(top, fabsf(scale[c][w]));
        }
    }
    const int exponent = (int)(__float_as_uint(over_tokens(top)) >> 23) - 127;
    if (exponent > st.exponent) { // the same on all lanes
        const float back = power_of_two(max(st.exponent - exponent, -126));
        st.scale(back, back);
        st.exponent = exponent;
    }
    const float unit = power_of_two(13 - st.exponent); // products stay below 2^14
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        float x[2][4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float factor = scale[c][w] * unit;
            for (int r = 0; r < 2; ++r) {
                st.zero[r] += s[c][r][w] * zeros[c][w];
                x[r][w] = s[c][r][w] * factor;
            }
        }
        for (int r = 0; r < 2; ++r) {
            *(uint2 *)(p + (2 * t + r) * p_stride + 32 * c + 4 * g) =
                make_uint2(halves(x[r][0], x[r][1]), halves(x[r][2], x[r][3]));
        }
    }
    __syncwarp();
    uint32_t pb[wv::products][2];
    load_p<wv::products>(pb, p, lane, wv::row);
#pragma unroll
    for (int n = 0; n < wv::products; ++n) {
        const __half2 weight = __float2half2_rn(wv::weight(n));
        pb[n][0] = as_bits(__hmul2(as_half2(pb[n][0]), weight));
        pb[n][1] = as_bits(__hmul2(as_half2(pb[n][1]), weight));
    }
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        uint4 words[wv::steps];
        wv::load(words, shared + at.v_codes, c, lane);
        wv::add(st.out[c], words, pb);
    }
    __syncwarp();
}

/* ---- a quarter of an open page ---- */

template <int D, int E, int KB, bool PLAIN>
__device__ void open_quarter(state<E> &st, const rows &q, const uint32_t (*qb)[2], const __half *k_rows,
                             const __half *v_rows, const uint2 (*mask)[2] /* [1] */, __half *p, int lane) {
    using wk = walk<KB, D>; // q lies in the order of the codes
    constexpr int planes = wk::low::planes, bits = 8 / planes;
    const int g = lane / 4, t = lane % 4;
    float s[1][2][4];
    float y[2][planes][4] = {};
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        uint2 x[4] = {};
        for (int w = 0; w < 4 && wk::has(n, t); ++w) {
            x[w] = *(const uint2 *)(k_rows + (4 * g + w) * D + wk::row(n, t));
        }
        for (int h = 0; h < 2; ++h) {
            multiply(y[h][n % planes], even(x[2 * h]), even(x[2 * h + 1]), odd(x[2 * h]), odd(x[2 * h + 1]), qb[n][0],
                     qb[n][1]);
        }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        float sum = 0.0f;
        for (int n = 0; n < planes; ++n) {
            sum += y[k / 4][n][k % 4] * (float)(1 << (bits * n));
        }
        s[0][k % 2][k / 2] = sum * q.factor[k % 2] + q.absent[k % 2];
    }
    finish_scores<1, PLAIN>(s, q, mask);
    if (!softmax<1>(st, s)) {
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        *(uint2 *)(p + (2 * t + r) * p_stride + 4 * g) =
            make_uint2(halves(s[0][r][0], s[0][r][1]), halves(s[0][r][2], s[0][r][3]));
    }
    __syncwarp();
    uint32_t pb[2][2];
    const auto row = [](int n, int lane_t) { return 16 * n + 4 * lane_t; };
    load_p<2>(pb, p, lane, row);
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        float (&out)[2][4] = st.out[c];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            uint2 x[4]; // [token] channels 4 g .. 4 g + 3
            for (int w = 0; w < 4; ++w) {
                x[w] = *(const uint2 *)(v_rows + (row(n, t) + w) * E + 32 * c + 4 * g);
            }
            multiply(out[0], __byte_perm(x[0].x, x[2].x, 0x5410), __byte_perm(x[0].x, x[2].x, 0x7632),
                     __byte_perm(x[1].x, x[3].x, 0x5410), __byte_perm(x[1].x, x[3].x, 0x7632), pb[n][0], pb[n][1]);
            multiply(out[1], __byte_perm(x[0].y, x[2].y, 0x5410), __byte_perm(x[0].y, x[2].y, 0x7632),
                     __byte_perm(x[1].y, x[3].y, 0x5410), __byte_perm(x[1].y, x[3].y, 0x7632), pb[n][0], pb[n][1]);
        }
    }
    __syncwarp();
}

} // namespace

} // namespace xq
