/* attention_scalar.cpp: the exact kernels, in single precision and without vector instructions: how attention over
 * codes works, and what the other sets are compared with.  See attention_pages.h for the equations. */
#include "attention_pages.h"

namespace xq {

namespace {

/* Scale and zero of n numbers that share their parameters along the other axis; scale is 0 for 0 bits. */
void load_parameters(const xq_side &side, int n, const uint8_t *param, float *scale, float *zero) {
    for (int i = 0; i < n; ++i) {
        const auto *h = (const uint16_t *)param;
        if (side.bits == 0) {
            scale[i] = 0.0f;
            zero[i] = half_to_float(h[i]);
        } else if (side.param == XQ_PARAM_F16) {
            scale[i] = half_to_float(h[i]);
            zero[i] = half_to_float(h[n + i]);
        } else {
            scale[i] = exp2f((float)((int)param[i] - 161) / 8.0f);
            const float centre = (float)(int8_t)param[n + i] * scale[i] / 8.0f;
            zero[i] = centre - scale[i] * (float)((1 << side.bits) - 1) / 2.0f;
        }
    }
}

/* c [16]: codes of row i, for the 16 columns of one block of codes with n_i rows. */
void row_of_codes(int bits, int n_i, const uint8_t *block, int i, float *c) {
    const int low_bits = bits == 3 ? 2 : bits, rows_a_unit = 32 / low_bits;
    const uint8_t *unit = block + 64 * (i / rows_a_unit) + i % 4;
    const uint8_t *high = block + 64 * ((n_i + 15) / 16) + 64 * (i / 32) + i % 4; // the 1-bit part of 3-bit codes
    for (int j = 0; j < 16; ++j) {
        int code = unit[4 * j] >> (low_bits * (i % rows_a_unit / 4)) & ((1 << low_bits) - 1);
        if (bits == 3) {
            code |= (high[4 * j] >> (i % 32 / 4) & 1) << 2;
        }
        c[j] = (float)code;
    }
}

/* y [16] += sum_i a[i] c[i][j], for the 16 columns j of one block of codes with n_i rows. */
void multiply_codes(int bits, int n_i, const uint8_t *block, const float *a /* [n_i] */, float *y /* [16] */) {
    for (int i = 0; i < n_i; ++i) {
        float c[16];
        row_of_codes(bits, n_i, block, i, c);
        for (int j = 0; j < 16; ++j) {
            y[j] += a[i] * c[j];
        }
    }
}

/* The first n channels of token t of an open page. */
void load_token(const open_side &from, int t, int n, float *x) {
    for (int i = 0; i < n; ++i) {
        if (from.rows) {
            x[i] = half_to_float(from.rows[t * from.width + i]);
        } else {
            const uint16_t *scale = from.bytes.scale + (from.bytes.by_channel ? i : t);
            x[i] = half_to_float(scale[from.bytes.n]) +
                   half_to_float(*scale) * (float)from.bytes.codes[t * from.width + i];
        }
    }
}

struct scalar_set {
    static void open_scores(const open_side &k, int n, const float *const *q, float *const *scores) {
        const int d = k.width;
        for (int t = 0; t < XQ_PAGE; ++t) {
            float key[XQ_MAX_HEAD_DIM];
            load_token(k, t, d, key);
            for (int row = 0; row < n; ++row) {
                float sum = 0.0f;
                for (int i = 0; i < d; ++i) {
                    sum += q[row][i] * key[i];
                }
                scores[row][t] = sum;
            }
        }
    }

    /* The first e channels. */
    static void open_values(const open_side &from, int e, int n, const float *const *p, float *const *out) {
        for (int t = 0; t < XQ_PAGE; ++t) {
            float value[XQ_MAX_HEAD_DIM];
            load_token(from, t, e, value);
            for (int i = 0; i < n; ++i) {
                for (int j = 0; j < e && p[i][t] != 0.0f; ++j) {
                    out[i][j] += p[i][t] * value[j];
                }
            }
        }
    }

    static void sealed_scores(const side_view &k, int page, int n, const float *const *q, float *const *scores) {
        const uint8_t *param = page_param(k, page), *codes = page_codes(k, page);
        const int d = k.width, group = k.plan.group;
        float scale[XQ_MAX_HEAD_DIM], zero[XQ_MAX_HEAD_DIM], folded[XQ_MAX_HEAD_DIM];
        for (int t0 = 0; t0 < XQ_PAGE; t0 += group, param += parameter_bytes(k.plan, d)) {
            load_parameters(k.plan, d, param, scale, zero);
            for (int row = 0; row < n; ++row) {
                float constant = 0.0f;
                for (int i = 0; i < d; ++i) {
                    folded[i] = q[row][i] * scale[i];
                    constant += q[row][i] * zero[i];
                }
                fill(scores[row] + t0, group, constant);
                for (int t = t0; t < t0 + group && k.plan.bits > 0; t += 16) {
                    multiply_codes(k.plan.bits, d, codes + t / 16 * column_bytes(k.plan.bits, d), folded,
                                   scores[row] + t);
                }
            }
        }
    }

    static void sealed_values(const side_view &v, int page, int n, const float *const *p, float *const *out) {
        const uint8_t *param = page_param(v, page), *codes = page_codes(v, page);
        const int group = group_length(v.plan, v.width);
        float scale[XQ_PAGE], zero[XQ_PAGE], folded[XQ_PAGE];
        for (int j0 = 0; j0 < v.width; j0 += group, param += parameter_bytes(v.plan, XQ_PAGE)) {
            load_parameters(v.plan, XQ_PAGE, param, scale, zero);
            for (int row = 0; row < n; ++row) {
                float constant = 0.0f;
                for (int t = 0; t < XQ_PAGE; ++t) {
                    folded[t] = p[row][t] * scale[t];
                    constant += p[row][t] * zero[t];
                }
                for (int j = j0; j < j0 + group; j += 16) {
                    float y[16];
                    fill(y, 16, constant);
                    if (v.plan.bits > 0) {
                        multiply_codes(v.plan.bits, XQ_PAGE, codes + j / 16 * column_bytes(v.plan.bits, XQ_PAGE),
                                       folded, y);
                    }
                    for (int k = 0; k < 16; ++k) {
                        out[row][j + k] += y[k];
                    }
                }
            }
        }
    }

    static void latent_values(const side_view &k, int e, int page, int n, const float *const *p, float *const *out) {
        const uint8_t *param = page_param(k, page), *codes = page_codes(k, page);
        const int d = k.width, group = k.plan.group, bits = k.plan.bits;
        float scale[XQ_MAX_HEAD_DIM], zero[XQ_MAX_HEAD_DIM];
        for (int t0 = 0; t0 < XQ_PAGE; t0 += group, param += parameter_bytes(k.plan, d)) {
            load_parameters(k.plan, d, param, scale, zero);
            for (int row = 0; row < n; ++row) {
                float total = 0.0f;
                for (int t = t0; t < t0 + group; ++t) {
                    total += p[row][t];
                }
                for (int i = 0; i < e; ++i) {
                    out[row][i] += zero[i] * total;
                }
            }
            for (int t = t0; t < t0 + group && bits > 0; t += 16) {
                for (int i = 0; i < e; ++i) {
                    float c[16];
                    row_of_codes(bits, d, codes + t / 16 * column_bytes(bits, d), i, c);
                    for (int row = 0; row < n; ++row) {
                        float sum = 0.0f;
                        for (int j = 0; j < 16; ++j) {
                            sum += p[row][t + j] * c[j];
                        }
                        out[row][i] += scale[i] * sum;
                    }
                }
            }
        }
    }

    /* Scores to p, in place; max and sum of the row move on. false: nothing is visible. */
    static bool softmax(float *s, float scale, float softcap, const uint16_t *mask, float slope, float *max,
                        float *sum) {
        float top = *max;
        for (int t = 0; t < XQ_PAGE; ++t) {
            s[t] *= scale;
            if (softcap > 0.0f) {
                s[t] = softcap * tanhf(s[t] / softcap);
            }
            if (mask) {
                const float m = half_to_float(mask[t]);
                s[t] = m == -INFINITY ? -INFINITY : s[t] + slope * m;
            }
            top = s[t] > top ? s[t] : top;
        }
        if (top == -INFINITY) {
            return false;
        }
        float total = 0.0f;
        for (int t = 0; t < XQ_PAGE; ++t) {
            s[t] = expf(s[t] - top);
            total += s[t];
        }
        *sum = *sum * expf(*max - top) + total;
        *max = top;
        return true;
    }
};

} // namespace

void attend_scalar(const attention &args) {
    attend<scalar_set>(args);
}

} // namespace xq
