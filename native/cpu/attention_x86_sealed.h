/* attention_x86_sealed.h: attention over sealed pages by the product of attention_pages.h, for keys and for values.
 * Included once by each x86 set, in its namespace: `parameters` and `multiply` are the set's own.
 */
struct sealed_pages {
    static void sealed_scores(const xq_attention &a, int page, int n, const float *const *q, float *const *scores) {
        const uint8_t *param = a.k_param + page * a.k_param_stride, *codes = a.k_codes + page * a.k_codes_stride;
        const int64_t column = column_bytes(a.k_code_bits, a.d);
        for (int t0 = 0; t0 < XQ_PAGE; t0 += a.k.group, param += parameter_bytes(a.k, a.d)) {
            multiply(a.k.bits, parameters(a.k, a.d, param, a.k_param_stride), a.k.group, codes + t0 / 16 * column,
                     a.k_codes_stride, n, q, t0, scores, true);
        }
    }

    static void sealed_values(const xq_attention &a, int page, int n, const float *const *p, float *const *out) {
        const uint8_t *param = a.v_param + page * a.v_param_stride, *codes = a.v_codes + page * a.v_codes_stride;
        const int group = group_length(a.v, a.e);
        const int64_t column = column_bytes(a.v_code_bits, XQ_PAGE);
        for (int j0 = 0; j0 < a.e; j0 += group, param += parameter_bytes(a.v, XQ_PAGE)) {
            multiply(a.v.bits, parameters(a.v, XQ_PAGE, param, a.v_param_stride), group, codes + j0 / 16 * column,
                     a.v_codes_stride, n, p, j0, out, false);
        }
    }
};
