/* codec_seal.h: sealing and unsealing, a vector of groups at a time; see codec_lanes.h and codec_fit.h.  Compiled once
 * per kernel set. */
#include "codec_bytes.h"

namespace xq {
namespace {

#include "codec_fit.h"

/* ---- one vector of groups ---- */

struct matrix {
    const xq_side &side;
    int n_i, n_j; /* lanes and elements of the whole side */
    int group;    /* elements of a group */
};

static inline matrix key_matrix(const sealed_side &page) {
    return {page.plan, page.width, XQ_PAGE, page.plan.group};
}
static inline matrix value_matrix(const sealed_side &page) {
    return {page.plan, XQ_PAGE, page.width, group_length(page.plan, page.width)};
}

/* x [n_j]: lanes i0 .. i0 + n_lanes - 1.  codes: of element j at j * n_packed; read if borrowed, else written. */
static inline void seal_lanes(const matrix &m, const lanes *x, int i0, uint8_t *codes, uint8_t *param) {
    const xq_side &side = m.side;
    for (int j0 = 0; j0 < m.n_j; j0 += m.group, param += parameter_bytes(side, m.n_i)) {
        const auto g = make_group(side, x + j0, m.group);
        uint8_t *const c = codes + j0 * n_packed;
        const parameters p = fit(g, [&](int j) { return load_codes(c + j * n_packed); });
        store_parameters(side, param, m.n_i, i0, p);
        if (side.bits == 0 || side.owner >= 0) {
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
static inline void pack_rows(const matrix &m, int i0, const uint8_t *codes, uint8_t *packed) {
    for (int j = 0; j < m.n_j; ++j) {
        put_codes(m.side.bits, m.n_i, packed, j, i0, codes + j * n_packed);
    }
}
static inline void unpack_rows(const matrix &m, int i0, const uint8_t *packed, uint8_t *codes) {
    for (int j = 0; j < m.n_j; ++j) {
        get_codes(m.side.bits, m.n_i, packed, j, i0, codes + j * n_packed);
    }
}

/* ---- Hadamard ---- */

static void hadamard(float *x, int n_rows, int n) {
    for (int row = 0; row < n_rows; ++row) {
        transform(x + (int64_t)row * n, n);
    }
}

/* ---- sealing ---- */

/* All rows of one side.  load(i, x) fills x [n_j] with lanes i .. i + n_lanes - 1. */
template <typename F>
static inline void seal_rows(const sealed_side &page, const matrix &m, lanes *x /* [n_j] */,
                             uint8_t *c /* [n_j][n_packed] */, const F &load) {
    const bool own = page.plan.owner < 0, has_codes = page.plan.bits > 0;
    for (int i0 = 0; i0 < m.n_i; i0 += n_packed) {
        if (has_codes && !own) {
            unpack_rows(m, i0, page.codes, c);
        }
        for (int i = 0; i < n_packed; i += n_lanes) {
            load(i0 + i, x);
            seal_lanes(m, x, i0 + i, c + i, page.param);
        }
        if (has_codes && own) {
            pack_rows(m, i0, c, page.codes);
        }
    }
}

/* Lanes i .. i + n_lanes - 1 of a sealed page into x [n_j].  For lanes in order: c [n_j][n_packed] holds the codes of
 * n_packed rows, from the first of their lanes on. */
static inline void unseal_at(const sealed_side &page, const matrix &m, int i, lanes *x, uint8_t *c) {
    if (page.plan.bits > 0 && i % n_packed == 0) {
        unpack_rows(m, i, page.codes, c);
    }
    unseal_lanes(m, x, i, c + i % n_packed, page.param);
}

/* ---- keys ---- */

template <typename ROWS>
static inline int seal_key_rows(const sealed_side &page, const ROWS &rows, const uint32_t valid[4]) {
    int source[XQ_PAGE];
    sources(valid, source);
    lanes scratch[XQ_PAGE];
    uint8_t c[XQ_PAGE * n_packed];
    int_lanes bad = {};
    seal_rows(page, key_matrix(page), scratch, c, [&](int i, lanes *x) { load_channels(rows, source, i, x, bad); });
    return total(bad);
}
template <typename T>
static int seal_keys(const sealed_side &page, const T *rows, int64_t stride, const uint32_t valid[4]) {
    return seal_key_rows(page, plain_rows<T>{rows, stride}, valid);
}
static int seal_k_bytes(const sealed_side &page, const byte_page &from, const uint32_t valid[4]) {
    return seal_key_rows(page, byte_rows{from}, valid);
}

template <typename T> static void unseal_keys(const sealed_side &page, T *rows, int64_t stride) {
    lanes x[XQ_PAGE];
    uint8_t c[XQ_PAGE * n_packed];
    for (int i = 0; i < page.width; i += n_lanes) {
        unseal_at(page, key_matrix(page), i, x, c);
        for (int t = 0; t < XQ_PAGE; ++t) {
            store_row(rows + t * stride + i, x[t]);
        }
    }
}

/* ---- values ---- */

/* Calls add(j, x) with what a map makes of its source's page, lanes i .. i + n_lanes - 1 of channel j, for all j.  For
 * lanes in order: u [e] and c [e][n_packed] are scratch.
 *
 * Sums in the order of the source's channels, nothing contracted: every set predicts the same bits.  Finite, so that
 * what is left over is: codes and parameters of a loaded state may be anything. */
template <typename F>
static inline void predict_at(const sealed_side &source, const float *weight /* [e][e] */, int i, lanes *u, uint8_t *c,
                              const F &add) {
    constexpr int together = 8; // channels that share the loads of the source: what the registers hold
    const int e = source.width;
    int_lanes bad = {};
    unseal_at(source, value_matrix(source), i, u, c);
    for (int j0 = 0; j0 < e; j0 += together) {
        lanes sum[together] = {};
        for (int k = 0; k < e; ++k) {
            const float *w = weight + (int64_t)k * e + j0;
            for (int j = 0; j < together; ++j) {
                sum[j] = sum[j] + u[k] * w[j];
            }
        }
        for (int j = 0; j < together; ++j) {
            add(j0 + j, finite(sum[j], bad));
        }
    }
}

static void predict_v(const sealed_side &source, const float *weight, float *predicted /* [e][XQ_PAGE] */) {
    lanes u[XQ_MAX_HEAD_DIM];
    uint8_t c[XQ_MAX_HEAD_DIM * n_packed];
    for (int i = 0; i < XQ_PAGE; i += n_lanes) {
        predict_at(source, weight, i, u, c, [&](int j, lanes x) { store(predicted + j * XQ_PAGE + i, x); });
    }
}

/* As predict_at, whether the values are told or made; calls nothing if they are not mapped. */
template <typename F>
static inline void each_predicted(const prediction &from, int e, int i, lanes *u, uint8_t *c, const F &add) {
    for (int j = 0; j < e && from.values; ++j) {
        add(j, load(from.values + j * XQ_PAGE + i));
    }
    if (from.source) {
        predict_at(*from.source, from.weight, i, u, c, add);
    }
}

template <typename ROWS>
static inline int seal_value_rows(const sealed_side &page, const ROWS &rows, const uint32_t valid[4],
                                  const prediction &predicted) {
    const int e = page.width;
    int source[XQ_PAGE];
    sources(valid, source);
    lanes scratch[XQ_MAX_HEAD_DIM], u[XQ_MAX_HEAD_DIM];
    uint8_t c[XQ_MAX_HEAD_DIM * n_packed], source_codes[XQ_MAX_HEAD_DIM * n_packed];
    int_lanes bad = {};
    seal_rows(page, value_matrix(page), scratch, c, [&](int i, lanes *x) {
        load_tokens(rows, source, i, e, x, bad);
        if (page.plan.rotate) {
            transform(x, e);
        }
        each_predicted(predicted, e, i, u, source_codes, [&](int j, lanes p) { x[j] = x[j] - p; });
    });
    return total(bad);
}

static int seal_v(const sealed_side &page, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                  const prediction &predicted) {
    return seal_value_rows(page, plain_rows<uint16_t>{rows, stride}, valid, predicted);
}
static int seal_v_bytes(const sealed_side &page, const byte_page &from, const uint32_t valid[4],
                        const prediction &predicted) {
    return seal_value_rows(page, byte_rows{from}, valid, predicted);
}

static void unseal_v(const sealed_side &page, uint16_t *rows, int64_t stride, const prediction &predicted) {
    const int e = page.width;
    lanes x[XQ_MAX_HEAD_DIM], u[XQ_MAX_HEAD_DIM];
    uint8_t c[XQ_MAX_HEAD_DIM * n_packed], source_codes[XQ_MAX_HEAD_DIM * n_packed];
    for (int i = 0; i < XQ_PAGE; i += n_lanes) {
        unseal_at(page, value_matrix(page), i, x, c);
        each_predicted(predicted, e, i, u, source_codes, [&](int j, lanes p) { x[j] = x[j] + p; });
        if (page.plan.rotate) {
            transform(x, e);
        }
        for (int j = 0; j < e; j += n_lanes) {
            lanes block[n_lanes];
            transpose(x + j, block);
            for (int k = 0; k < n_lanes; ++k) {
                store_half(rows + (i + k) * stride + j, block[k]);
            }
        }
    }
}

/* ---- F16 rows ---- */

static int to_half(const float *x, int n, uint16_t *half) {
    int_lanes bad = {};
    for (int i = 0; i < n; i += n_lanes) {
        store_half(half + i, finite(load(x + i), bad));
    }
    return total(bad);
}

static void to_float(const uint16_t *half, int n, float *x) {
    for (int i = 0; i < n; i += n_lanes) {
        store(x + i, load_half(half + i));
    }
}

/* ---- the set ---- */

static constexpr kernel_set codec_and(void (*attend)(const attention &), const char *name, bool (*supported)(),
                                      std::atomic<uint64_t> *calls) {
    return {name,
            supported,
            pack,
            unpack,
            seal_keys<uint16_t>,
            seal_keys<float>,
            seal_v,
            unseal_keys<uint16_t>,
            unseal_keys<float>,
            unseal_v,
            predict_v,
            hadamard,
            shrink,
            shrink_keys,
            widen<uint16_t>,
            widen<float>,
            seal_k_bytes,
            seal_v_bytes,
            to_half,
            to_float,
            attend,
            calls};
}

} // namespace
} // namespace xq
