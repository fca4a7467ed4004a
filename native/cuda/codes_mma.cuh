/* codes_mma.cuh: the product of codes with eight vectors on the tensor cores.
 *
 *     y[j] += sum_i a[i] c[i][j]        K: i = channel, j = token, a = q s       V: i = token, j = channel, a = p s
 *
 * mma.m16n8k16: operand A is codes (16 columns j by 16 rows i), B the folded vectors of eight query rows.  Lane
 * (g = lane / 4, t = lane % 4) reads, for 32 columns and step s, one 16-byte word:
 *
 *     columns 4 g .. 4 g + 3 of the 32, unit 4 s + t      ->  products (s, plane p) with i = I (4 s + t) + 4 p + 0..3
 *
 * Which i a product takes is free as long as A and B agree, so that codes go from memory to operand by a mask: the
 * masked bits are an F16 subnormal, code * 2^(B p) * 2^-24.  2^-(B p) is folded into the vector, 2^24 into the sum.
 * Rows g and g + 8 of a product are columns 4 g + w and 4 g + w + 1, w = 0 or 2, so that a lane ends with four
 * consecutive columns for query rows 2 t and 2 t + 1.
 *
 * 3 bits are a 2-bit and a 1-bit part, one after the other; the weight of the second is 4.
 */
#pragma once

#include "codec.cuh"

namespace xq {

constexpr float code_unit = 16777216.0f;

/* A lane of a warp, as the operands of products divide them. */
struct lane_place {
    int lane, g, t; /* lane / 4, lane % 4 */

    static __device__ lane_place here() {
        const int lane = threadIdx.x % 32;
        return {lane, lane / 4, lane % 4};
    }
};

__device__ inline void multiply(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

/* The first half of it, eight rows i: m16n8k8. */
__device__ inline void multiply_half(float c[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

/* The same for bytes, four of a row in a register: m16n8k32. */
__device__ inline void multiply_bytes(int c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                      uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    const uint32_t a[2][2] = {{a0, a1}, {a2, a3}}, b[2] = {b0, b1};
    for (int k = 0; k < 2; ++k) {
        for (int row = 0; row < 2; ++row) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.u8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                : "+r"(c[2 * row]), "+r"(c[2 * row + 1])
                : "r"(a[k][row]), "r"(b[k]));
        }
    }
#endif
}

__device__ inline uint32_t as_bits(__half2 x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
__device__ inline __half2 as_half2(uint32_t bits) {
    __half2 x;
    memcpy(&x, &bits, 4);
    return x;
}
__device__ inline uint32_t halves(float low, float high) {
    return as_bits(__floats2half2_rn(low, high));
}
/* Elements 0 and 2, 1 and 3, of four halves: B's order. */
__device__ inline uint32_t even(uint2 x) {
    return __byte_perm(x.x, x.y, 0x5410);
}
__device__ inline uint32_t odd(uint2 x) {
    return __byte_perm(x.x, x.y, 0x7632);
}
/* Four bytes of an open page as halves, centre + scale * byte, finite whatever the parameters are. */
__device__ inline uint2 widen_four(uint32_t bytes, uint2 scale, uint2 centre) {
    const uint32_t x = bytes ^ 0x80808080u; // byte + 128; below 2^10, a half has it in its last bits
    const __half2 top = __float2half2_rn(65504.0f), offset = __float2half2_rn(1024.0f + 128.0f);
    const auto widened = [&](uint32_t two, uint32_t s, uint32_t c) {
        const __half2 y = __hfma2(__hsub2(as_half2(two), offset), as_half2(s), as_half2(c));
        return as_bits(__hmax2(__hmin2(y, top), __hneg2(top)));
    };
    return make_uint2(widened(__byte_perm(x, 0x64646464u, 0x4140), scale.x, centre.x),
                      widened(__byte_perm(x, 0x64646464u, 0x4342), scale.y, centre.y));
}
/* The n-th of four halves, four times. */
__device__ inline uint2 four_times(uint2 x, int n) {
    const uint32_t two = __byte_perm(n < 2 ? x.x : x.y, 0, n % 2 == 0 ? 0x1010 : 0x3232);
    return make_uint2(two, two);
}
/* Maximum over the warp. */
__device__ inline uint32_t warp_max(uint32_t x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, x);
#else
    for (int step = 1; step < 32; step *= 2) {
        x = max(x, __shfl_xor_sync(~0u, x, step));
    }
    return x;
#endif
}
__device__ inline float power_of_two(int n) {
    return __uint_as_float((uint32_t)(n + 127) << 23);
}

/* How a lane walks one part (1, 2 or 4 bits) of the codes of a matrix with N rows i. */
template <int BITS, int N> struct part_walk {
    static constexpr int units = N * BITS / 32, steps = (units + 3) / 4, planes = 8 / BITS, products = steps * planes;
    static constexpr bool full = units % 4 == 0; /* every lane has a unit in every step */

    static __device__ bool has(int step, int t) { return full || 4 * step + t < units; }
    /* First of the four rows i of a product; N or more: it takes none. */
    static __device__ int row(int product, int t) {
        return 32 / BITS * (4 * (product / planes) + t) + 4 * (product % planes);
    }
    static __device__ float weight(int product) { return 1.0f / (float)(1 << (BITS * (product % planes))); }

    /* at: the part of the 16 columns, at this lane's unit and columns. */
    static __device__ void load(uint4 *words /* [steps] */, const uint8_t *at, int t) {
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            words[s] = has(s, t) ? *(const uint4 *)(at + 256 * s) : uint4{};
        }
    }

    /* c[0], c[1]: columns 4 g, 4 g + 1 and 4 g + 2, 4 g + 3.  b [products][2] */
    static __device__ void add(float c[2][4], const uint4 *words, const uint32_t (*b)[2]) {
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            const uint32_t w[4] = {words[s].x, words[s].y, words[s].z, words[s].w};
            const uint32_t v[4] = {w[0] >> 8, w[1] >> 8, w[2] >> 8, w[3] >> 8};
#pragma unroll
            for (int p = 0; p < planes; ++p) {
                const uint32_t mask = ((1u << BITS) - 1) * 0x00010001u << (BITS * p);
                const uint32_t *x = b[s * planes + p];
                multiply(c[0], w[0] & mask, w[1] & mask, v[0] & mask, v[1] & mask, x[0], x[1]);
                multiply(c[1], w[2] & mask, w[3] & mask, v[2] & mask, v[3] & mask, x[0], x[1]);
            }
        }
    }
};

/* All parts of BITS-bit codes: words and products of the low part, then of the high one. */
template <int BITS, int N> struct walk {
    using low = part_walk<BITS == 3 ? 2 : BITS, N>;
    using high = part_walk<1, N>; /* of 3 bits */
    static constexpr int steps = low::steps + (BITS == 3 ? high::steps : 0);
    static constexpr int products = low::products + (BITS == 3 ? high::products : 0);
    static constexpr int bytes = 64 * (low::units + (BITS == 3 ? high::units : 0)); /* of 16 columns */

    static __device__ int row(int product, int t) {
        return product < low::products ? low::row(product, t) : high::row(product - low::products, t);
    }
    static __device__ float weight(int product) {
        return product < low::products ? low::weight(product) : 4.0f * high::weight(product - low::products);
    }
    /* Whether the four rows exist, for this lane. */
    static __device__ bool has(int product, int t) {
        return product < low::products ? low::has(product / low::planes, t)
                                       : high::has((product - low::products) / high::planes, t);
    }
    /* words [steps] of columns 32 chunk .. 32 chunk + 31. */
    static __device__ void load(uint4 *words, const uint8_t *codes, int chunk, const lane_place &place) {
        const uint8_t *at = codes + (2 * chunk + place.g / 4) * bytes + 64 * place.t + 16 * (place.g % 4);
        low::load(words, at, place.t);
        if (BITS == 3) {
            high::load(words + low::steps, at + 64 * low::units, place.t);
        }
    }
    static __device__ void add(float c[2][4], const uint4 *words, const uint32_t (*b)[2]) {
        low::add(c, words, b);
        if (BITS == 3) {
            high::add(c, words + low::steps, b + low::products);
        }
    }
};

} // namespace xq
