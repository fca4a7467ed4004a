/* attention_sealed.h: attention over sealed pages by the product of attention_pages.h, for keys and for values.
 * Included once by each set but the exact one, in its namespace: `parameters` and `multiply` are the set's own.
 */
struct sealed_pages {
    static void sealed_scores(const side_view &k, int page, int n, const float *const *q, float *const *scores) {
        const uint8_t *param = page_param(k, page), *codes = page_codes(k, page);
        const int group = k.plan.group, column = column_bytes(k.plan.bits, k.width);
        for (int t0 = 0; t0 < XQ_PAGE; t0 += group, param += parameter_bytes(k.plan, k.width)) {
            multiply(k.plan.bits, parameters(k.plan, k.width, param, k.param_page), group, codes + t0 / 16 * column,
                     k.codes_page, n, q, t0, scores, true);
        }
    }

    static void sealed_values(const side_view &v, int page, int n, const float *const *p, float *const *out) {
        const uint8_t *param = page_param(v, page), *codes = page_codes(v, page);
        const int group = group_length(v.plan, v.width), column = column_bytes(v.plan.bits, XQ_PAGE);
        for (int j0 = 0; j0 < v.width; j0 += group, param += parameter_bytes(v.plan, XQ_PAGE)) {
            multiply(v.plan.bits, parameters(v.plan, XQ_PAGE, param, v.param_page), group, codes + j0 / 16 * column,
                     v.codes_page, n, p, j0, out, false);
        }
    }
};
