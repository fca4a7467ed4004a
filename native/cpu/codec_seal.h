/* codec_seal.h: sealing and unsealing, a vector of groups at a time; see codec_lanes.h and codec_fit.h.  Compiled once
 * per kernel set. */
#include "codec_lanes.h"

namespace xq {
namespace XQ_SET {

#include "codec_fit.h"

/* ---- one vector of groups ---- */

struct matrix {
    const xq_side &side;
    int n_i, n_j; /* lanes and elements of the whole side */
    int group;    /* elements of a group */
};

static inline matrix key_matrix(const xq_side &side, int d) {
    return {side, d, XQ_PAGE, side.group};
}
static inline matrix value_matrix(const xq_side &side, int e) {
    return {side, XQ_PAGE, e, group_length(side, e)};
}

/* x [n_j]: lanes i0 .. i0 + n_lanes - 1.  codes: of element j at j * n_packed; read if borrowed, else written. */
static inline void seal_lanes(const matrix &m, const lanes *x, int i0, uint8_t *codes, uint8_t *param, bool borrowed) {
    const xq_side &side = m.side;
    for (int j0 = 0; j0 < m.n_j; j0 += m.group, param += parameter_bytes(side, m.n_i)) {
        const auto g = make_group(side, x + j0, m.group);
        uint8_t *const c = codes + j0 * n_packed;
        const parameters p = fit(g, [&](int j) { return load_codes(c + j * n_packed); });
        store_parameters(side, param, m.n_i, i0, p);
        if (side.bits == 0 || borrowed) {
            continue;
        }
        const parameters grid = grid_of(g, p);
        const lanes inv = inverse(grid.scale);
        for (int j = 0; j < m.group; ++j) {
            store_codes(c + j * n_packed, encode(g.x[j], grid, inv, g.top));
        }
    }
}

static inline void unseal_lanes(const matrix &m, lanes *x, int i0, const uint8_t *codes, const uint8_t *param) {
    for (int j0 = 0; j0 < m.n_j; j0 += m.group, param += parameter_bytes(m.side, m.n_i)) {
        const parameters p = load_parameters(m.side, param, m.n_i, i0);
        for (int j = j0; j < j0 + m.group; ++j) {
            x[j] = m.side.bits == 0 ? p.base : p.base + p.scale * (load_codes(codes + j * n_packed) - p.middle);
        }
    }
}

/* codes [n_j][n_packed] of rows i0 .. i0 + n_packed - 1 to the unit order, and back. */
static inline void pack_rows(const matrix &m, int bits, int i0, const uint8_t *codes, uint8_t *packed) {
    for (int j = 0; j < m.n_j; ++j) {
        put_codes(bits, m.n_i, packed, j, i0, codes + j * n_packed);
    }
}
static inline void unpack_rows(const matrix &m, int bits, int i0, const uint8_t *packed, uint8_t *codes) {
    for (int j = 0; j < m.n_j; ++j) {
        get_codes(bits, m.n_i, packed, j, i0, codes + j * n_packed);
    }
}

/* ---- Hadamard ---- */

static void hadamard(float *x, int n_rows, int n) {
    for (int row = 0; row < n_rows; ++row) {
        transform(x + (int64_t)row * n, n);
    }
}

/* ---- sealing ---- */

/* The token whose value token t has: itself, or the first valid one. */
static inline void sources(const uint32_t valid[4], int source[XQ_PAGE]) {
    const auto is_valid = [&](int t) { return valid[t / 32] >> (t % 32) & 1u; };
    int first = 0;
    while (first < XQ_PAGE - 1 && !is_valid(first)) {
        first++;
    }
    for (int t = 0; t < XQ_PAGE; ++t) {
        source[t] = is_valid(t) ? t : first;
    }
}

static inline int total(int_lanes count) {
    int n = 0;
    for (int i = 0; i < n_lanes; ++i) {
        n += count[i];
    }
    return n;
}

/* All rows of one side.  load(i, x) fills x [n_j] with lanes i .. i + n_lanes - 1. */
template <typename F>
static inline void seal_rows(const matrix &m, lanes *x, uint8_t *c /* [n_j][n_packed] */, uint8_t *codes,
                             uint8_t *param, const uint8_t *owner_codes, int owner_bits, const F &load) {
    for (int i0 = 0; i0 < m.n_i; i0 += n_packed) {
        if (owner_codes) {
            unpack_rows(m, owner_bits, i0, owner_codes, c);
        }
        for (int i = 0; i < n_packed; i += n_lanes) {
            load(i0 + i, x);
            seal_lanes(m, x, i0 + i, c + i, param, owner_codes != nullptr);
        }
        if (m.side.bits > 0 && !owner_codes) {
            pack_rows(m, m.side.bits, i0, c, codes);
        }
    }
}

/* The way back.  store(i, x) takes lanes i .. i + n_lanes - 1. */
template <typename F>
static inline void unseal_rows(const matrix &m, lanes *x, uint8_t *c /* [n_j][n_packed] */, const uint8_t *codes,
                               int code_bits, const uint8_t *param, const F &store) {
    for (int i0 = 0; i0 < m.n_i; i0 += n_packed) {
        if (m.side.bits > 0) {
            unpack_rows(m, code_bits, i0, codes, c);
        }
        for (int i = 0; i < n_packed; i += n_lanes) {
            unseal_lanes(m, x, i0 + i, c + i, param);
            store(i0 + i, x);
        }
    }
}

static int seal_k(const xq_side &side, int d, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                  uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int owner_bits) {
    int source[XQ_PAGE];
    sources(valid, source);
    lanes scratch[XQ_PAGE];
    uint8_t c[XQ_PAGE * n_packed];
    int_lanes bad = {};
    seal_rows(key_matrix(side, d), scratch, c, codes, param, owner_codes, owner_bits, [&](int i, lanes *x) {
        for (int t = 0; t < XQ_PAGE; ++t) {
            x[t] = finite(load_half(rows + source[t] * stride + i), bad);
        }
    });
    return total(bad);
}

static void unseal_k(const xq_side &side, int d, const uint8_t *codes, int code_bits, const uint8_t *param,
                     uint16_t *rows, int64_t stride) {
    lanes scratch[XQ_PAGE];
    uint8_t c[XQ_PAGE * n_packed];
    unseal_rows(key_matrix(side, d), scratch, c, codes, code_bits, param, [&](int i, const lanes *x) {
        for (int t = 0; t < XQ_PAGE; ++t) {
            store_half(rows + t * stride + i, x[t]);
        }
    });
}

/* Transposes n_lanes by n_lanes. */
static inline void transpose(const lanes in[n_lanes], lanes out[n_lanes]) {
#if defined(XQ_SET_AVX2)
    __m256 a[8], b[8];
    for (int r = 0; r < 8; r += 2) { // pairs of rows, then fours, then halves
        a[r] = _mm256_unpacklo_ps((__m256)in[r], (__m256)in[r + 1]);
        a[r + 1] = _mm256_unpackhi_ps((__m256)in[r], (__m256)in[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        b[r] = _mm256_shuffle_ps(a[r], a[r + 2], 0x44);
        b[r + 1] = _mm256_shuffle_ps(a[r], a[r + 2], 0xee);
        b[r + 2] = _mm256_shuffle_ps(a[r + 1], a[r + 3], 0x44);
        b[r + 3] = _mm256_shuffle_ps(a[r + 1], a[r + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
        out[c] = (lanes)_mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
        out[c + 4] = (lanes)_mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
    }
#elif defined(XQ_SET_NEON)
    float64x2_t a[4]; // pairs of rows, then fours
    for (int r = 0; r < 4; r += 2) {
        a[r] = (float64x2_t)vtrn1q_f32((float32x4_t)in[r], (float32x4_t)in[r + 1]);
        a[r + 1] = (float64x2_t)vtrn2q_f32((float32x4_t)in[r], (float32x4_t)in[r + 1]);
    }
    for (int c = 0; c < 2; ++c) {
        out[c] = (lanes)vtrn1q_f64(a[c], a[c + 2]);
        out[c + 2] = (lanes)vtrn2q_f64(a[c], a[c + 2]);
    }
#else
    for (int r = 0; r < n_lanes; ++r) {
        for (int c = 0; c < n_lanes; ++c) {
            out[c][r] = in[r][c];
        }
    }
#endif
}

static int seal_v(const xq_side &side, int e, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                  uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int owner_bits,
                  const float *predicted /* [e][XQ_PAGE] */) {
    int source[XQ_PAGE];
    sources(valid, source);
    lanes scratch[XQ_MAX_HEAD_DIM];
    uint8_t c[XQ_MAX_HEAD_DIM * n_packed];
    int_lanes bad = {};
    seal_rows(value_matrix(side, e), scratch, c, codes, param, owner_codes, owner_bits, [&](int i, lanes *x) {
        for (int j = 0; j < e; j += n_lanes) {
            lanes block[n_lanes];
            for (int k = 0; k < n_lanes; ++k) {
                block[k] = finite(load_half(rows + source[i + k] * stride + j), bad);
            }
            transpose(block, x + j);
        }
        if (side.rotate) {
            transform(x, e);
        }
        for (int j = 0; j < e && predicted; ++j) {
            x[j] = x[j] - load(predicted + j * XQ_PAGE + i);
        }
    });
    return total(bad);
}

static void unseal_v(const xq_side &side, int e, const uint8_t *codes, int code_bits, const uint8_t *param,
                     uint16_t *rows, int64_t stride, const float *predicted /* [e][XQ_PAGE] */) {
    lanes scratch[XQ_MAX_HEAD_DIM];
    uint8_t c[XQ_MAX_HEAD_DIM * n_packed];
    unseal_rows(value_matrix(side, e), scratch, c, codes, code_bits, param, [&](int i, lanes *x) {
        for (int j = 0; j < e && predicted; ++j) {
            x[j] = x[j] + load(predicted + j * XQ_PAGE + i);
        }
        if (side.rotate) {
            transform(x, e);
        }
        for (int j = 0; j < e; j += n_lanes) {
            lanes block[n_lanes];
            transpose(x + j, block);
            for (int k = 0; k < n_lanes; ++k) {
                store_half(rows + (i + k) * stride + j, block[k]);
            }
        }
    });
}

/* Sums in the order of the source's channels, nothing contracted: every set predicts the same bits.  Finite, so that
 * what is left over is: codes and parameters of a loaded state may be anything. */
static void predict_v(const xq_side &source, int e, const uint8_t *codes, const uint8_t *param,
                      const float *weight /* [e][e] */, float *predicted /* [e][XQ_PAGE] */) {
    constexpr int together = 8; // channels that share the loads of the source: what the registers hold
    lanes scratch[XQ_MAX_HEAD_DIM];
    uint8_t c[XQ_MAX_HEAD_DIM * n_packed];
    int_lanes bad = {};
    unseal_rows(value_matrix(source, e), scratch, c, codes, source.bits, param, [&](int i, const lanes *u) {
        for (int j0 = 0; j0 < e; j0 += together) {
            lanes sum[together] = {};
            for (int k = 0; k < e; ++k) {
                const float *w = weight + (int64_t)k * e + j0;
                for (int j = 0; j < together; ++j) {
                    sum[j] = sum[j] + u[k] * w[j];
                }
            }
            for (int j = 0; j < together; ++j) {
                store(predicted + (j0 + j) * XQ_PAGE + i, finite(sum[j], bad));
            }
        }
    });
}

} // namespace XQ_SET
} // namespace xq
