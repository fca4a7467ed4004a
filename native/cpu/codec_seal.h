/* codec_seal.h: fits, sealing and unsealing, a vector of groups at a time; see codec_lanes.h.  Compiled once per kernel
 * set. */
#include "codec_lanes.h"

namespace xq {
namespace XQ_SET {

/* ---- fits ---- */

/* One group a lane: elements x [n_j] and what is stored for them. */
struct group {
    const xq_side &side;
    const lanes *x; /* [n_j] */
    int n_j;
    int top; /* largest code, 2^B - 1 */
    lanes min, max;
};

static inline lanes encode(lanes x, const parameters &p, lanes inv, int top) {
    return nearest(low(high((x - p.base) * inv + p.middle, splat(0.0f)), splat((float)top)));
}

static inline group make_group(const xq_side &side, const lanes *x, int n_j) {
    group g = {side, x, n_j, (1 << side.bits) - 1, x[0], x[0]};
    for (int j = 1; j < n_j; ++j) {
        g.min = low(g.min, x[j]);
        g.max = high(g.max, x[j]);
    }
    return g;
}

/* Paper, section 3.2: the range shrinks by eta at both ends. */
static inline parameters relaxed(const group &g, float eta) {
    const lanes range = g.max - g.min;
    parameters p = {};
    p.scale = range / (float)g.top * (1.0f - 2.0f * eta);
    p.base = g.min + range * eta;
    return p;
}

static inline parameters fit_clip(const group &g) {
    static const float one_bit[] = {0.0f, 0.05f, 0.1f, 0.15f, 0.2f, 0.25f, 0.3f, 0.35f};
    static const float more_bits[] = {0.0f, 0.04f, 0.08f, 0.12f, 0.16f, 0.2f};
    const float *etas = g.side.bits == 1 ? one_bit : more_bits;
    const int n = g.side.bits == 1 ? 8 : 6;
    parameters best = {};
    lanes best_error = splat(INFINITY);
    for (int k = 0; k < n; ++k) {
        const parameters raw = relaxed(g, etas[k]);
        const parameters p = round_parameters(g.side, raw.scale, raw.base);
        const lanes inv = inverse(p.scale);
        lanes error = splat(0.0f);
        for (int j = 0; j < g.n_j; ++j) {
            const lanes off = p.base + p.scale * (encode(g.x[j], p, inv, g.top) - p.middle) - g.x[j];
            error = error + off * off;
        }
        const int_lanes better = error < best_error;
        best_error = better ? error : best_error;
        best.scale = better ? p.scale : best.scale;
        best.base = better ? p.base : best.base;
        best.e = better ? p.e : best.e;
        best.q = better ? p.q : best.q;
        best.middle = p.middle;
    }
    return best;
}

/* Least-squares scale and zero for given codes; lanes whose codes are all the same get `flat`. */
template <typename F> static inline parameters least_squares(const group &g, const parameters &flat, const F &code) {
    const lanes shift = (g.min + g.max) * 0.5f; // keeps the sums small where the group lies far from zero
    lanes sum_c = splat(0.0f), sum_cc = splat(0.0f), sum_x = splat(0.0f), sum_xc = splat(0.0f);
    for (int j = 0; j < g.n_j; ++j) {
        const lanes c = code(j), x = g.x[j] - shift;
        sum_c = sum_c + c;
        sum_cc = sum_cc + c * c;
        sum_x = sum_x + x;
        sum_xc = sum_xc + x * c;
    }
    const lanes mean_c = sum_c / (float)g.n_j;
    const lanes variance = sum_cc - sum_c * mean_c;
    // codes that differ at all give a variance near 1 or more; less is rounding
    const int_lanes usable = variance > 0.25f;
    const lanes scale = (sum_xc - sum_x * mean_c) / (usable ? variance : splat(1.0f));
    parameters p = {};
    p.scale = usable ? scale : flat.scale;
    p.base = usable ? shift + sum_x / (float)g.n_j - scale * mean_c : flat.base;
    return p;
}

static inline lanes mean(const group &g) {
    const lanes shift = (g.min + g.max) * 0.5f;
    lanes sum = splat(0.0f);
    for (int j = 0; j < g.n_j; ++j) {
        sum = sum + (g.x[j] - shift);
    }
    return shift + sum / (float)g.n_j;
}

/* Three steps of assignment and least squares from the relaxed range. */
static inline parameters fit_lloyd(const group &g) {
    parameters p = relaxed(g, g.side.eta);
    for (int step = 0; step < 3; ++step) {
        const lanes inv = inverse(p.scale);
        p = least_squares(g, p, [&](int j) { return encode(g.x[j], p, inv, g.top); });
    }
    return round_parameters(g.side, p.scale, p.base);
}

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
    return {side, XQ_PAGE, e, side.group == 0 || side.group > e ? e : side.group};
}

/* x [n_j]: lanes i0 .. i0 + n_lanes - 1.  codes: of element j at j * n_packed; read if borrowed, else written. */
static inline void seal_lanes(const matrix &m, const lanes *x, int i0, uint8_t *codes, uint8_t *param, bool borrowed) {
    const xq_side &side = m.side;
    for (int j0 = 0; j0 < m.n_j; j0 += m.group, param += parameter_bytes(side, m.n_i)) {
        const group g = make_group(side, x + j0, m.group);
        uint8_t *const c = codes + j0 * n_packed;
        parameters p = {};
        if (side.bits == 0) {
            p.base = mean(g);
        } else if (side.fit == XQ_FIT_LSQ) {
            parameters flat = {};
            flat.base = mean(g);
            p = least_squares(g, flat, [&](int j) { return load_codes(c + j * n_packed); });
            p = round_parameters(side, p.scale, p.base);
        } else if (side.fit == XQ_FIT_CLIP) {
            p = fit_clip(g);
        } else if (side.fit == XQ_FIT_LLOYD) {
            p = fit_lloyd(g);
        } else {
            p = relaxed(g, side.eta);
            p = round_parameters(side, p.scale, p.base);
        }
        store_parameters(side, param, m.n_i, i0, p);
        if (side.bits == 0 || borrowed) {
            continue;
        }
        // the paper's codes belong to the full range, before it was relaxed and rounded
        const parameters grid = side.fit == XQ_FIT_PAPER ? relaxed(g, 0.0f) : p;
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

static inline int hadamard_block(int n) {
    return n & -n;
}

/* x [n]: of any type with +, - and * float. */
template <typename T> static inline void transform(T *x, int n) {
    const int block = hadamard_block(n);
    const float norm = (float)(1.0 / std::sqrt((double)block));
    for (int h = 1; h < block; h *= 2) {
        for (int i = 0; i < n; i += 2 * h) {
            for (int k = i; k < i + h; ++k) {
                const T a = x[k], b = x[k + h];
                x[k] = a + b;
                x[k + h] = a - b;
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        x[i] = x[i] * norm;
    }
}

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

/* Sums in the order of the source's channels, nothing contracted: every set predicts the same bits. */
static void predict_v(const xq_side &source, int e, const uint8_t *codes, const uint8_t *param,
                      const float *weight /* [e][e] */, float *predicted /* [e][XQ_PAGE] */) {
    constexpr int together = 8; // channels that share the loads of the source: what the registers hold
    lanes scratch[XQ_MAX_HEAD_DIM];
    uint8_t c[XQ_MAX_HEAD_DIM * n_packed];
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
                store(predicted + (j0 + j) * XQ_PAGE + i, sum[j]);
            }
        }
    });
}

} // namespace XQ_SET
} // namespace xq
