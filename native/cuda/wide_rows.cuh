/* wide_rows.cuh: query rows of a block of the kernels for wide heads. */
#pragma once

#include "alibi.h"
#include "wide_softmax.cuh"

namespace xq {

namespace {

/* A query row in the registers of a warp: channels 4 (lane + 32 k) .. + 3 in x [k]. */
template <int MOST> struct query_row {
    float4 x[MOST];
    int token, head;

    /* Row r of a tile; rows past the last are as the last. */
    __device__ void load(int r, int width, const xq_attend_args &args, const wide_call &call, const block_task &task,
                         int lane) {
        const int row = min(task.first_row + r, call.rows_of_head - 1);
        token = call.token_of(row), head = task.head * call.n_rep + call.rest_of(row);
        const float *q = query_at(args, task.nth_stream, token, head);
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            const int i = 4 * (lane + 32 * k);
            x[k] = i < width ? *(const float4 *)(q + i) : float4{};
        }
    }
    /* The row times the normalised Hadamard matrix, of blocks of the largest power of two that divides the width. */
    __device__ void rotate(int width, int lane) {
        const int block = hadamard_block(width);
        const auto join = [](float4 &a, float4 &b) {
            const float4 x = a, y = b;
            a = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
            b = make_float4(x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w);
        };
        const float norm = rsqrtf((float)block);
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            const float4 y = x[k];
            const float a = (y.x + y.y) * norm, b = (y.x - y.y) * norm, c = (y.z + y.w) * norm, d = (y.z - y.w) * norm;
            x[k] = make_float4(a + c, b + d, a - c, b - d);
        }
#pragma unroll 1
        for (int step = 1; step < 32 && 4 * step < block; step *= 2) { // channels of other lanes
            const float sign = lane & step ? -1.0f : 1.0f;
#pragma unroll
            for (int k = 0; k < MOST; ++k) {
                float *y = (float *)(x + k);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    y[i] = fmaf(y[i], sign, __shfl_xor_sync(~0u, y[i], step));
                }
            }
        }
#pragma unroll
        for (int step = 1; step < MOST; step *= 2) {
#pragma unroll
            for (int k = 0; k + step < MOST; ++k) {
                if (128 * step < block && (k & step) == 0) {
                    join(x[k], x[k + step]);
                }
            }
        }
    }
    /* As row r of a tile to shared memory: scaled by a power of two to below 1, rounded, in the order of codes of
     * `bits` bits (wide_codes.cuh); and what is known of the row. */
    template <int NT>
    __device__ void store(uint8_t *queries, wide_tile<NT> &tile, int r, int bits, int width, const xq_attend_args &args,
                          const block_task &task, int lane) const {
        float top = 0.0f;
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            top = fmaxf(fmaxf(top, fmaxf(fabsf(x[k].x), fabsf(x[k].y))), fmaxf(fabsf(x[k].z), fabsf(x[k].w)));
        }
        const int exponent = min(max((int)(warp_max(__float_as_uint(top)) >> 23) - 126, -100), 100); // top < 2^exponent
        if (lane == 0) {
            tile.factor[r] = power_of_two(exponent) * args.scale * log2e;
            tile.slope[r] = slope_of(args.max_bias, head, args.n_head) * log2e;
            tile.mask[r] = (const __half *)mask_at(args, task.nth_stream, token);
        }
        const auto store_part = [&](const code_part &part, uint8_t *to, float weight) {
#pragma unroll
            for (int k = 0; k < MOST; ++k) {
                const int quad = lane + 32 * k; // beyond the width: 0, for products take whole steps
                if (quad < 4 * part.products()) {
                    const float by = weight * power_of_two(-exponent) * weight_of_quad(part, quad);
                    *(uint2 *)(to + place_of_quad<NT>(part.planes, quad, r)) =
                        make_uint2(halves(x[k].x * by, x[k].z * by), halves(x[k].y * by, x[k].w * by));
                }
            }
        };
        const code_part low = low_part(bits, width);
        store_part(low, queries, 1.0f);
        if (bits == 3) {
            store_part(high_part(width), queries + low.products() * product_bytes<NT>, 4.0f);
        }
    }
};

} // namespace

} // namespace xq
