/* wide_team.cuh: what a team of W warps does with a page: everything but the order of it (attend_wide.cuh). */
#pragma once

#include "wide_open.cuh"
#include "wide_softmax.cuh"

namespace xq {

namespace {

/* All that a team knows.  W warps, T tiles of 16 channels a warp, NT tiles of eight rows; LATENT: values
 * are channels of keys. */
template <int W, int T, int NT, bool LATENT> struct wide_team {
    static constexpr int N = XQ_PAGE / (8 * W); /* tokens of a lane */
    using state_of = wide_state<T, NT>;

    const xq_store &store;
    const xq_attend_args &args;
    const wide_call &call;
    const wide_tile<NT> &tile;
    const uint8_t *queries;
    uint8_t *room;
    const wide_place<W> place;

    __device__ const xq_side &k() const { return store.k.plan; }
    __device__ const xq_side &v() const { return store.v.plan; }
    __device__ int first_token() const { return place.member * (XQ_PAGE / W) + N * place.g; } /* of this lane */
    /* [sealed, open][row] maxima; [warp][row] what warps tell each other at the end. */
    __device__ int *tops(bool open) const { return (int *)(room + call.tops) + open * wide_rows<NT>; }
    __device__ float2 *shares() const { return (float2 *)(tops(true) + wide_rows<NT>); }
    /* [warp][t][2 NT] sums of q times zero points: a lane's rows lie side by side. */
    __device__ float *constants(int tile, int member) const {
        return (float *)(room + call.constants) + (tile * W + member) * wide_rows<NT> + 2 * NT * place.t;
    }
    __device__ uint8_t *p() const { return room; }
    __device__ int lane_at() const { return place.lane * lane_bytes<NT>; }
    /* [group][quad][4] halves: scales, then zero points. */
    __device__ uint8_t *scales(int group) const { return room + call.scales + group * (2 * XQ_PAGE); }
    __device__ uint8_t *zeros(int group) const { return scales(call.n_groups + group); }

    /* ---- before scores ---- */

    template <bool F16> __device__ void fold_tile(const uint8_t *param, uint8_t *to, float (&constant)[NT][2]) const {
        const int width = store.k.width;
        with_bits(call.k_low.bits, [&](auto bits) {
            fold_part<bits.value, F16, W, NT>(call.k_low.steps, true, k(), width, param, queries, to, constant, place);
        });
        if (k().bits == 3) {
            const int first = call.k_low.products() * product_bytes<NT>;
            fold_part<1, F16, W, NT>(call.k_high.steps, false, k(), width, param, queries + first, to + first, constant,
                                     place);
        }
    }

    __device__ void fold_keys(const uint8_t *param) const {
#pragma unroll 1
        for (int n = 0; n < call.tiles; ++n, param += call.k_param) {
            float constant[NT][2] = {};
            if (k().param == XQ_PARAM_F16) {
                fold_tile<true>(param, room + n * call.folded, constant);
            } else {
                fold_tile<false>(param, room + n * call.folded, constant);
            }
            for (int nt = 0; nt < NT && place.g == 0; ++nt) {
                *(float2 *)(constants(n, place.member) + 2 * nt) = make_float2(constant[nt][0], constant[nt][1]);
            }
        }
    }

    /* An exponent that scales of values of the whole head stay below 2^(it + 1). */
    __device__ int scale_exponent(const uint8_t *param) const {
        if (v().param == XQ_PARAM_LOG8) {
            const uint32_t e = *(const uint32_t *)(param + 4 * place.lane);
            const uint32_t top = max(max(e & 0xffu, e >> 8 & 0xffu), max(e >> 16 & 0xffu, e >> 24));
            return ((int)warp_max(top) - log8_zero) >> 3;
        }
        const uint2 x = *(const uint2 *)(param + 8 * place.lane);
        const uint32_t top = max(max(x.x & 0x7fffu, x.x >> 16 & 0x7fffu), max(x.y & 0x7fffu, x.y >> 16 & 0x7fffu));
        return ((int)warp_max(top) >> 10) - 15;
    }

    /* The unit of values' scales. */
    __device__ void fold_values(state_of &state, const uint8_t *param) const {
        if (call.n_groups == 0) {
            state.raise_exponent(scale_exponent(param));
        } else {
            fold_groups(state, param);
        }
    }

    /* The same, and scales as halves in it.  Zero points of a group lie with 2^(B p), for p lies with its inverse. */
    __device__ void fold_groups(state_of &state, const uint8_t *param) const {
        float scale[4], zero[4], top = 0.0f;
#pragma unroll 1
        for (int n = 0; n < call.n_groups; ++n) {
            load_four(v(), param + n * call.v_param, XQ_PAGE, 4 * place.lane, scale, zero);
            for (int w = 0; w < 4; ++w) {
                top = fmaxf(top, fmaxf(fabsf(scale[w]), fabsf(zero[w]) * 0.0625f));
            }
        }
        state.raise_exponent((int)(warp_max(__float_as_uint(top)) >> 23) - 127);
        const float unit = power_of_two(-state.exponent), back = unit / weight_of_quad(call.v_low, place.lane);
#pragma unroll 1
        for (int n = place.member; n < call.n_groups; n += W) {
            load_four(v(), param + n * call.v_param, XQ_PAGE, 4 * place.lane, scale, zero);
            *(uint2 *)(scales(n) + 8 * place.lane) =
                make_uint2(halves(scale[0] * unit, scale[2] * unit), halves(scale[1] * unit, scale[3] * unit));
            *(uint2 *)(zeros(n) + 8 * place.lane) =
                make_uint2(halves(zero[0] * back, zero[2] * back), halves(zero[1] * back, zero[3] * back));
        }
    }

    /* ---- scores ---- */

    /* s [token][r], without cap and mask. */
    __device__ void sealed_scores(float (&s)[N][2 * NT], const uint8_t *codes) const {
        const int number = first_token() >> call.log_tile;
        const uint8_t *at = codes + first_token() / 16 * call.k_column + 64 * place.t + 4 * (first_token() % 16);
        const uint8_t *folded = room + number * call.folded + lane_at();
        float c[2][NT][4] = {};
        with_bits(call.k_low.bits, [&](auto bits) { add_scores<bits.value, N, NT>(c, call.k_low.steps, at, folded); });
        if (k().bits == 3) {
            add_scores<1, N, NT>(c, call.k_high.steps, at + call.k_high.at,
                                 folded + call.k_low.products() * product_bytes<NT>);
        }
        float constant[2 * NT] = {};
#pragma unroll
        for (int m = 0; m < W; ++m) {
            const auto x = fragment<NT>::load((const uint8_t *)constants(number, m)); // as many bytes
            for (int r = 0; r < 2 * NT; ++r) {
                constant[r] += __uint_as_float(x.x[r / 2][r % 2]);
            }
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const int row = row_of(2 * nt, place.t);
            const float2 factor = *(const float2 *)(tile.factor + row);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float x = N == 4 ? c[k / 2][nt][k % 2 * 2] : c[0][nt][2 * k] + c[1][nt][2 * k];
                const float y = N == 4 ? c[k / 2][nt][k % 2 * 2 + 1] : c[0][nt][2 * k + 1] + c[1][nt][2 * k + 1];
                s[k][2 * nt] = (x * code_unit + constant[2 * nt]) * factor.x;
                s[k][2 * nt + 1] = (y * code_unit + constant[2 * nt + 1]) * factor.y;
            }
        }
    }

    /* k: of the KV head. */
    __device__ void open_scores(float (&s)[N][2 * NT], const side_view &k, int slot) const {
        float y[N / 2][NT][4] = {};
        with_rows<true>(k, slot, first_token(), 0, [&](const auto &rows) {
            add_open_scores<N, NT>(y, call.k_low, store.k.width, rows, queries + lane_at(), place.t);
        });
#pragma unroll
        for (int r = 0; r < 2 * NT; ++r) {
            const float factor = tile.factor[row_of(r, place.t)];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                s[k][r] = y[k / 2][r / 2][k % 2 * 2 + r % 2] * factor;
            }
        }
    }

    /* ---- values ---- */

    /* Stores p times the scales of its values, or p alone if each group of channels has its own. */
    __device__ void store_sealed_p(state_of &state, const float (&s)[N][2 * NT], const uint8_t *param,
                                   const p_place<NT> &low, const p_place<NT> &high) const {
        float by[N];
        for (int k = 0; k < N; ++k) {
            by[k] = power_of_two(p_bits);
        }
        if (!LATENT && call.n_groups == 0) {
            const float unit = power_of_two(p_bits - state.exponent);
            float scale[4], zero[4];
            load_four(v(), param, XQ_PAGE, first_token() & ~3, scale, zero);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const bool second = N == 2 && place.g % 2 == 1;
                by[k] = (second ? scale[N == 2 ? k + 2 : k] : scale[k]) * unit;
                const float z = (second ? zero[N == 2 ? k + 2 : k] : zero[k]) * unit;
#pragma unroll
                for (int r = 0; r < 2 * NT; ++r) {
                    state.zero[r / 2][r % 2] += s[k][r] * z;
                }
            }
        }
        float weighted[N];
        for (int k = 0; k < N; ++k) {
            weighted[k] = by[k] * low.weight;
        }
        store_p<N, NT>(p(), low, s, weighted, place.g);
        if (!LATENT && v().bits == 3) {
            for (int k = 0; k < N; ++k) {
                weighted[k] = by[k] * (4.0f * high.weight);
            }
            store_p<N, NT>(p() + page_products * product_bytes<NT>, high, s, weighted, place.g);
        }
    }

    /* Chunks of 32 channels of this warp: member, member + W, ... */
    __device__ int own_chunks() const { return ((call.width + 31) / 32 - place.member + W - 1) / W; }

    template <bool GROUPED> __device__ void values(state_of &state, const uint8_t *codes) const {
        const int step = 2 * W * call.v_column, n = own_chunks();
        const uint8_t *at =
            codes + (2 * place.member + place.g / 4) * call.v_column + 64 * place.t + 16 * (place.g % 4);
        const uint8_t *of_group = nullptr;
        int group_step[T / 2] = {};
        if (GROUPED) {
            const int first = 32 * place.member >> call.log_group;
            of_group = scales(min(first, call.n_groups - 1));
            for (int c = 1; c < T / 2; ++c) {
                group_step[c] = c < n ? ((32 * (place.member + c * W) >> call.log_group) - first) * (2 * XQ_PAGE) : 0;
            }
            add_zeros(state, call.v_low);
        }
        if (n <= 0) {
            return;
        }
        const auto quad = [&](const code_part &part) { return of_group + 8 * part.planes * place.t; };
        with_bits(call.v_low.bits, [&](auto bits) {
            add_values<bits.value, GROUPED, T, NT>(state.out, at, step, n, p(), quad(call.v_low), group_step);
        });
        if (v().bits == 3) {
            add_values<1, GROUPED, T, NT>(state.out, at + call.v_high.at, step, n,
                                          p() + page_products * product_bytes<NT>, quad(call.v_high), group_step);
        }
    }

    __device__ void sealed_values(state_of &state, const uint8_t *codes) const {
        if (call.n_groups > 0) {
            values<true>(state, codes);
        } else {
            values<false>(state, codes);
        }
    }

    /* This warp's products of p with the zero points of all groups. */
    __device__ void add_zeros(state_of &state, const code_part &part) const {
        const int log = 31 - __clz(part.planes), last = call.n_groups - 1;
#pragma unroll 1
        for (int n = place.member; n < page_products; n += W) {
            const int quad = part.planes * (4 * (n >> log) + place.t) + (n & (part.planes - 1));
            const uint2 x = *(const uint2 *)(zeros(min(place.g, last)) + 8 * quad);
            const uint2 y = *(const uint2 *)(zeros(min(place.g + 8, last)) + 8 * quad);
            const auto b = fragment<NT>::load(p() + n * product_bytes<NT> + place_of_p<NT>(n, place.lane));
            for (int nt = 0; nt < NT; ++nt) {
                multiply(state.zero[nt], x.x, y.x, x.y, y.y, b.x[nt][0], b.x[nt][1]);
            }
        }
    }

    __device__ latent_place latent() const {
        const code_part &part = call.k_low;
        const int nth = place.member * (T / 2), unit = nth / part.planes * 8 + place.g, plane = nth % part.planes;
        return {unit, plane, 4 * (part.planes * unit + plane), nth < call.n_shares};
    }

    __device__ void latent_values(state_of &state, const uint8_t *codes, const uint8_t *param,
                                  const latent_place &at) const {
        if (!at.exists) {
            return;
        }
        const int blocks = k().group / 16;
#pragma unroll 1
        for (int first = 0; first < page_products; first += blocks, param += call.k_param) {
            float y[T][NT][4] = {}, total[NT][4] = {};
            if (k().bits == 3) {
                add_latent<true, T, NT>(y, total, codes, call.k_column, call.k_low, call.k_high.at, at, first, blocks,
                                        p(), place);
            } else {
                add_latent<false, T, NT>(y, total, codes, call.k_column, call.k_low, 0, at, first, blocks, p(), place);
            }
#pragma unroll
            for (int l = 0; l < T / 2; ++l) {
                float scale[4] = {}, zero[4] = {};
                if (at.channel + 4 * l < store.k.width) {
                    load_four(k(), param, store.k.width, at.channel + 4 * l, scale, zero);
                }
                const float unit = code_unit * power_of_two(-call.k_low.bits * (at.plane + l));
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    scale[w] *= unit;
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) {
                        for (int r = 0; r < 2; ++r) {
                            const int i = 2 * l + w / 2, k = w % 2 * 2 + r;
                            state.out[i][nt][k] += scale[w] * y[i][nt][k] + zero[w] * total[nt][r];
                        }
                    }
                }
            }
        }
    }

    /* side: of the KV head, which has the values. */
    __device__ void open_values(state_of &state, const side_view &side, int slot) const {
        const int channel = 32 * place.member + 4 * place.g, n = own_chunks();
        if (n <= 0) {
            return;
        }
        const bool has = channel + 32 * W * (n - 1) < call.width;
        with_rows<LATENT>(side, slot, 4 * place.t, channel,
                          [&](const auto &rows) { add_open_values<T, NT>(state.out, rows, 32 * W, n, has, p()); });
    }
};

} // namespace

} // namespace xq
