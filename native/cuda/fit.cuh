/* fit.cuh: what one lane stores: parameters, and codes in place of its values; and how a block of threads, of one warp
 * or more, packs a slab's codes or bytes. */
#pragma once

#include "lanes.cuh"

namespace xq {

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

/* Elements first, first + 1, ... of a column. */
struct tail {
    column x;
    int first;
    __device__ float operator[](int j) const { return x[first + j]; }
};

/* Parameters of row i; own codes replace the values in x. */
__device__ inline void seal_lane(const matrix &m, column x, int i, const uint8_t *owner_codes, uint8_t *param) {
    const xq_side &side = m.side;
    for (int j0 = 0; j0 < m.n_j; j0 += m.group, param += parameter_bytes(side, m.n_i)) {
        const auto g = make_group(side, tail{x, j0}, m.group);
        const parameters p = fit(g, [&](int j) {
            return (float)(codes_of(side.bits, m.n_i, owner_codes, j0 + j, i & ~3) >> 8 * (i & 3) & 0xffu);
        });
        store_parameters(side, param, m.n_i, i, p);
        if (side.bits == 0 || owner_codes) {
            continue;
        }
        const parameters grid = grid_of(g, p);
        const float inv = inverse(grid.scale);
        for (int j = j0; j < j0 + m.group; ++j) {
            x[j] = encode(x[j], grid, inv, g.top);
        }
    }
}

/* The words of one part (1, 2 or 4 bits) of the slab's units, from the codes in x; shift: of the part in a code. */
__device__ inline void pack_part(const matrix &m, float *x, int i0, int bits, int shift, uint8_t *codes, int offset) {
    const int rows = 32 / bits, n_units = units_of(bits, min(slab, m.n_i - i0));
    for (int k = threadIdx.x; k < m.n_j * n_units; k += blockDim.x) {
        const int j = k % m.n_j, unit = k / m.n_j;
        uint32_t word = 0;
        for (int r = 0; r < rows; ++r) {
            const int i = unit * rows + r; // of the slab
            const uint32_t code = i0 + i < m.n_i ? (uint32_t)column_of(x, m.n_j, i)[j] >> shift : 0;
            word |= (code & ((1u << bits) - 1)) << (8 * (r % 4) + bits * (r / 4));
        }
        uint8_t *at = codes + (int64_t)(j / 16) * column_bytes(m.side.bits, m.n_i) + offset;
        *(uint32_t *)(at + 64 * (i0 / rows + unit) + 4 * (j % 16)) = word;
    }
}

/* The slab's codes, [n_j][slab] in x, as the block stores them. */
__device__ inline void pack_codes(const matrix &m, float *x, int i0, uint8_t *codes) {
    if (m.side.bits == 3) {
        pack_part(m, x, i0, 2, 0, codes, 0);
        pack_part(m, x, i0, 1, 2, codes, 64 * units_of(2, m.n_i));
    } else if (m.side.bits > 0) {
        pack_part(m, x, i0, m.side.bits, 0, codes, 0);
    }
}

/* The slab from row `first` on, [n_j][slab] in x, to a page in bytes (codec_bytes.h has the equations).  By the whole
 * block, after a barrier. */
__device__ inline void shrink_slab(const byte_page &page, float *x, int first) {
    __shared__ float centres[slab], inverses[slab];
    const int n_j = page.by_channel ? XQ_PAGE : page.width, i = first + (int)threadIdx.x;
    if (threadIdx.x < slab && i < page.n) {
        const column row = column_of(x, n_j, threadIdx.x);
        float least = row[0], most = row[0];
#pragma unroll 8
        for (int j = 1; j < n_j; ++j) {
            least = low(least, row[j]);
            most = high(most, row[j]);
        }
        const __half middle = to_half((least + most) * 0.5f);
        const float centre = __half2float(middle), reach = high(most - centre, centre - least);
        const __half step = to_half(reach * (1.0f / 127.0f) * (1.0f + 0x1p-11f) + 0x1p-25f);
        ((__half *)page.scale)[i] = step;
        ((__half *)page.scale)[page.n + i] = middle;
        centres[threadIdx.x] = centre;
        inverses[threadIdx.x] = inverse(__half2float(step));
    }
    __syncthreads();
    // four bytes at a time: widths are multiples of 16
    const int n_words = page.by_channel ? slab / 4 : n_j / 4; // of a token
    for (int k = threadIdx.x; k < (page.by_channel ? n_j : slab) * n_words; k += blockDim.x) {
        const int t = k / n_words, c = k % n_words * 4; // token and channel, counted from the slab's first
        if (page.by_channel && first + c >= page.n) {
            continue;
        }
        uint32_t word = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int r = page.by_channel ? c + n : t, j = page.by_channel ? t : c + n;
            const float byte =
                nearest(low(high((column_of(x, n_j, r)[j] - centres[r]) * inverses[r], -127.0f), 127.0f));
            word |= ((uint32_t)(int)byte & 0xffu) << 8 * n;
        }
        *(uint32_t *)(page.codes + (page.by_channel ? t * page.width + first + c : (first + t) * page.width + c)) =
            word;
    }
}

/* The token whose value token t has: itself, or the first valid one. */
__device__ inline int source_of(const uint32_t *valid /* [4] */, int t) {
    if (valid[t / 32] >> (t % 32) & 1u) {
        return t;
    }
    int word = 0;
    while (word < 3 && valid[word] == 0) {
        word++;
    }
    return valid[word] == 0 ? XQ_PAGE - 1 : 32 * word + __ffs(valid[word]) - 1;
}

} // namespace xq
