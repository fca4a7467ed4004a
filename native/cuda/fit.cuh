/* fit.cuh: what one lane stores: parameters, and codes in place of its values. */
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

} // namespace xq
