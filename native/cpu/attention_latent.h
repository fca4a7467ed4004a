/* attention_latent.h: the values of a latent layer over sealed pages: sums over tokens of the codes of its keys.
 *
 * With p_t ~ step p8_t, step = max p_t / 127, over the tokens t of a tile,
 *
 *     out_i += scale_i step (sum_t p8_t c[i][t] - middle sum_t p8_t) + centre_i sum_t p_t
 *
 * so that only what lies about the middle of the codes is rounded (attention_parameters.h).  Included once by each set
 * but the exact one, in its namespace.  The set's own are `weights` (p of a tile in the order of its product: step,
 * total, whole = sum_t p8_t), its `fold_weights`, and `add_channels<B, R>`, which adds the e channels of R rows.
 */
struct latent_pages {
    static void latent_values(const side_view &k, int e, int page, int n, const float *const *p, float *const *out) {
        const uint8_t *param = page_param(k, page), *codes = page_codes(k, page);
        const int group = k.plan.group, column = column_bytes(k.plan.bits, k.width);
        for (int t0 = 0; t0 < XQ_PAGE; t0 += group, param += parameter_bytes(k.plan, k.width)) {
            const parameters x(k.plan, k.width, param, k.param_page);
            by_rows(n, [&](auto rows, int row) {
                constexpr int R = decltype(rows)::value;
                weights w[R];
                for (int r = 0; r < R; ++r) {
                    fold_weights(p[row + r] + t0, group, w[r]);
                }
                const auto add = k.plan.bits == 4   ? add_channels<4, R>
                                 : k.plan.bits == 3 ? add_channels<3, R>
                                 : k.plan.bits == 2 ? add_channels<2, R>
                                                    : add_channels<1, R>;
                // 0 bits: the centres alone
                add(x, e, k.plan.bits == 0 ? 0 : group / 16, codes + t0 / 16 * column, w, out + row);
            });
        }
    }
};
