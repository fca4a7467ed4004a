/* codec.cuh: codes, parameters and rows as the kernels see them; xquant.h has the layout, store.h says where they lie.
 *
 * Four consecutive rows i of one column j are four bytes of one word, at the bits of their plane, so that the primitive
 * of all kernels is four codes at a time:
 *
 *     codes_of(bits, column, j, i)  ->  c[i] | c[i + 1] << 8 | c[i + 2] << 16 | c[i + 3] << 24        i % 4 == 0
 *
 * Bytes of open pages become F16 or single precision as they are loaded, x^ = centre + scale * byte.
 */
#pragma once

#include "store.h"

#include <cuda_fp16.h>

namespace xq {

/* [XQ_PAGE][width] of an open page. */
__device__ inline __half *open_rows(const side_view &side, int slot) {
    return (__half *)slot_rows(side, slot);
}

/* ---- open pages ---- */

/* One side of one, in rows or, where `rows` is null, in bytes. */
struct open_page {
    const __half *rows;
    byte_page bytes;
    int width;

    /* Channel i of token t, not rounded. */
    __device__ float at(int t, int i) const {
        if (rows) {
            return __half2float(rows[t * width + i]);
        }
        const __half *scale = (const __half *)bytes.scale + (bytes.by_channel ? i : t);
        return __half2float(scale[bytes.n]) + __half2float(*scale) * (float)bytes.codes[t * width + i];
    }
};
__device__ inline open_page open_page_of(const side_view &side, bool is_k, int slot) {
    open_page page = {};
    page.width = side.width;
    if (is_bytes(slot)) {
        page.bytes = bytes_at(side, is_k, slot);
    } else {
        page.rows = open_rows(side, slot);
    }
    return page;
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
