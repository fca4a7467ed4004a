/* fit.cuh: scale and zero of one group of one lane, and its codes; the same operations as the CPU codec's.
 *
 *     zero, scale from the group's values;  code = round((x - zero) / scale), clamped to 0 .. 2^B - 1
 */
#pragma once

#include "lanes.cuh"

namespace xq {

/* Rounds half to even, for |x| < 2^22. */
__device__ inline float nearest(float x) {
    return (x + 12582912.0f) - 12582912.0f;
}
__device__ inline float inverse(float x) {
    return x != 0.0f ? 1.0f / x : 0.0f;
}

/* ---- parameters ---- */

/* Mantissa bits of 2^((j + 1/2) / 8): where one step of the logarithmic scale rounds to the next. */
__device__ const uint32_t thresholds[8] = {0x05aac3, 0x11c3d3, 0x1ef532, 0x2d583f,
                                           0x3d08a4, 0x4e248c, 0x60ccdf, 0x75257d};

__device__ inline parameters round_parameters(const xq_side &side, float scale, float zero) {
    parameters p = {};
    if (side.param == XQ_PARAM_F16) {
        p.scale = __half2float(to_half(scale));
        p.base = __half2float(to_half(zero));
        return p;
    }
    p.middle = (float)((1 << side.bits) - 1) * 0.5f;
    const float centre = zero + scale * p.middle;
    scale = high(scale, fabsf(centre) * (8.0f / 120.0f));
    const uint32_t bits = __float_as_uint(scale);
    int e = ((int)(bits >> 23) - 127) * 8 + log8_zero;
    for (int k = 0; k < 8; ++k) {
        e += (bits & 0x7fffffu) >= thresholds[k];
    }
    p.e = min(max(e, 1), 255);
    p.scale = log8_scale(p.e);
    const float unit = p.scale * 0.125f;
    const float q = nearest(low(high(centre * (1.0f / unit), -127.0f), 127.0f));
    p.q = (int)q;
    p.base = q * unit;
    return p;
}

__device__ inline void store_parameters(const xq_side &side, uint8_t *at, int n_i, int i, const parameters &p) {
    __half *h = (__half *)at;
    if (side.bits == 0) {
        h[i] = to_half(p.base);
    } else if (side.param == XQ_PARAM_F16) {
        h[i] = to_half(p.scale);
        h[n_i + i] = to_half(p.base);
    } else {
        at[i] = (uint8_t)p.e;
        at[n_i + i] = (uint8_t)p.q;
    }
}

/* ---- fits ---- */

/* One group of a lane: elements x[first] .. x[first + n_j - 1]. */
struct group {
    const xq_side &side;
    column x;
    int first, n_j;
    int top; /* largest code, 2^B - 1 */
    float min, max;
    __device__ float operator[](int j) const { return x[first + j]; }
};

__device__ inline float encode(float x, const parameters &p, float inv, int top) {
    return nearest(low(high((x - p.base) * inv + p.middle, 0.0f), (float)top));
}

__device__ inline parameters relaxed(const group &g, float eta) {
    const float range = g.max - g.min;
    parameters p = {};
    p.scale = range / (float)g.top * (1.0f - 2.0f * eta);
    p.base = g.min + range * eta;
    return p;
}

__device__ inline parameters fit_clip(const group &g) {
    constexpr float one_bit[8] = {0.0f, 0.05f, 0.1f, 0.15f, 0.2f, 0.25f, 0.3f, 0.35f};
    constexpr float more_bits[6] = {0.0f, 0.04f, 0.08f, 0.12f, 0.16f, 0.2f};
    const int n = g.side.bits == 1 ? 8 : 6;
    parameters best = {};
    float best_error = INFINITY;
    for (int k = 0; k < n; ++k) {
        const parameters raw = relaxed(g, g.side.bits == 1 ? one_bit[k] : more_bits[k]);
        const parameters p = round_parameters(g.side, raw.scale, raw.base);
        const float inv = inverse(p.scale);
        float error = 0.0f;
        for (int j = 0; j < g.n_j; ++j) {
            const float off = p.base + p.scale * (encode(g[j], p, inv, g.top) - p.middle) - g[j];
            error = error + off * off;
        }
        if (error < best_error) {
            best_error = error;
            best = p;
        }
    }
    return best;
}

/* Least-squares scale and zero for given codes; `flat` where they are all the same. */
template <typename F> __device__ parameters least_squares(const group &g, const parameters &flat, const F &code) {
    const float shift = (g.min + g.max) * 0.5f; // keeps the sums small where the group lies far from zero
    float sum_c = 0.0f, sum_cc = 0.0f, sum_x = 0.0f, sum_xc = 0.0f;
    for (int j = 0; j < g.n_j; ++j) {
        const float c = code(j), x = g[j] - shift;
        sum_c = sum_c + c;
        sum_cc = sum_cc + c * c;
        sum_x = sum_x + x;
        sum_xc = sum_xc + x * c;
    }
    const float mean_c = sum_c / (float)g.n_j;
    const float variance = sum_cc - sum_c * mean_c;
    if (!(variance > 0.25f)) { // codes that differ at all give about 1 or more; less is rounding
        parameters p = {};
        p.scale = flat.scale;
        p.base = flat.base;
        return p;
    }
    parameters p = {};
    p.scale = (sum_xc - sum_x * mean_c) / variance;
    p.base = shift + sum_x / (float)g.n_j - p.scale * mean_c;
    return p;
}

__device__ inline float mean(const group &g) {
    const float shift = (g.min + g.max) * 0.5f;
    float sum = 0.0f;
    for (int j = 0; j < g.n_j; ++j) {
        sum = sum + (g[j] - shift);
    }
    return shift + sum / (float)g.n_j;
}

__device__ inline parameters fit_lloyd(const group &g) {
    parameters p = relaxed(g, g.side.eta);
    for (int step = 0; step < 3; ++step) {
        const parameters before = p;
        const float inv = inverse(before.scale);
        p = least_squares(g, before, [&](int j) { return encode(g[j], before, inv, g.top); });
    }
    return round_parameters(g.side, p.scale, p.base);
}

/* Parameters of row i; own codes replace the values in x. */
__device__ inline void seal_lane(const matrix &m, column x, int i, const uint8_t *owner_codes, uint8_t *param) {
    const xq_side &side = m.side;
    for (int j0 = 0; j0 < m.n_j; j0 += m.group, param += group_param_bytes(side, m.n_i)) {
        group g = {side, x, j0, m.group, (1 << side.bits) - 1, x[j0], x[j0]};
        for (int j = 1; j < m.group; ++j) {
            g.min = low(g.min, g[j]);
            g.max = high(g.max, g[j]);
        }
        parameters p = {};
        if (side.bits == 0) {
            p.base = mean(g);
        } else if (side.fit == XQ_FIT_LSQ) {
            parameters flat = {};
            flat.base = mean(g);
            p = least_squares(g, flat, [&](int j) {
                return (float)(codes_of(side.bits, m.n_i, owner_codes, j0 + j, i & ~3) >> 8 * (i & 3) & 0xffu);
            });
            p = round_parameters(side, p.scale, p.base);
        } else if (side.fit == XQ_FIT_CLIP) {
            p = fit_clip(g);
        } else if (side.fit == XQ_FIT_LLOYD) {
            p = fit_lloyd(g);
        } else {
            p = relaxed(g, side.eta);
            p = round_parameters(side, p.scale, p.base);
        }
        store_parameters(side, param, m.n_i, i, p);
        if (side.bits == 0 || owner_codes) {
            continue;
        }
        // the paper's codes belong to the full range, before it was relaxed and rounded
        const parameters grid = side.fit == XQ_FIT_PAPER ? relaxed(g, 0.0f) : p;
        const float inv = inverse(grid.scale);
        for (int j = j0; j < j0 + m.group; ++j) {
            x[j] = encode(x[j], grid, inv, g.top);
        }
    }
}

} // namespace xq
