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

/* Where a thread stands: the member-th warp of a team of E / 64, and its lane there.  It ends with scores and sums of
 * query rows R t .. R t + R - 1 and, of every 32 tokens or channels, of 4 g .. 4 g + 3. */
template <int E> struct warp_place : lane_place {
    static constexpr int size = E / 64;                  /* warps of a team */
    static constexpr int chunks = XQ_PAGE / 32 / size;   /* of 32 tokens each: a warp's share of a page's scores */
    static constexpr int channel_chunks = E / 32 / size; /* of 32 channels each: its share of the sums */
    static constexpr bool may_lack_values = false;       /* a page has four parts */
    int team, member;

    static __device__ warp_place here() {
        const int warp = threadIdx.x / 32;
        return {lane_place::here(), warp / size, warp % size};
    }
    __device__ int first_warp() const { return team * size; } /* of the team, in the block */
    __device__ int chunk(int n) const { return member * chunks + n; }
    __device__ int channel_chunk(int n) const { return member * channel_chunks + n; }
    /* Waits for the team's other warps. */
    __device__ void meet() const {
        if (size == 1) {
            __syncwarp();
        } else {
            asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(32 * size) : "memory");
        }
    }
};

} // namespace

} // namespace xq
