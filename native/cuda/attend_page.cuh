/* attend_page.cuh: online softmax of a team of warps over a sealed page, or of one warp over 16 tokens of an open one,
 * for eight query rows.
 *
 * Of a sealed page, each warp of a team takes an equal share of the tokens to their scores, and, when all p are there,
 * an equal share of the channels to their sums: 64.  The team meets twice a page: for the maximum, and for p.
 *
 * q lies in the order of the codes (codes_mma.cuh), scaled by a power of two to below 1; p s is scaled by the largest
 * scale so far before it is rounded to F16: nothing overflows, no page vanishes.
 */
#pragma once

#include "online_softmax.cuh"
#include "stage.cuh"

namespace xq {

namespace {

constexpr int n_rows = 8; /* query rows */

/* Tokens of an open page that a warp takes at a time. */
constexpr int piece = 16;

/* p in shared memory: [n_rows][stride] halves. */
template <int TOKENS> struct p_buffer {
    static constexpr int stride = TOKENS + 8, bytes = n_rows * stride * (int)sizeof(__half);
    __half *at;

    __device__ __half *row(int r) const { return at + r * stride; }
};
using page_p = p_buffer<XQ_PAGE>; /* of four tokens in the order 0, 2, 1, 3: B's */
using piece_p = p_buffer<piece>;

/* q of a lane for each product, in shared memory: registers are scarce. */
struct folded_rows {
    const uint2 (*at)[32];
    int lane;

    __device__ uint2 operator[](int product) const { return at[product][lane]; }
};

/* ---- a sealed page ---- */

/* One warp of a team of E / 64, the member-th. */
template <int E> struct team_warp {
    static constexpr int size = E / 64, chunks = XQ_PAGE / 32 / size; /* of 32 tokens each */
    static constexpr int channel_chunks = E / 32 / size;
    int number, member;

    __device__ int first() const { return number * size; } /* warp of the block */
    __device__ int chunk(int n) const { return member * chunks + n; }
    __device__ int channel_chunk(int n) const { return member * channel_chunks + n; }
    /* Waits for the others. */
    __device__ void meet() const {
        if (size == 1) {
            __syncwarp();
        } else {
            asm volatile("bar.sync %0, %1;" ::"r"(number + 1), "n"(32 * size) : "memory");
        }
    }
};
/* Of a warp, over sealed pages. */
template <int E> using sealed_state = state<team_warp<E>::channel_chunks>;

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

/* Scale and zero point, code 0, of four channels, as halves. */
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
__device__ void fold_keys(uint32_t (*b)[2], float constant[2], const folded_rows &qb, const xq_side &side,
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
        const uint2 row = qb[n];
        const uint2 x = make_uint2(as_bits(__hmul2(as_half2(row.x), as_half2(scale.x))),
                                   as_bits(__hmul2(as_half2(row.y), as_half2(scale.y))));
        b[n][0] = even(x);
        b[n][1] = odd(x);
        if (n < wk::low::products) {
            multiply(zero[n % planes], z.x, z.x, z.y, z.y, row.x, row.y);
        }
    }
    constant[0] = constant[1] = 0.0f;
#pragma unroll
    for (int p = 0; p < planes; ++p) {
        constant[0] += zero[p][0] * (float)(1 << (bits * p));
        constant[1] += zero[p][1] * (float)(1 << (bits * p));
    }
}

/* Raises the unit of the sums to 2^exponent. */
template <int CHUNKS> __device__ void raise_exponent(state<CHUNKS> &st, int exponent) {
    if (exponent > st.exponent) { // the same on all lanes of a team
        const float back = power_of_two(max(st.exponent - exponent, -126));
        st.scale(back, back);
        st.exponent = exponent;
    }
}

/* p times scale of tokens 32 c + 4 g .. + 3, rows 2 t and 2 t + 1, to shared memory. */
template <int N>
__device__ void store_p(const page_p &to, const float (&p)[2][N], const float scale[4], int n, int c, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float *x = p[r] + 4 * n;
        *(uint2 *)(to.row(2 * t + r) + 32 * c + 4 * g) =
            make_uint2(halves(x[0] * scale[0], x[2] * scale[2]), halves(x[1] * scale[1], x[3] * scale[3]));
    }
}

/* Bits that the codes of V of a lane's tokens, 32 c + 4 g .. + 3, are shifted by (codes_mma.cuh). */
template <int VB> __device__ int shift_of(int g) {
    return VB * (g % (8 / VB));
}

/* p [row][tokens of this warp] times the values' LOG8 scales and what takes the codes' shift back, to shared memory. */
template <int E, int VB, int N>
__device__ void scale_p_log8(sealed_state<E> &st, const float (&p)[2][N], const uint8_t *param, const page_p &to,
                             const team_warp<E> &warp, int lane) {
    const int g = lane / 4;
    const uint32_t mine = *(const uint32_t *)(param + 4 * lane);
    const uint32_t top = max(max(mine & 0xffu, mine >> 8 & 0xffu), max(mine >> 16 & 0xffu, mine >> 24));
    raise_exponent(st, ((int)warp_max(top) - log8_zero) >> 3);
    // 2^((e - 161) / 8 + 13 - exponent), products stay below 2^14; 0x4b0000ee is 2^23 + e
    const float constant = (float)(13 - st.exponent - shift_of<VB>(g)) - log8_zero * 0.125f - 1048576.0f;
#pragma unroll
    for (int n = 0; n < warp.chunks; ++n) {
        const uint32_t e = *(const uint32_t *)(param + 32 * warp.chunk(n) + 4 * g);
        float scale[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            scale[w] = quick_exp2(__uint_as_float(__byte_perm(e, 0x4b000000u, 0x7440 + w)) * 0.125f + constant);
        }
        store_p(to, p, scale, n, warp.chunk(n), lane);
    }
}

/* The same for any parameters; sums p times zero points. */
template <int E, int VB, int N>
__device__ void scale_p(sealed_state<E> &st, const float (&p)[2][N], const xq_side &v, const uint8_t *param,
                        const page_p &to, const team_warp<E> &warp, int lane) {
    const int g = lane / 4;
    float scale[4], zero[4], top = 0.0f;
    load_four(v, param, XQ_PAGE, 4 * lane, scale, zero);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        top = fmaxf(top, fabsf(scale[w]));
    }
    raise_exponent(st, (int)(warp_max(__float_as_uint(top)) >> 23) - 127);
    const float unit = power_of_two(13 - st.exponent - shift_of<VB>(g)); // products stay below 2^14
#pragma unroll
    for (int n = 0; n < warp.chunks; ++n) {
        load_four(v, param, XQ_PAGE, 32 * warp.chunk(n) + 4 * g, scale, zero);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            st.zero[0] += p[0][4 * n + w] * zero[w];
            st.zero[1] += p[1][4 * n + w] * zero[w];
            scale[w] *= unit;
        }
        store_p(to, p, scale, n, warp.chunk(n), lane);
    }
}

/* The masks of a warp's share of a page, of rows 2 t and 2 t + 1 and tokens 32 c + 4 g .. + 3, which are read ahead. */
template <int E> struct masks {
    static constexpr int chunks = team_warp<E>::chunks;
    uint32_t at[2][2 * chunks];

    /* false: all are 0. */
    __device__ bool load(const rows &q, int page, const team_warp<E> &warp, int g) {
        uint32_t any = 0;
#pragma unroll
        for (int n = 0; n < chunks; ++n) {
            for (int r = 0; r < 2; ++r) {
                const uint2 x =
                    q.mask[r] ? *(const uint2 *)(q.mask[r] + page * XQ_PAGE + 32 * warp.chunk(n) + 4 * g) : uint2{};
                at[r][2 * n] = x.x, at[r][2 * n + 1] = x.y;
                any |= x.x | x.y;
            }
        }
        return __any_sync(~0u, any != 0);
    }
};

/* shared: the page's parts as `at` says.  p: room of the team.  tops: room for maxima of the block's warps. PLAIN:
 * values have LOG8 parameters.  met(): called when the whole team has done with the page before. */
template <int D, int E, int KB, int VB, bool PLAIN, typename F>
__device__ void sealed_page(sealed_state<E> &st, const rows &q, const folded_rows &qb, const xq_side &k,
                            const xq_side &v, const uint8_t *shared, const staged &at, const masks<E> &mask,
                            bool is_masked, const page_p &p, float (*tops)[n_rows], const team_warp<E> &warp, int lane,
                            const F &met) {
    using wk = walk<KB, D>;
    using wv = walk<VB, XQ_PAGE>;
    using team = team_warp<E>;
    const int g = lane / 4, t = lane % 4;
    const uint8_t *k_param = shared + at.k_param, *v_param = shared + at.v_param;

    uint32_t b[wk::products][2];
    float s[2][4 * team::chunks];
    affine to;
    const int chunks_a_tile = PLAIN ? 4 : k.group / 32;
#pragma unroll
    for (int n = 0; n < team::chunks; ++n) {
        const int c = warp.chunk(n);
        if (n == 0 || (!PLAIN && c % chunks_a_tile == 0)) {
            fold_keys<D, KB, PLAIN>(b, to.constant, qb, k, k_param + c / chunks_a_tile * parameter_bytes(k, D), t);
            for (int r = 0; r < 2; ++r) {
                to.constant[r] = to.constant[r] * q.factor[r] + q.absent[r];
                to.factor[r] = q.factor[r] * code_unit;
            }
        }
        uint4 words[wk::steps];
        wk::load(words, shared, c, lane);
        float y[2][4] = {};
        wk::add(y, words, b);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float x = y[k / 4][k % 4];
            s[k % 2][4 * n + k / 2] = PLAIN ? x : x * to.factor[k % 2] + to.constant[k % 2]; // of each tile
        }
    }
    if (!PLAIN || is_masked) {
        finish_scores<4 * team::chunks, PLAIN>(s, PLAIN ? to : affine{{1.0f, 1.0f}, {0.0f, 0.0f}}, q, mask.at);
        to = {{1.0f, 1.0f}, {0.0f, 0.0f}};
    }
    float max[2];
    score_max(max, s, to);
    if (g == 0) {
        *(float2 *)&tops[warp.first() + warp.member][2 * t] = make_float2(max[0], max[1]);
    }
    warp.meet();
    met();
#pragma unroll
    for (int n = 0; n < team::size; ++n) {
        const float2 other = *(const float2 *)&tops[warp.first() + n][2 * t];
        max[0] = fmaxf(max[0], other.x);
        max[1] = fmaxf(max[1], other.y);
    }
    exponentiate(st, s, to, max);
    if (PLAIN) {
        scale_p_log8<E, VB>(st, s, v_param, p, warp, lane);
    } else {
        scale_p<E, VB>(st, s, v, v_param, p, warp, lane);
    }
    warp.meet();
    if (PLAIN) {
#pragma unroll
        for (int k = 0; k < wv::products / team::size; ++k) {
            // rows g: q + 128 of the centres, rows g + 8: 1
            const int product = k * team::size + warp.member, row = wv::row(product, t);
            const uint2 x = *(const uint2 *)(p.row(g) + row);
            const uint32_t q = *(const uint32_t *)(v_param + XQ_PAGE + row) ^ 0x80808080u;
            const uint32_t one = 0x3c003c00u; // no subnormal: of a small one, sums keep only 14 bits
            float offset[4] = {};             // alone: the tensor cores cut off what falls below their sum
            multiply(offset, q & 0x00ff00ffu, one, q >> 8 & 0x00ff00ffu, one, x.x, x.y);
            const float shift = power_of_two(VB * (product % (8 / VB)));
            for (int r = 0; r < 2; ++r) {
                const float zero = (16.0f + (float)((1 << VB) - 1) * 0.5f) / code_unit;
                st.offset[r] += shift * (offset[r] * 0.125f - offset[2 + r] * zero);
            }
        }
    }
    uint32_t pb[wv::products][2];
#pragma unroll
    for (int n = 0; n < wv::products; ++n) {
        const uint2 x = *(const uint2 *)(p.row(g) + wv::row(n, t));
        pb[n][0] = x.x;
        pb[n][1] = x.y;
    }
#pragma unroll
    for (int n = 0; n < team::channel_chunks; ++n) {
        uint4 words[wv::steps];
        wv::load(words, shared + at.v_codes, warp.channel_chunk(n), lane);
        wv::add(st.out[n], words, pb);
    }
}

/* Sums over sealed pages to their unit; zero: what is to be added to every channel, this warp's share. */
template <bool PLAIN, int CHUNKS> __device__ void finish_sums(state<CHUNKS> &st, float (&zero)[2]) {
    const float unit = power_of_two(st.exponent - 13 + 24);
    for (int r = 0; r < 2; ++r) {
        for (int step = 4; !PLAIN && step < 32; step *= 2) {
            st.zero[r] += __shfl_xor_sync(~0u, st.zero[r], step);
        }
        zero[r] = PLAIN ? st.offset[r] * unit : st.zero[r];
    }
    st.scale(unit, unit);
}

/* ---- a piece of an open page ---- */

/* Tokens 2 g and 2 g + 1 of the piece are rows g and g + 8 of operand A; k_rows, v_rows: of its first token. */
template <int D, int E, int KB, bool PLAIN>
__device__ void open_piece(state<E / 32> &st, const rows &q, const folded_rows &qb, const __half *k_rows,
                           const __half *v_rows, int first_cell, const piece_p &p, int lane) {
    using wk = walk<KB, D>; // q lies in the order of the codes
    constexpr int planes = wk::low::planes, bits = 8 / planes;
    const int g = lane / 4, t = lane % 4;
    uint2 x[wk::low::products][2],
        v[E / 32][4]; // v: [][token 4 t ..] channels 32 c + 4 g .. + 3
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        for (int w = 0; w < 2; ++w) {
            x[n][w] = wk::has(n, t) ? *(const uint2 *)(k_rows + (2 * g + w) * D + wk::row(n, t)) : uint2{};
        }
    }
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        for (int w = 0; w < 4; ++w) {
            v[c][w] = *(const uint2 *)(v_rows + (4 * t + w) * E + 32 * c + 4 * g);
        }
    }
    uint32_t mask[2][1];
    for (int r = 0; r < 2; ++r) {
        mask[r][0] = q.mask[r] ? *(const uint32_t *)(q.mask[r] + first_cell + 2 * g) : 0;
    }
    float y[planes][4] = {};
#pragma unroll
    for (int n = 0; n < wk::low::products; ++n) {
        const uint2 row = qb[n];
        multiply(y[n % planes], x[n][0].x, x[n][1].x, x[n][0].y, x[n][1].y, row.x, row.y);
    }
    float s[2][2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        float sum = 0.0f;
        for (int n = 0; n < planes; ++n) {
            sum += y[n][k] * (float)(1 << (bits * n));
        }
        s[k % 2][k / 2] = sum;
    }
    finish_scores<2, PLAIN>(s, {{q.factor[0], q.factor[1]}, {q.absent[0], q.absent[1]}}, q, mask);
    const affine same = {{1.0f, 1.0f}, {0.0f, 0.0f}};
    float max[2];
    score_max(max, s, same);
    exponentiate(st, s, same, max);
    for (int r = 0; r < 2; ++r) {
        *(uint32_t *)(p.row(2 * t + r) + 2 * g) = halves(s[r][0], s[r][1]);
    }
    __syncwarp();
    const uint2 pb = *(const uint2 *)(p.row(g) + 4 * t);
#pragma unroll
    for (int c = 0; c < E / 32; ++c) {
        const uint2(&x)[4] = v[c];
        multiply(st.out[c][0], __byte_perm(x[0].x, x[1].x, 0x5410), __byte_perm(x[0].x, x[1].x, 0x7632),
                 __byte_perm(x[2].x, x[3].x, 0x5410), __byte_perm(x[2].x, x[3].x, 0x7632), pb.x, pb.y);
        multiply(st.out[c][1], __byte_perm(x[0].y, x[1].y, 0x5410), __byte_perm(x[0].y, x[1].y, 0x7632),
                 __byte_perm(x[2].y, x[3].y, 0x5410), __byte_perm(x[2].y, x[3].y, 0x7632), pb.x, pb.y);
    }
    __syncwarp();
}

} // namespace

} // namespace xq
