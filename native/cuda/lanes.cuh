/* lanes.cuh: the codec of one slab: 32 rows i of the code matrix (K: channels, V: tokens of the page) of one KV head.
 *
 *     unseal:  x^ = zero + scale * code       (XQ_PARAM_LOG8: centre + scale * (code - (2^B - 1) / 2))
 *
 * A warp takes a slab, a lane each row, so that every lane goes through the same sequence of single-precision
 * operations as the CPU codec: same bytes.  Files that include this are compiled without contraction (-fmad=false);
 * divisions and square roots are IEEE, subnormals are kept.
 *
 * Shared memory: x [n_j][slab_stride(n_j)] floats, of which the last is padding, so that rows and columns are read
 * without bank conflicts.  Mapped values need as much again for what the map reads.
 */
#pragma once

#include "codec.cuh"

#include <cmath>

namespace xq {

constexpr int slab = 32;

/* Which slab a warp works on: rows first .. first + 31 of the code matrix of one page. */
struct slab_place {
    bool is_k;
    int stream, head, page, first;
};

/* Floats from element to element.  Without padding 512 elements fit the 64 KiB that some GPUs have. */
__host__ __device__ inline int slab_stride(int n_j) {
    return n_j < 512 ? slab + 1 : slab;
}

/* Shared memory of a kernel that works on slabs of a layer. */
inline size_t slab_bytes(const xq_store &store) {
    const int n_j = store.v.width > XQ_PAGE ? store.v.width : XQ_PAGE;
    return (size_t)n_j * slab_stride(n_j) * sizeof(float) * (store.mapped ? 2 : 1);
}
inline unsigned slabs_of(const xq_store &store) {
    const int width = store.k.width;
    return (unsigned)((width > XQ_PAGE ? width : XQ_PAGE) + slab - 1) / slab;
}

struct column {
    float *x; /* [n_j][stride], from the column's first element on */
    int stride;
    __device__ float &operator[](int j) const { return x[j * stride]; }
};
/* Lane's column of n_j elements. */
__device__ inline column column_of(float *shared, int n_j, int lane) {
    return {shared + lane, slab_stride(n_j)};
}

__device__ inline float low(float a, float b) {
    return b < a ? b : a;
}
__device__ inline float high(float a, float b) {
    return b > a ? b : a;
}
/* Not-a-numbers to 0, infinities to +-65504. */
__device__ inline float clamped(float x) {
    return low(high(x == x ? x : 0.0f, -65504.0f), 65504.0f);
}
/* Clamped: parameters of a loaded state may make anything. */
__device__ inline __half to_half(float x) {
    return __float2half_rn(clamped(x));
}
/* Clamped; adds the number of those that were not finite to count. */
__device__ inline float finite(float x, int &count) {
    count += !(fabsf(x) <= 65504.0f);
    return clamped(x);
}

/* Channel i of token t of an open page as F16, which bytes are rounded to. */
__device__ inline __half half_of(const open_page &page, int t, int i) {
    return page.rows ? page.rows[t * page.width + i] : to_half(page.at(t, i));
}

/* One lane of codec_fit.h. */
typedef float lanes;

__device__ inline float splat(float x) {
    return x;
}
/* Rounds half to even, for |x| < 2^22. */
__device__ inline float nearest(float x) {
    return (x + 12582912.0f) - 12582912.0f;
}
__device__ inline float inverse(float x) {
    return x != 0.0f ? 1.0f / x : 0.0f;
}

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
        e += (bits & 0x7fffffu) >= log8_thresholds[k];
    }
    p.e = min(max(e, 1), 255);
    p.scale = log8_scale(p.e);
    const float unit = p.scale * 0.125f;
    const float q = nearest(low(high(centre * (1.0f / unit), -127.0f), 127.0f));
    p.q = (int)q;
    p.base = q * unit;
    return p;
}

struct matrix {
    xq_side side;
    int n_i, n_j, group; /* rows and columns of the code matrix; elements of a group */
};

__device__ inline matrix matrix_of(const side_view &side, bool is_k) {
    const int n_j = is_k ? XQ_PAGE : side.width;
    return {side.plan, is_k ? side.width : XQ_PAGE, n_j, group_length(side.plan, n_j)};
}

#include "codec_fit.h"

/* transform() of a column by `of` threads, of which this is the nth; meet() is called by all of them.  What lies within
 * `near` neighbours is done in registers, where nothing waits for shared memory.  The same operations on the same
 * operands. */
template <int near, typename MEET>
__device__ void transform_column(column x, int n, int nth, int of, const MEET &meet) {
    const int block = hadamard_block(n);
    const float norm = (float)(1.0 / sqrt((double)block));
    if (block < near) {
        if (nth == 0) {
            transform(x, n);
        }
        meet();
        return;
    }
#pragma unroll 1
    for (int first = nth * near; first < n; first += of * near) {
        float part[near];
#pragma unroll
        for (int i = 0; i < near; ++i) {
            part[i] = x[first + i];
        }
#pragma unroll
        for (int h = 1; h < near; h *= 2) {
#pragma unroll
            for (int i = 0; i < near; ++i) {
                if ((i & h) == 0) {
                    const float a = part[i], b = part[i + h];
                    part[i] = a + b;
                    part[i + h] = a - b;
                }
            }
        }
        const float factor = block == near ? norm : 1.0f;
#pragma unroll
        for (int i = 0; i < near; ++i) {
            x[first + i] = part[i] * factor;
        }
    }
    meet();
#pragma unroll 1
    for (int h = near; h < block; h *= 2) {
        const float factor = 2 * h == block ? norm : 1.0f;
#pragma unroll 8
        for (int k = nth; k < n / 2; k += of) {
            const int i = 2 * k - (k & (h - 1)); // the k-th whose bit h is 0
            const float a = x[i], b = x[i + h];
            x[i] = (a + b) * factor;
            x[i + h] = (a - b) * factor;
        }
        meet();
    }
}

/* Row i of the code matrix of one page, in the space it is stored in. */
__device__ inline void unseal_lane(const matrix &m, column x, int i, const uint8_t *codes, const uint8_t *param) {
    for (int j0 = 0; j0 < m.n_j; j0 += m.group, param += parameter_bytes(m.side, m.n_i)) {
        const parameters p = load_parameters(m.side, param, m.n_i, i);
        for (int j = j0; j < j0 + m.group; ++j) {
            if (m.side.bits == 0) {
                x[j] = p.base;
                continue;
            }
            const uint32_t four = codes_of(m.side.bits, m.n_i, codes, j, i & ~3);
            x[j] = p.base + p.scale * ((float)(four >> 8 * (i & 3) & 0xffu) - p.middle);
        }
    }
}

/* x [j] += sign * what the map says of row i, a token; sums in the order of the source's channels, and finite, as on
 * the CPU.  u: the second half of the shared memory. */
__device__ inline void add_predicted(const xq_store &store, const slab_place &at, int i, column x, column u,
                                     float sign) {
    const side_view from = source_at(store, at.stream, at.head);
    const int width = store.v.width;
    unseal_lane(matrix_of(from, false), u, i, page_codes(from, at.page), page_param(from, at.page));
    const float *map = map_of(store, at.head);
    int bad = 0; // not of the input: codes and parameters of a loaded state may be anything
    for (int j = 0; j < width; ++j) {
        float sum = 0.0f;
        for (int k = 0; k < width; ++k) {
            sum = sum + u[k] * map[(int64_t)k * width + j];
        }
        x[j] = x[j] + sign * finite(sum, bad);
    }
}

/* A slab of a sealed page to F16 rows [XQ_PAGE][width], distance stride elements. */
__device__ inline void unseal_slab(const xq_store &store, const slab_place &at, __half *rows, int64_t stride,
                                   float *shared) {
    const side_view side = side_at(side_of(store, at.is_k), at.stream, at.head);
    const matrix m = matrix_of(side, at.is_k);
    const int lane = threadIdx.x % slab, i = at.first + lane;
    const column x = column_of(shared, m.n_j, lane);
    if (i < m.n_i) {
        unseal_lane(m, x, i, page_codes(side, at.page), page_param(side, at.page));
        if (!at.is_k && store.mapped) {
            add_predicted(store, at, i, x, column_of(shared + m.n_j * x.stride, m.n_j, lane), 1.0f);
        }
        if (m.side.rotate) {
            transform_column<64>(x, m.n_j, 0, 1, [] {});
        }
    }
    __syncwarp();
    for (int k = lane; k < m.n_j * slab; k += slab) {
        const int r = at.is_k ? k % slab : k / m.n_j, j = at.is_k ? k / slab : k % m.n_j;
        if (at.first + r < m.n_i) {
            rows[at.is_k ? j * stride + at.first + r : (at.first + r) * stride + j] =
                to_half(column_of(shared, m.n_j, r)[j]);
        }
    }
    __syncwarp();
}

} // namespace xq
