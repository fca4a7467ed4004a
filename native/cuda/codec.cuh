/* codec.cuh: blocks, codes and parameters as the kernels see them; xquant.h has the layout.
 *
 * Four consecutive rows i of one column j are four bytes of one word, at the bits of their plane, so that the primitive
 * of all kernels is four codes at a time:
 *
 *     codes_of(bits, column, j, i)  ->  c[i] | c[i + 1] << 8 | c[i + 2] << 16 | c[i + 3] << 24        i % 4 == 0
 */
#pragma once

#include "codec_format.h"
#include "xquant_cuda.h"

#include <cuda_fp16.h>

namespace xq {

constexpr int page_sealed = -1, page_free = -2;

/* ---- storage ---- */

/* One side (keys or values) of one KV head. */
struct side_view {
    xq_side plan;
    int width;
    bool own;               /* codes of its own, not of another layer */
    uint8_t *codes, *param; /* of page 0; null where absent */
    int64_t codes_stride, param_stride;
    __half *window; /* [slot][XQ_PAGE][width] */
};

__host__ __device__ inline side_view key_view(const xq_cuda_layer &l, int stream, int head) {
    const int64_t block = (int64_t)head * l.n_pages;
    uint8_t *codes = l.k_blocks + stream * l.k_stream + block * l.k_owner.bytes + l.k_owner.k_codes;
    uint8_t *param = l.blocks + stream * l.blocks_stream + block * l.own.bytes + l.own.k_param;
    __half *window = (__half *)((char *)l.window + stream * l.window_stream);
    window += (int64_t)head * l.n_slots * XQ_PAGE * l.d;
    return {l.plan.k, l.d, l.plan.k.owner < 0, codes, param, l.k_owner.bytes, l.own.bytes, window};
}

__host__ __device__ inline side_view value_view(const xq_cuda_layer &l, int stream, int head) {
    const int64_t block = (int64_t)head * l.n_pages;
    uint8_t *codes = l.v_blocks + stream * l.v_stream + block * l.v_owner.bytes + l.v_owner.v_codes;
    uint8_t *param = l.blocks + stream * l.blocks_stream + block * l.own.bytes + l.own.v_param;
    __half *window = (__half *)((char *)l.window + stream * l.window_stream);
    window += (int64_t)l.n_slots * XQ_PAGE * ((int64_t)l.n_head_kv * l.d + (int64_t)head * l.e);
    return {l.plan.v, l.e, l.plan.v.owner < 0, codes, param, l.v_owner.bytes, l.own.bytes, window};
}

/* The values that a map of this head reads; window: null. */
__device__ inline side_view source_view(const xq_cuda_layer &l, int stream, int head) {
    const int64_t block = (int64_t)l.map_heads[head] * l.n_pages * l.source_layout.bytes + stream * l.source_stream;
    uint8_t *at = (uint8_t *)l.source_blocks + block;
    return {l.source,
            l.e,
            true,
            at + l.source_layout.v_codes,
            at + l.source_layout.v_param,
            l.source_layout.bytes,
            l.source_layout.bytes,
            nullptr};
}

/* ---- codes ---- */

/* One part of 1, 2 or 4 bits; column: the 16 columns that j lies in. */
__device__ inline uint32_t part_codes_of(int bits, const uint8_t *column, int j, int i) {
    const int rows = 32 / bits;
    const uint32_t word = *(const uint32_t *)(column + 64 * (i / rows) + 4 * (j % 16));
    return word >> (bits * (i % rows / 4)) & ((1u << bits) - 1) * 0x01010101u;
}

__device__ inline uint32_t codes_of(int bits, int n_i, const uint8_t *codes, int j, int i) {
    const uint8_t *column = codes + (int64_t)(j / 16) * column_bytes(bits, n_i);
    if (bits == 3) {
        return part_codes_of(2, column, j, i) | part_codes_of(1, column + 64 * units_of(2, n_i), j, i) << 2;
    }
    return part_codes_of(bits, column, j, i);
}

/* ---- parameters ---- */

/* x^ = base + scale * (code - middle): F16 stores zero as base with middle 0, LOG8 the centre. */
struct parameters {
    float scale, base, middle;
    int e, q; /* LOG8 as stored */
};

/* 2^((e - 161) / 8), rounded as the steps of the CPU codec are. */
__device__ inline float log8_scale(int e) {
    const int k = e - log8_zero;
    return log8_steps[k & 7] * __uint_as_float((uint32_t)((k >> 3) + 127) << 23);
}

/* at: [2][n_i] of the group (0 bits: [n_i]). */
__device__ inline parameters load_parameters(const xq_side &side, const uint8_t *at, int n_i, int i) {
    parameters p = {};
    const __half *h = (const __half *)at;
    if (side.bits == 0) {
        p.base = __half2float(h[i]);
    } else if (side.param == XQ_PARAM_F16) {
        p.scale = __half2float(h[i]);
        p.base = __half2float(h[n_i + i]);
    } else {
        p.e = at[i];
        p.q = (int8_t)at[n_i + i];
        p.middle = (float)((1 << side.bits) - 1) * 0.5f;
        p.scale = log8_scale(p.e);
        p.base = (float)p.q * (p.scale * 0.125f);
    }
    return p;
}

} // namespace xq
