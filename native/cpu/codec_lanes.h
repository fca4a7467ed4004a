/* codec_lanes.h: the codec, a vector of groups at a time: one group a lane.  Compiled once per kernel set.
 *
 *     seal:    zero, scale from the group's values;  code = round((x - zero) / scale), clamped to 0 .. 2^B - 1
 *     unseal:  x^ = zero + scale * code       (XQ_PARAM_LOG8: centre + scale * (code - (2^B - 1) / 2))
 *
 * Both sides have the same shape: x [n_j elements][n_i lanes], lanes i = channels for keys and tokens for values, so
 * that lanes are the rows i and elements the columns j of the code matrix of xquant.h.  Every lane goes through the
 * same sequence of single-precision operations (sums in the order of j, nothing contracted), so that all sets and
 * reference.py give the same bytes.  A vector is as wide as the set's registers: compilers take wider ones apart,
 * element by element.  Codes are packed 16 rows i at a time.  Scratch lies on the stack: 55 KiB at most, by values.
 */
#include "codec_format.h"
#include "half.h"
#include "kernels.h"

#include <cmath>
#include <cstring>
#if defined(XQ_SET_AVX2)
#include <immintrin.h>
#elif defined(XQ_SET_NEON)
#include <arm_neon.h>
#endif

namespace xq {
namespace {

#if defined(XQ_SET_AVX2)
constexpr int n_lanes = 8;
#else
constexpr int n_lanes = 4;
#endif
constexpr int n_packed = 16; // rows i of one column that are packed together
typedef float lanes __attribute__((vector_size(4 * n_lanes)));
typedef int32_t int_lanes __attribute__((vector_size(4 * n_lanes)));
typedef uint32_t bit_lanes __attribute__((vector_size(4 * n_lanes)));

/* ---- lanes ---- */

static inline lanes splat(float x) {
    return lanes{} + x;
}
static inline lanes low(lanes a, lanes b) {
    return b < a ? b : a;
}
static inline lanes high(lanes a, lanes b) {
    return b > a ? b : a;
}
/* Rounds half to even, for |x| < 2^22. */
static inline lanes nearest(lanes x) {
    return (x + 12582912.0f) - 12582912.0f;
}
static inline lanes absolute(lanes x) {
    return (lanes)((bit_lanes)x & 0x7fffffffu);
}
static inline lanes inverse(lanes x) {
    return x != 0.0f ? 1.0f / (x != 0.0f ? x : splat(1.0f)) : splat(0.0f);
}

static inline lanes load(const float *p /* [n_lanes] */) {
    lanes x;
    memcpy(&x, p, sizeof(x));
    return x;
}

static inline void store(float *p /* [n_lanes] */, lanes x) {
    memcpy(p, &x, sizeof(x));
}

static inline lanes load_half(const uint16_t *p /* [n_lanes] */) {
#if defined(XQ_SET_AVX2)
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(XQ_SET_NEON)
    return (lanes)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    lanes x;
    for (int i = 0; i < n_lanes; ++i) {
        x[i] = half_to_float(p[i]);
    }
    return x;
#endif
}

/* Not-a-numbers to 0, what is too large to +-65504. */
static inline lanes clamped(lanes x) {
    return low(high(x == x ? x : splat(0.0f), splat(-65504.0f)), splat(65504.0f));
}

/* Rounded half to even, clamped: parameters of a loaded state may make anything. */
static inline void store_half(uint16_t *p /* [n_lanes] */, lanes x) {
    x = clamped(x);
#if defined(XQ_SET_AVX2)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(XQ_SET_NEON)
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
#else
    for (int i = 0; i < n_lanes; ++i) {
        p[i] = float_to_half(x[i]);
    }
#endif
}

/* Whole numbers, their low bytes. */
static inline void store_bytes(uint8_t *p /* [n_lanes] */, int_lanes x) {
#if defined(XQ_SET_AVX2)
    const __m256i order = _mm256_set1_epi32(0x0c080400);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)x, order);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64((__m128i *)p, both);
#elif defined(XQ_SET_NEON)
    const int16x4_t words = vmovn_s32((int32x4_t)x);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    memcpy(p, &bytes, n_lanes);
#else
    for (int i = 0; i < n_lanes; ++i) {
        p[i] = (uint8_t)x[i];
    }
#endif
}

static inline int_lanes load_bytes(const uint8_t *p /* [n_lanes] */) {
#if defined(XQ_SET_AVX2)
    return (int_lanes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#elif defined(XQ_SET_NEON)
    uint32_t four;
    memcpy(&four, p, sizeof(four));
    return (int_lanes)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
#else
    int_lanes x;
    for (int i = 0; i < n_lanes; ++i) {
        x[i] = p[i];
    }
    return x;
#endif
}

static inline lanes round_half(lanes x) {
    uint16_t h[n_lanes];
    store_half(h, x);
    return load_half(h);
}

/* Clamped; adds the number of those that were not finite to count. */
static inline lanes finite(lanes x, int_lanes &count) {
    const int_lanes bad = !(absolute(x) <= 65504.0f);
    count -= bad; // a true lane is -1
    return clamped(x);
}

/* ---- packing: the unit order of xquant.h for 16 rows i ---- */

/* c: codes of rows i0 .. i0 + 15 (i0 a multiple of 16) of one column, as four words of four bytes. */
static inline void put_words(int bits, uint8_t *column, int j, int i0, const uint32_t c[4]) {
    const auto store = [&](int unit, uint32_t word) { memcpy(column + 64 * unit + 4 * (j % 16), &word, 4); };
    if (bits == 4) {
        store(i0 / 8, c[0] | c[1] << 4);
        store(i0 / 8 + 1, c[2] | c[3] << 4);
    } else if (bits == 2) {
        store(i0 / 16, c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
    } else { // rows i0 are the lower or the upper half of a unit
        uint32_t word = c[0] | c[1] << 1 | c[2] << 2 | c[3] << 3, before = 0;
        if (i0 % 32 != 0) {
            memcpy(&before, column + 64 * (i0 / 32) + 4 * (j % 16), 4);
            word <<= 4;
        }
        store(i0 / 32, word | before);
    }
}

static inline void get_words(int bits, const uint8_t *column, int j, int i0, uint32_t c[4]) {
    const auto load = [&](int unit) {
        uint32_t word;
        memcpy(&word, column + 64 * unit + 4 * (j % 16), 4);
        return word;
    };
    if (bits == 4) {
        const uint32_t a = load(i0 / 8), b = load(i0 / 8 + 1), m = 0x0f0f0f0fu;
        c[0] = a & m, c[1] = a >> 4 & m, c[2] = b & m, c[3] = b >> 4 & m;
    } else if (bits == 2) {
        const uint32_t a = load(i0 / 16), m = 0x03030303u;
        c[0] = a & m, c[1] = a >> 2 & m, c[2] = a >> 4 & m, c[3] = a >> 6 & m;
    } else {
        const uint32_t a = load(i0 / 32) >> (i0 % 32 != 0 ? 4 : 0), m = 0x01010101u;
        c[0] = a & m, c[1] = a >> 1 & m, c[2] = a >> 2 & m, c[3] = a >> 3 & m;
    }
}

static inline void put_codes(int bits, int n_i, uint8_t *packed, int j, int i0, const uint8_t codes[n_packed]) {
    uint8_t *column = packed + (int64_t)(j / 16) * column_bytes(bits, n_i);
    uint32_t c[4];
    memcpy(c, codes, sizeof(c));
    if (bits != 3) {
        put_words(bits, column, j, i0, c);
        return;
    }
    uint32_t lo[4], hi[4];
    for (int k = 0; k < 4; ++k) {
        lo[k] = c[k] & 0x03030303u;
        hi[k] = c[k] >> 2 & 0x01010101u;
    }
    put_words(2, column, j, i0, lo);
    put_words(1, column + 64 * units_of(2, n_i), j, i0, hi);
}

static inline void get_codes(int bits, int n_i, const uint8_t *packed, int j, int i0, uint8_t codes[n_packed]) {
    const uint8_t *column = packed + (int64_t)(j / 16) * column_bytes(bits, n_i);
    uint32_t c[4];
    get_words(bits == 3 ? 2 : bits, column, j, i0, c);
    if (bits == 3) {
        uint32_t hi[4];
        get_words(1, column + 64 * units_of(2, n_i), j, i0, hi);
        for (int k = 0; k < 4; ++k) {
            c[k] |= hi[k] << 2;
        }
    }
    memcpy(codes, c, sizeof(c));
}

static inline void store_codes(uint8_t *p /* [n_lanes] */, lanes code) {
    store_bytes(p, __builtin_convertvector(code, int_lanes));
}

static inline lanes load_codes(const uint8_t *p /* [n_lanes] */) {
    return __builtin_convertvector(load_bytes(p), lanes);
}

static void pack(int bits, int n_i, int n_j, const uint8_t *codes, uint8_t *packed) {
    for (int i0 = 0; i0 < n_i; i0 += n_packed) {
        for (int j = 0; j < n_j; ++j) {
            uint8_t c[n_packed];
            for (int k = 0; k < n_packed; ++k) {
                c[k] = codes[(int64_t)(i0 + k) * n_j + j];
            }
            put_codes(bits, n_i, packed, j, i0, c);
        }
    }
}

static void unpack(int bits, int n_i, int n_j, const uint8_t *packed, uint8_t *codes) {
    for (int i0 = 0; i0 < n_i; i0 += n_packed) {
        for (int j = 0; j < n_j; ++j) {
            uint8_t c[n_packed];
            get_codes(bits, n_i, packed, j, i0, c);
            for (int k = 0; k < n_packed; ++k) {
                codes[(int64_t)(i0 + k) * n_j + j] = c[k];
            }
        }
    }
}

/* ---- parameters ---- */

/* x^ = base + scale * (code - middle): F16 stores zero as base with middle 0, LOG8 the centre. */
struct parameters {
    lanes scale, base;
    float middle;
    int_lanes e, q; /* LOG8 as stored */
};

static inline lanes log8_scale(int_lanes e) {
    const int_lanes k = e - log8_zero;
    lanes scale;
    for (int i = 0; i < n_lanes; ++i) {
        scale[i] = log8_steps[k[i] & 7] * from_bits((uint32_t)((k[i] >> 3) + 127) << 23);
    }
    return scale;
}

static inline parameters round_parameters(const xq_side &side, lanes scale, lanes zero) {
    parameters p = {};
    if (side.param == XQ_PARAM_F16) {
        p.scale = round_half(scale);
        p.base = round_half(zero);
        return p;
    }
    p.middle = (float)((1 << side.bits) - 1) * 0.5f;
    const lanes centre = zero + scale * p.middle;
    scale = high(scale, absolute(centre) * (8.0f / 120.0f));
    const bit_lanes bits = (bit_lanes)scale;
    int_lanes e = ((int_lanes)(bits >> 23) - 127) * 8 + log8_zero;
    for (const uint32_t threshold : log8_thresholds) {
        e -= (int_lanes)((bits & 0x7fffffu) >= threshold);
    }
    e = e < 1 ? int_lanes{} + 1 : e;
    p.e = e > 255 ? int_lanes{} + 255 : e;
    p.scale = log8_scale(p.e);
    const lanes unit = p.scale * 0.125f;
    const lanes q = nearest(low(high(centre * (1.0f / unit), splat(-127.0f)), splat(127.0f)));
    p.q = __builtin_convertvector(q, int_lanes);
    p.base = q * unit;
    return p;
}

/* at: [2][n_i] of the group (0 bits: [n_i]). */
static inline void store_parameters(const xq_side &side, uint8_t *at, int n_i, int i0, const parameters &p) {
    if (side.bits == 0) {
        store_half((uint16_t *)at + i0, p.base);
    } else if (side.param == XQ_PARAM_F16) {
        store_half((uint16_t *)at + i0, p.scale);
        store_half((uint16_t *)at + n_i + i0, p.base);
    } else {
        store_bytes(at + i0, p.e);
        store_bytes(at + n_i + i0, p.q);
    }
}

static inline parameters load_parameters(const xq_side &side, const uint8_t *at, int n_i, int i0) {
    parameters p = {};
    if (side.bits == 0) {
        p.base = load_half((const uint16_t *)at + i0);
    } else if (side.param == XQ_PARAM_F16) {
        p.scale = load_half((const uint16_t *)at + i0);
        p.base = load_half((const uint16_t *)at + n_i + i0);
    } else {
        p.e = load_bytes(at + i0);
        p.q = (int_lanes)((bit_lanes)load_bytes(at + n_i + i0) << 24) >> 24; // signed
        p.middle = (float)((1 << side.bits) - 1) * 0.5f;
        p.scale = log8_scale(p.e);
        p.base = __builtin_convertvector(p.q, lanes) * (p.scale * 0.125f);
    }
    return p;
}

} // namespace
} // namespace xq
