/* codec_bytes.h: pages in bytes, a vector of groups at a time; see codec_lanes.h.  Compiled once per kernel set.
 *
 *     shrink:  centre = (min + max) / 2 and scale = reach / 127, as F16;  byte = round((x - centre) / scale)
 *     widen:   x^ = centre + scale * byte        rounded to F16
 *
 * where reach is how far a group goes from its centre as it is stored, and the scale is rounded up: no byte is clamped.
 *
 * Rows are read by what follows here, whatever they lie in: of n_lanes channels (keys), or of a token (values).
 */
#include "codec_lanes.h"

namespace xq {
namespace {

/* ---- rows that are read ---- */

static inline lanes load_row(const uint16_t *p /* [n_lanes] */, int_lanes &bad) {
    return finite(load_half(p), bad);
}
/* Rounded to F16, as everything is that is stored. */
static inline lanes load_row(const float *p, int_lanes &bad) {
    return round_half(finite(load(p), bad));
}
static inline lanes load_signed(const int8_t *p /* [n_lanes] */) {
    const auto bits = (bit_lanes)load_bytes((const uint8_t *)p);
    return __builtin_convertvector((int_lanes)(bits << 24) >> 24, lanes);
}

/* F16 or F32 rows. */
template <typename T> struct plain_rows {
    const T *rows;
    int64_t stride; /* elements from token to token */

    struct part {
        const T *at;
        int64_t step;
        lanes load(int n, int_lanes &bad) const { return load_row(at + n * step, bad); }
    };
    /* Channels i .. i + n_lanes - 1: load(token). */
    part channels(int i) const { return {rows + i, stride}; }
    /* A token: load(channel). */
    part token(int t) const { return {rows + t * stride, 1}; }
};

/* A page in bytes, rounded to F16: as if it had become rows before. */
struct byte_rows {
    const byte_page &page;

    struct part {
        const int8_t *at;
        int64_t step;
        lanes scale, centre;
        lanes load(int n, int_lanes &) const { return round_half(centre + scale * load_signed(at + n * step)); }
    };
    part channels(int i) const {
        return {page.codes + i, page.width, load_half(page.scale + i), load_half(page.scale + page.n + i)};
    }
    part token(int t) const {
        return {page.codes + (int64_t)t * page.width, 1, splat(half_to_float(page.scale[t])),
                splat(half_to_float(page.scale[page.n + t]))};
    }
};

static inline void store_row(uint16_t *p /* [n_lanes] */, lanes x) {
    store_half(p, x);
}
static inline void store_row(float *p, lanes x) {
    store(p, round_half(x));
}

/* ---- tokens and channels ---- */

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
    for (int c = 0; c < n_lanes; ++c) {
        lanes column = in[0];
        for (int r = 0; r < n_lanes; ++r) {
            column[r] = in[r][c];
        }
        out[c] = column;
    }
#endif
}

/* Channels i .. i + n_lanes - 1 of all tokens, one after the other, to x [XQ_PAGE]. */
template <typename ROWS>
static inline void load_channels(const ROWS &rows, const int source[XQ_PAGE], int i, lanes *x, int_lanes &bad) {
    const auto part = rows.channels(i);
    for (int t = 0; t < XQ_PAGE; ++t) {
        x[t] = part.load(source[t], bad);
    }
}

/* Tokens i .. i + n_lanes - 1, channel after channel, to x [e]. */
template <typename ROWS>
static inline void load_tokens(const ROWS &rows, const int source[XQ_PAGE], int i, int e, lanes *x, int_lanes &bad) {
    for (int j = 0; j < e; j += n_lanes) {
        lanes block[n_lanes];
        for (int k = 0; k < n_lanes; ++k) {
            block[k] = rows.token(source[i + k]).load(j, bad);
        }
        transpose(block, x + j);
    }
}

/* ---- shrink ---- */

/* The parameters of lanes i .. i + n_lanes - 1, and their n values x as whole numbers in their place. */
static inline void shrink_lanes(const byte_page &page, int i, lanes *x, int n) {
    lanes least = x[0], most = x[0];
    for (int j = 1; j < n; ++j) {
        least = low(least, x[j]);
        most = high(most, x[j]);
    }
    const lanes centre = round_half((least + most) * 0.5f);
    const lanes reach = high(most - centre, centre - least);
    // half a step of F16 more, whether it is a normal number or not: rounded up
    const lanes scale = round_half(reach * (1.0f / 127.0f) * (1.0f + 0x1p-11f) + 0x1p-25f);
    const lanes inv = inverse(scale);
    store_half(page.scale + i, scale);
    store_half(page.scale + page.n + i, centre);
    for (int j = 0; j < n; ++j) {
        x[j] = nearest(low(high((x[j] - centre) * inv, splat(-127.0f)), splat(127.0f)));
    }
}

static inline void store_signed(int8_t *p /* [n_lanes] */, lanes code) {
    store_bytes((uint8_t *)p, __builtin_convertvector(code, int_lanes));
}

template <typename T>
static int shrink_channels(const byte_page &page, const plain_rows<T> &rows, const int source[XQ_PAGE]) {
    lanes x[XQ_PAGE];
    int_lanes bad = {};
    for (int i = 0; i < page.width; i += n_lanes) {
        load_channels(rows, source, i, x, bad);
        shrink_lanes(page, i, x, XQ_PAGE);
        for (int t = 0; t < XQ_PAGE; ++t) {
            store_signed(page.codes + t * page.width + i, x[t]);
        }
    }
    return total(bad);
}

static int shrink_tokens(const byte_page &page, const plain_rows<uint16_t> &rows, const int source[XQ_PAGE]) {
    lanes x[XQ_MAX_HEAD_DIM];
    int_lanes bad = {};
    for (int i = 0; i < XQ_PAGE; i += n_lanes) {
        load_tokens(rows, source, i, page.width, x, bad);
        shrink_lanes(page, i, x, page.width);
        for (int j = 0; j < page.width; j += n_lanes) {
            lanes block[n_lanes];
            transpose(x + j, block);
            for (int k = 0; k < n_lanes; ++k) {
                store_signed(page.codes + (i + k) * page.width + j, block[k]);
            }
        }
    }
    return total(bad);
}

static int shrink(const byte_page &page, const uint16_t *rows, int64_t stride, const uint32_t valid[4]) {
    int source[XQ_PAGE];
    sources(valid, source);
    const plain_rows<uint16_t> from = {rows, stride};
    return page.by_channel ? shrink_channels(page, from, source) : shrink_tokens(page, from, source);
}

static int shrink_keys(const byte_page &page, const float *keys, int64_t stride, const uint32_t valid[4]) {
    int source[XQ_PAGE];
    sources(valid, source);
    return shrink_channels(page, plain_rows<float>{keys, stride}, source);
}

/* ---- widen ---- */

template <typename T> static void widen(const byte_page &page, T *rows, int64_t stride) {
    const byte_rows from = {page};
    int_lanes bad = {};
    for (int i = 0; page.by_channel && i < page.width; i += n_lanes) {
        const auto part = from.channels(i);
        for (int t = 0; t < XQ_PAGE; ++t) {
            store_row(rows + t * stride + i, part.load(t, bad));
        }
    }
    for (int t = 0; !page.by_channel && t < XQ_PAGE; ++t) {
        const auto part = from.token(t);
        for (int j = 0; j < page.width; j += n_lanes) {
            store_row(rows + t * stride + j, part.load(j, bad));
        }
    }
}

} // namespace
} // namespace xq
