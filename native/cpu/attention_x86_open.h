/* attention_x86_open.h: attention over open (F16) pages, exact in single precision: a few tokens at a time are
 * converted to F32 on the stack, for all rows.  Included once by each x86 set, in its namespace: `to_float`,
 * `dot_rows`, `add_rows` and `seen_tokens` are the set's own.
 */
struct open_pages {
    static void open_scores(int d, int n, const float *const *q, const uint16_t *k, float *const *scores) {
        alignas(64) float keys[open_tokens * XQ_MAX_HEAD_DIM];
        for (int t0 = 0; t0 < XQ_PAGE; t0 += open_tokens) {
            to_float(k + t0 * d, open_tokens * d, keys);
            by_rows(n, [&](auto rows, int row) { dot_rows<rows>(d, q + row, keys, t0, open_tokens, scores + row); });
        }
    }

    /* e channels of rows that lie `row` elements apart. */
    static void open_values(const uint16_t *rows, int row, int e, int n, const float *const *p, float *const *out) {
        alignas(64) float values[open_tokens * XQ_MAX_HEAD_DIM];
        for (int t0 = 0; t0 < XQ_PAGE; t0 += open_tokens) {
            // tokens that no row sees may hold anything: 0 times a not-a-number must not happen
            const uint32_t seen = seen_tokens(n, p, t0);
            if (seen == 0) {
                continue;
            }
            for (int t = 0; t < open_tokens; ++t) {
                if (seen >> t & 1) {
                    to_float(rows + (t0 + t) * row, e, values + t * e);
                } else {
                    fill(values + t * e, e, 0.0f);
                }
            }
            by_rows(n, [&](auto some, int i) { add_rows<some>(e, p + i, values, t0, open_tokens, out + i); });
        }
    }
};
