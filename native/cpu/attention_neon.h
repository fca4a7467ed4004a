/* attention_neon.h: attention for NEON, compiled once per kernel set: neon, neon-dotprod (XQ_NEON_DOTPROD) and
 * neon-i8mm (XQ_NEON_I8MM as well).  See attention_pages.h for the equations.
 *
 * Open pages: exact in single precision; F16 and bytes are converted in registers.
 *
 * Sealed pages: a[i] = q_i s_i (or p_i s_i) is rounded to 8 bits with one scale a row and group, and multiplied with
 * the codes in whole numbers: the three sets differ in the instruction for that alone and give the same bits.  What
 * the rounding costs is measured in tests/kernels/test_attend.py; the codes are centred first, which keeps it small:
 *
 *     sum_i a_i c_ij = step * (sum_i a8_i c_ij - middle * sum_i a8_i) + middle * sum_i a_i
 */
#include "attention_neon_latent.h"
#include "attention_pages.h"

namespace xq {
namespace {

/* ---- open pages ---- */

/* What open pages lie in: at(token, channel) gives four channels. */
struct half_rows {
    const uint16_t *rows;
    int width;
    float32x4_t at(int t, int i) const { return load_half(rows + t * width + i); }
};
template <bool BY_CHANNEL> struct byte_rows {
    byte_page page;
    float32x4_t at(int t, int i) const {
        const uint16_t *scale = page.scale + (BY_CHANNEL ? i : t), *centre = scale + page.n;
        const float32x4_t x = load_bytes(page.codes + t * page.width + i);
        return BY_CHANNEL ? vfmaq_f32(load_half(centre), load_half(scale), x)
                          : vfmaq_n_f32(vdupq_n_f32(half_to_float(*centre)), x, half_to_float(*scale));
    }
};
/* f(what a page lies in). */
template <typename F> static inline void with_rows(const open_side &from, const F &f) {
    if (from.rows) {
        f(half_rows{from.rows, from.width});
    } else if (from.bytes.by_channel) {
        f(byte_rows<true>{from.bytes});
    } else {
        f(byte_rows<false>{from.bytes});
    }
}

/* scores[row][t] of R rows against all keys of a page, four keys at a time. */
template <int R, typename ROWS>
static inline void dot_rows(int d, const float *const *q, const ROWS &k, float *const *scores) {
    for (int t = 0; t < XQ_PAGE; t += 4) {
        float32x4_t sum[R][4];
        for (auto &row : sum) {
            row[0] = row[1] = row[2] = row[3] = vdupq_n_f32(0.0f);
        }
        for (int i = 0; i < d; i += 4) {
            const float32x4_t key[4] = {k.at(t, i), k.at(t + 1, i), k.at(t + 2, i), k.at(t + 3, i)};
            for (int r = 0; r < R; ++r) {
                const float32x4_t x = vld1q_f32(q[r] + i);
                for (int c = 0; c < 4; ++c) {
                    sum[r][c] = vfmaq_f32(sum[r][c], x, key[c]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            const float32x4_t left = vpaddq_f32(sum[r][0], sum[r][1]), right = vpaddq_f32(sum[r][2], sum[r][3]);
            vst1q_f32(scores[r] + t, vpaddq_f32(left, right));
        }
    }
}

/* out[row][j] += sum of p[row][t] v[t][j] for R rows and the n tokens t that are named. */
template <int R, typename ROWS>
static inline void add_rows(const ROWS &rows, int e, const float *const *p, const uint8_t *tokens, int n,
                            float *const *out) {
    for (int j = 0; j < e; j += 16) {
        float32x4_t sum[R][4];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < 4; ++c) {
                sum[r][c] = vld1q_f32(out[r] + j + 4 * c);
            }
        }
        for (int i = 0; i < n; ++i) {
            const int t = tokens[i];
            const float32x4_t value[4] = {rows.at(t, j), rows.at(t, j + 4), rows.at(t, j + 8), rows.at(t, j + 12)};
            for (int r = 0; r < R; ++r) {
                const float32x4_t x = vdupq_n_f32(p[r][t]);
                for (int c = 0; c < 4; ++c) {
                    sum[r][c] = vfmaq_f32(sum[r][c], x, value[c]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < 4; ++c) {
                vst1q_f32(out[r] + j + 4 * c, sum[r][c]);
            }
        }
    }
}

#include "attention_sealed.h"

struct neon_set : sealed_pages, latent_pages {
    static void open_scores(const open_side &k, int n, const float *const *q, float *const *scores) {
        with_rows(k, [&](const auto &keys) {
            by_rows(n, [&](auto rows, int row) { dot_rows<rows>(k.width, q + row, keys, scores + row); });
        });
    }

    /* The first e channels. */
    static void open_values(const open_side &from, int e, int n, const float *const *p, float *const *out) {
        // tokens that no row sees may hold anything: 0 times a not-a-number must not happen
        uint8_t seen[XQ_PAGE];
        int n_seen = 0;
        for (int t0 = 0; t0 < XQ_PAGE; t0 += 4) {
            uint32x4_t any = vdupq_n_u32(0);
            for (int row = 0; row < n; ++row) {
                any = vorrq_u32(any, vreinterpretq_u32_f32(vld1q_f32(p[row] + t0)));
            }
            uint32_t bits[4];
            vst1q_u32(bits, any);
            for (int t = 0; t < 4; ++t) {
                seen[n_seen] = (uint8_t)(t0 + t);
                n_seen += bits[t] != 0;
            }
        }
        with_rows(from, [&](const auto &rows) {
            by_rows(n, [&](auto some, int i) { add_rows<some>(rows, e, p + i, seen, n_seen, out + i); });
        });
    }

    static bool softmax(float *s, float scale, float softcap, const uint16_t *mask, float slope, float *max,
                        float *sum) {
        const float32x4_t infinite = vdupq_n_f32(-INFINITY);
        float32x4_t top = vdupq_n_f32(*max);
        for (int t = 0; t < XQ_PAGE; t += 4) {
            float32x4_t x = vmulq_n_f32(vld1q_f32(s + t), scale);
            if (softcap > 0.0f) {
                x = vmulq_n_f32(tanh(vdivq_f32(x, vdupq_n_f32(softcap))), softcap);
            }
            if (mask) {
                const float32x4_t m = load_half(mask + t);
                x = vbslq_f32(vceqq_f32(m, infinite), infinite, vfmaq_n_f32(x, m, slope));
            }
            vst1q_f32(s + t, x);
            top = vmaxnmq_f32(top, x);
        }
        const float highest = vmaxvq_f32(top);
        if (highest == -INFINITY) {
            return false;
        }
        float32x4_t total = vdupq_n_f32(0.0f);
        for (int t = 0; t < XQ_PAGE; t += 4) {
            const float32x4_t p = exp_non_positive(vsubq_f32(vld1q_f32(s + t), vdupq_n_f32(highest)));
            vst1q_f32(s + t, p);
            total = vaddq_f32(total, p);
        }
        *sum = (highest > *max ? *sum * expf(*max - highest) : *sum) + vaddvq_f32(total);
        *max = highest;
        return true;
    }
};

} // namespace
} // namespace xq
