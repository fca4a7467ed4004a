/* attend_values.cuh: the values of a sealed page, times p, for 4 R query rows: out[j] += sum_i p_i s_i (code_ij + z_i).
 *
 * byte_values: LOG8 parameters.  p s are rounded to integers of 16 bits, in units of the largest p and s of the page,
 * so that no page vanishes beside another; the tensor cores multiply their bytes with codes: a mask gives four codes,
 * sums are exact.  z_i, eighths of integers, go the same way.  half_values: any parameters.  p s are rounded to F16,
 * scaled by the largest scale so far: nothing overflows, no page vanishes; a mask gives two codes (codes_mma.cuh).
 *
 * A warp stores p s of its share of the tokens, the team meets, and each warp adds up its share of the channels.  What
 * a mask leaves is code * 2^(VB plane); the inverse of that power is folded into p s.
 */
#pragma once

#include "online_softmax.cuh"
#include "stage.cuh"

namespace xq {

namespace {

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

/* p in shared memory: [n_rows][stride] halves, in the order that a product's operand B takes them in. */
template <int TOKENS, int R> struct half_p {
    static constexpr int stride = TOKENS + 8, bytes = n_rows<R> * stride * (int)sizeof(__half);
    __half *at;

    __device__ __half *row(int r) const { return at + r * stride; }
};

/* No scale of values is as small: 2^-24 is F16's smallest. */
constexpr int least_exponent = -40;

/* Sums of a lane over CHUNKS times 32 channels, of every 32 its channels 4 g .. 4 g + 3: as products give them. */
template <int CHUNKS, int R> struct half_sums {
    static constexpr int chunks = CHUNKS, rows = R;
    float out[CHUNKS][2][4] = {};  /* [.][.][0], [2]: the lane's first row; [1], [3]: its second */
    int exponent = least_exponent; /* of the unit of sums over codes, and of zero */

    __device__ float &at(int c, int r, int k) { return out[c][k / 2][k % 2 * 2 + r]; }
};
template <int CHUNKS, int R> struct byte_sums {
    static constexpr int chunks = CHUNKS, rows = R;
    float out[CHUNKS][R][4] = {};
    float weight[R]; /* of the page at hand, whose p are those of its own maximum, and the unit of its p s */

    __device__ float &at(int c, int r, int k) { return out[c][r][k]; }
};

/* ---- F16 ---- */

template <int E, int VB, int R> struct half_values {
    using warp_of = warp_place<E>;
    using walk_of = walk<VB, XQ_PAGE>;
    using state_of = softmax_state<half_sums<warp_of::channel_chunks, R>>;
    using room = half_p<XQ_PAGE, R>; /* of a team */

    /* Bits that the codes of tokens 32 c + 4 g .. + 3 are shifted by. */
    static __device__ int shift_of(int g) { return VB * (g % (8 / VB)); }

    /* This warp's tokens: scores s, still pending, become p s in p; max: of the page. */
    template <int N>
    static __device__ void store(state_of &state, float (&s)[R][N], const pending_scale<R> &pending,
                                 const float (&max)[R], const page_in_shared &page, const room &p,
                                 const warp_of &warp) {
        raise_max(state, max);
        exponentiate(state, s, pending);
        const int g = warp.g, t = warp.t;
        float scale[4], zero[4], top = 0.0f;
        load_four(page.v, page.v_param(), XQ_PAGE, 4 * warp.lane, scale, zero);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            top = fmaxf(top, fabsf(scale[w]));
        }
        const int exponent = (int)(warp_max(__float_as_uint(top)) >> 23) - 127;
        if (exponent > state.sums.exponent) { // the same on all lanes of a team
            const float back = power_of_two(::max(state.sums.exponent - exponent, -126));
            for (int r = 0; r < R; ++r) {
                state.scale(r, back);
            }
            state.sums.exponent = exponent;
        }
        const float unit = power_of_two(13 - state.sums.exponent - shift_of(g)); // products stay below 2^14
#pragma unroll
        for (int n = 0; n < warp_of::chunks; ++n) {
            const int first = 32 * warp.chunk(n) + 4 * g;
            load_four(page.v, page.v_param(), XQ_PAGE, first, scale, zero);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float x[4];
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    x[w] = s[r][4 * n + w] * (scale[w] * unit);
                    state.zero[r] += s[r][4 * n + w] * (zero[w] * unit);
                }
                *(uint2 *)(p.row(R * t + r) + first) = make_uint2(halves(x[0], x[2]), halves(x[1], x[3]));
            }
        }
    }

    /* When all p s of the page are there. */
    static __device__ void add(state_of &state, const page_in_shared &page, const room &p, const warp_of &warp) {
        const int g = warp.g, t = warp.t;
        uint32_t b[walk_of::products][2];
#pragma unroll
        for (int n = 0; n < walk_of::products; ++n) {
            const uint2 x = *(const uint2 *)(p.row(row_of_column<R>(g)) + walk_of::row(n, t));
            b[n][0] = x.x;
            b[n][1] = x.y;
        }
#pragma unroll
        for (int n = 0; n < warp_of::channel_chunks; ++n) {
            uint4 words[walk_of::steps];
            walk_of::load(words, page.v_codes(), warp.channel_chunk(n), warp);
            walk_of::add(state.sums.out[n], words, b);
        }
    }

    /* Sums to their unit; zero: what is to be added to every channel, this warp's share. */
    static __device__ void finish(state_of &state, float (&zero)[R], const warp_of &warp) {
        const float unit = power_of_two(state.sums.exponent - 13);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            zero[r] = state.zero[r] * unit * power_of_two(shift_of(warp.g));
            for (int step = 4; step < 32; step *= 2) {
                zero[r] += __shfl_xor_sync(~0u, zero[r], step);
            }
            state.scale(r, unit * code_unit);
        }
    }
};

/* ---- bytes ---- */

/* p s of a page in shared memory: [n_rows][half][low, high bytes][64 tokens].  Tokens come in fours, quads; product k
 * of lane t takes quad first(t) + k and, of the other half, the one `apart` further on: of the same words of codes
 * where VB is 1, else of the same place in others. */
template <int VB, int R> struct byte_p {
    static constexpr int half = XQ_PAGE, high = half / 2, stride = 2 * half + 32, bytes = n_rows<R> * stride;
    static constexpr int apart = VB == 1 ? 4 : 16;
    uint8_t *at;

    static __device__ int first(int t) { return 8 / VB * t; }
    /* Low bytes of a quad; its high ones are `high` further on. */
    __device__ uint8_t *quad(int row, int quad) const {
        const int nth = VB == 1 ? quad / 4 % 2 : quad / 16, place = VB == 1 ? quad / 8 * 4 + quad % 4 : quad % 16;
        return at + row * stride + half * nth + 4 * place;
    }
};

template <int E, int VB, int R> struct byte_values {
    using warp_of = warp_place<E>;
    using walk_of = walk<VB, XQ_PAGE>;
    using state_of = softmax_state<byte_sums<warp_of::channel_chunks, R>>;
    using room = byte_p<VB, R>;

    /* Planes of a nibble: codes of the high one are shifted down first. */
    static constexpr int planes = 4 / VB, products = 4;
    static constexpr int top_bits = 15; /* p s are below 2^(top_bits + 1) */
    static __device__ int shift_of(int plane) { return VB * (plane % planes); }

    template <int N>
    static __device__ void store(state_of &state, float (&s)[R][N], const pending_scale<R> &pending,
                                 const float (&max)[R], const page_in_shared &page, const room &p,
                                 const warp_of &warp) {
        raise_max(state, max);
        const int g = warp.g, t = warp.t;
        const uint8_t *param = page.v_param();
        const uint32_t mine = *(const uint32_t *)(param + 4 * warp.lane);
        const uint32_t top = ::max(::max(mine & 0xffu, mine >> 8 & 0xffu), ::max(mine >> 16 & 0xffu, mine >> 24));
        const int exponent = ((int)warp_max(top) - log8_zero) >> 3;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float safe = max[r] == -INFINITY ? 0.0f : max[r];
            const float weight = max[r] == -INFINITY ? 0.0f : quick_exp2(max[r] - state.max[r]);
            state.sum[r] += weight * exponentiate(s[r], pending.factor[r], pending.constant[r] - safe);
            state.sums.weight[r] = weight * power_of_two(exponent - top_bits);
        }
        // 2^((e - 161) / 8 + 15 - exponent - shift); 0x4b0000ee is 2^23 + e
        const float constant = (float)(top_bits - exponent - shift_of(g)) - log8_zero * 0.125f - 1048576.0f;
#pragma unroll
        for (int n = 0; n < warp_of::chunks; ++n) {
            const int quad = 8 * warp.chunk(n) + g;
            const uint32_t e = *(const uint32_t *)(param + 4 * quad);
            float scale[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                scale[w] = quick_exp2(__uint_as_float(__byte_perm(e, 0x4b000000u, 0x7440 + w)) * 0.125f + constant);
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                uint32_t x[4];
#pragma unroll
                for (int w = 0; w < 4; ++w) { // 2^23 and the rounded integer
                    x[w] = __float_as_uint(s[r][4 * n + w] * scale[w] + 8388608.0f);
                }
                const uint32_t a = __byte_perm(x[0], x[1], 0x5140), b = __byte_perm(x[2], x[3], 0x5140);
                uint8_t *at = p.quad(R * t + r, quad);
                *(uint32_t *)at = __byte_perm(a, b, 0x5410);
                *(uint32_t *)(at + p.high) = __byte_perm(a, b, 0x7632);
            }
        }
    }

    static __device__ void add(state_of &state, const page_in_shared &page, const room &p, const warp_of &warp) {
        const int g = warp.g, t = warp.t;
        add_zero(state, page.v_param(), p, warp);
        uint4 b[R][2];
#pragma unroll
        for (int r = 0; r < R; ++r) { // columns: low and high bytes of a row, four rows
            const uint8_t *at = p.at + (R * (g / 2) + r) * p.stride + p.high * (g % 2) + 16 * t;
            b[r][0] = *(const uint4 *)at;
            b[r][1] = *(const uint4 *)(at + p.half);
        }
#pragma unroll
        for (int n = 0; n < warp_of::channel_chunks; ++n) {
            uint4 words[walk_of::steps];
            walk_of::load(words, page.v_codes(), warp.channel_chunk(n), warp);
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
                int y[R][4] = {};
#pragma unroll
                for (int k = 0; k < products; ++k) {
                    const uint32_t mask = ((1u << VB) - 1) * 0x01010101u << (VB * (k % planes));
                    const auto of = [&](int i, int half) { // of column 4 g + i
                        const uint32_t x = word_of(words[VB == 1 ? 0 : half], i);
                        return (k / planes + (VB == 1 ? half : 0) > 0 ? x >> 4 : x) & mask;
                    };
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        multiply_bytes(y[r], of(w, 0), of(w + 1, 0), of(w, 1), of(w + 1, 1), word_of(b[r][0], k),
                                       word_of(b[r][1], k));
                    }
                }
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    for (int k = 0; k < 2; ++k) {
                        state.sums.out[n][r][w + k] +=
                            state.sums.weight[r] * (float)(y[r][2 * k] + 256 * y[r][2 * k + 1]);
                    }
                }
            }
        }
    }

    static __device__ void finish(state_of &state, float (&zero)[R], const warp_of &) {
        for (int r = 0; r < R; ++r) {
            zero[r] = state.zero[r];
        }
    }

  private:
    static __device__ uint32_t word_of(const uint4 &x, int n) {
        return n == 0 ? x.x : n == 1 ? x.y : n == 2 ? x.z : x.w;
    }

    /* This warp's share of the products of p s with zero points: z = (q + 128 - n) / 8, codes' middle in n. */
    static __device__ void add_zero(state_of &state, const uint8_t *param, const room &p, const warp_of &warp) {
        constexpr int share = products / warp_of::size, n = 128 + 4 * ((1 << VB) - 1);
        const int g = warp.g, t = warp.t, first = warp.member * share;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            int total = 0;
#pragma unroll
            for (int k = 0; k < share; ++k) {
                const auto centre = [&](int quad) {
                    return *(const uint32_t *)(param + XQ_PAGE + 4 * quad) ^ 0x80808080u;
                };
                const int quad = p.first(t) + first + k;
                const uint8_t *at = p.at + (R * (g / 2) + r) * p.stride + p.high * (g % 2) + 16 * t + 4 * (first + k);
                int y[4] = {}; // rows g: centres, rows g + 8: 1
                multiply_bytes(y, centre(quad), 0x01010101u, centre(quad + p.apart), 0x01010101u, *(const uint32_t *)at,
                               *(const uint32_t *)(at + p.half));
                total += (y[0] + 256 * y[1] - n * (y[2] + 256 * y[3])) * (1 << shift_of(k));
            }
            state.zero[r] += state.sums.weight[r] * power_of_two(shift_of(first) - 3) * (float)total;
        }
    }
};

/* Shared memory for p of a team, whichever way the values take. */
template <int R>
constexpr int room_bytes =
    byte_p<1, R>::bytes > half_p<XQ_PAGE, R>::bytes ? byte_p<1, R>::bytes : half_p<XQ_PAGE, R>::bytes;

} // namespace

} // namespace xq
