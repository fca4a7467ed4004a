/* team.cuh: the warps that share a sealed page, and the query rows that they hold. */
#pragma once

#include "codes_mma.cuh"

namespace xq {

namespace {

/* Query rows of a tile; a lane ends with R of them.  With R = 1 two of a product's eight columns are the same row,
 * which halves the work on scores. */
template <int R> constexpr int n_rows = 4 * R;
/* The row that column g of a product is. */
template <int R> __device__ int row_of_column(int g) {
    return R == 1 ? g / 2 : g;
}

/* Warps of a block, at most.  The fewer bits, the less waits for memory and the more for what each warp does. */
__host__ __device__ constexpr int max_warps(int rows_of_lane, int bits) {
    return rows_of_lane == 1 && bits <= 3 ? 20 : 12;
}

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

} // namespace

} // namespace xq
