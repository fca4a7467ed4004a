/* attention_x86_open.h: attention over open pages, exact in single precision: a few tokens at a time are converted to
 * F32 on the stack, for all rows.  Included once by each x86 set, in its namespace: `floats` and what is done with
 * them, `dot_rows`, `add_rows` and `seen_tokens` are the set's own.
 */

inline void to_float(const uint16_t *half, int n /* multiple of n_floats */, float *out) {
    for (int i = 0; i < n; i += n_floats) {
        store(out + i, half_to_floats(half + i));
    }
}
/* The first n channels of open_tokens tokens of a page in bytes, whose parameters are channels', to out [token][n]. */
inline void channels_to_float(const byte_page &page, int t0, int n /* multiple of n_floats */, float *out) {
    for (int i = 0; i < n; i += n_floats) {
        const floats scale = half_to_floats(page.scale + i), centre = half_to_floats(page.scale + page.n + i);
        for (int t = 0; t < open_tokens; ++t) {
            const floats x = bytes_to_floats(page.codes + (t0 + t) * page.width + i);
            store(out + t * n + i, multiply_add(scale, x, centre));
        }
    }
}
/* Of one token; parameters are tokens'. */
inline void token_to_float(const byte_page &page, int t, int n, float *out) {
    const floats scale = splat(half_to_float(page.scale[t])), centre = splat(half_to_float(page.scale[page.n + t]));
    for (int i = 0; i < n; i += n_floats) {
        store(out + i, multiply_add(scale, bytes_to_floats(page.codes + t * page.width + i), centre));
    }
}

struct open_pages {
    static void open_scores(const open_side &k, int n, const float *const *q, float *const *scores) {
        alignas(64) float keys[open_tokens * XQ_MAX_HEAD_DIM];
        const int d = k.width;
        for (int t0 = 0; t0 < XQ_PAGE; t0 += open_tokens) {
            if (k.rows) {
                to_float(k.rows + t0 * d, open_tokens * d, keys);
            } else {
                channels_to_float(k.bytes, t0, d, keys);
            }
            by_rows(n, [&](auto rows, int row) { dot_rows<rows>(d, q + row, keys, t0, open_tokens, scores + row); });
        }
    }

    /* The first e channels. */
    static void open_values(const open_side &from, int e, int n, const float *const *p, float *const *out) {
        alignas(64) float values[open_tokens * XQ_MAX_HEAD_DIM];
        for (int t0 = 0; t0 < XQ_PAGE; t0 += open_tokens) {
            // tokens that no row sees may hold anything: 0 times a not-a-number must not happen
            const uint32_t seen = seen_tokens(n, p, t0);
            if (seen == 0) {
                continue;
            }
            if (!from.rows && from.bytes.by_channel) {
                channels_to_float(from.bytes, t0, e, values);
            }
            for (int t = 0; t < open_tokens; ++t) {
                if (!(seen >> t & 1)) {
                    fill(values + t * e, e, 0.0f);
                } else if (from.rows) {
                    to_float(from.rows + (t0 + t) * from.width, e, values + t * e);
                } else if (!from.bytes.by_channel) {
                    token_to_float(from.bytes, t0 + t, e, values + t * e);
                }
            }
            by_rows(n, [&](auto some, int i) { add_rows<some>(e, p + i, values, t0, open_tokens, out + i); });
        }
    }
};
