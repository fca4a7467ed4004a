/* codec_fit.h: scale and zero of a group, and its codes: one sequence of single-precision operations for CPU and CUDA.
 *
 *     zero, scale from the group's values;  code = round((x - zero) / scale), clamped to 0 .. 2^B - 1
 *
 * What includes it is in its own namespace and has said what a lane is: `lanes` (a float, or a vector of them, one
 * group each), `parameters` {scale, base, middle, e, q}, splat, low, high, nearest, inverse and round_parameters.  Sums
 * go in the order of the elements and nothing is contracted, so that all of them give the same bytes.
 *
 * No include guard: it is compiled once per kernel set.
 */

/* Elements x[0] .. x[n_j - 1] of a group, X: a pointer, or what is read like one. */
template <typename X> struct group {
    const xq_side &side;
    X x;
    int n_j;
    int top; /* largest code, 2^B - 1 */
    lanes min, max;
};

template <typename X> XQ_LANE group<X> make_group(const xq_side &side, X x, int n_j) {
    group<X> g = {side, x, n_j, (1 << side.bits) - 1, x[0], x[0]};
    for (int j = 1; j < n_j; ++j) {
        g.min = low(g.min, x[j]);
        g.max = high(g.max, x[j]);
    }
    return g;
}

XQ_LANE lanes encode(lanes x, const parameters &p, lanes inv, int top) {
    return nearest(low(high((x - p.base) * inv + p.middle, splat(0.0f)), splat((float)top)));
}

/* Paper, section 3.2: the range shrinks by eta at both ends. */
template <typename X> XQ_LANE parameters relaxed(const group<X> &g, float eta) {
    const lanes range = g.max - g.min;
    parameters p = {};
    p.scale = range / (float)g.top * (1.0f - 2.0f * eta);
    p.base = g.min + range * eta;
    return p;
}

/* Fits of least error are short: what is read back lies nearer to the centre than what was stored, for every token
 * alike.  Sums over tokens keep that, where other errors cancel, so scales grow again, by `much` times the share of the
 * variance that codes leave unexplained; what is codes already does not grow. */
XQ_LANE parameters lengthened(const parameters &p, lanes rest, float much, int top) {
    parameters longer = p;
    longer.scale = p.scale * (rest * much + splat(1.0f));
    longer.base = p.base + (p.scale - longer.scale) * ((float)top * 0.5f);
    return longer;
}

/* Sums of a group's values, counted from `shift`, which keeps them small where the group lies far from zero. */
struct moments {
    lanes shift, sum, squares;
};
template <typename X> XQ_LANE moments moments_of(const group<X> &g) {
    moments m = {(g.min + g.max) * 0.5f, splat(0.0f), splat(0.0f)};
    for (int j = 0; j < g.n_j; ++j) {
        const lanes x = g.x[j] - m.shift;
        m.sum = m.sum + x;
        m.squares = m.squares + x * x;
    }
    return m;
}

/* Least-squares scale and zero for given codes; lanes whose codes are all the same get `flat`.  rest: the share of the
 * variance that is left over. */
template <typename X, typename F>
XQ_LANE parameters least_squares(const group<X> &g, const moments &m, const parameters &flat, const F &code,
                                 lanes &rest) {
    lanes sum_c = splat(0.0f), sum_cc = splat(0.0f), sum_xc = splat(0.0f);
    for (int j = 0; j < g.n_j; ++j) {
        const lanes c = code(j), x = g.x[j] - m.shift;
        sum_c = sum_c + c;
        sum_cc = sum_cc + c * c;
        sum_xc = sum_xc + x * c;
    }
    const lanes mean_c = sum_c / (float)g.n_j, mean_x = m.sum / (float)g.n_j;
    const lanes variance = sum_cc - sum_c * mean_c, both = sum_xc - m.sum * mean_c, all = m.squares - m.sum * mean_x;
    // codes that differ at all give a variance near 1 or more; less is rounding
    const auto usable = variance > 0.25f;
    const lanes scale = both / (usable ? variance : splat(1.0f));
    const auto varies = all > 0.0f;
    const lanes unexplained = splat(1.0f) - scale * both / (varies ? all : splat(1.0f));
    rest = varies ? low(high(unexplained, splat(0.0f)), splat(1.0f)) : splat(0.0f);
    parameters p = {};
    p.scale = usable ? scale : flat.scale;
    p.base = usable ? m.shift + mean_x - scale * mean_c : flat.base;
    return p;
}

template <typename X> XQ_LANE parameters fit_clip(const group<X> &g) {
    const float *etas = g.side.bits == 1 ? clip_one_bit : clip_more_bits;
    const int n = g.side.bits == 1 ? 8 : 6;
    parameters best = {}, best_raw = {};
    lanes best_error = splat(INFINITY);
    for (int k = 0; k < n; ++k) {
        const parameters raw = relaxed(g, etas[k]);
        const parameters p = round_parameters(g.side, raw.scale, raw.base);
        const lanes inv = inverse(p.scale);
        lanes error = splat(0.0f);
        for (int j = 0; j < g.n_j; ++j) {
            const lanes off = p.base + p.scale * (encode(g.x[j], p, inv, g.top) - p.middle) - g.x[j];
            error = error + off * off;
        }
        const auto better = error < best_error;
        best_error = better ? error : best_error;
        best.scale = better ? p.scale : best.scale;
        best.base = better ? p.base : best.base;
        best_raw.scale = better ? raw.scale : best_raw.scale;
        best_raw.base = better ? raw.base : best_raw.base;
        best.middle = p.middle;
    }
    const lanes inv = inverse(best.scale);
    lanes rest;
    least_squares(g, moments_of(g), best_raw, [&](int j) { return encode(g.x[j], best, inv, g.top); }, rest);
    const parameters p = lengthened(best_raw, rest, longer_clip, g.top);
    return round_parameters(g.side, p.scale, p.base);
}

template <typename X> XQ_LANE lanes mean(const group<X> &g) {
    const lanes shift = (g.min + g.max) * 0.5f;
    lanes sum = splat(0.0f);
    for (int j = 0; j < g.n_j; ++j) {
        sum = sum + (g.x[j] - shift);
    }
    return shift + sum / (float)g.n_j;
}

/* Three steps of assignment and least squares from the relaxed range. */
template <typename X> XQ_LANE parameters fit_lloyd(const group<X> &g) {
    const moments m = moments_of(g);
    parameters p = relaxed(g, g.side.eta);
    lanes rest;
    for (int step = 0; step < 3; ++step) {
        const lanes inv = inverse(p.scale);
        p = least_squares(g, m, p, [&](int j) { return encode(g.x[j], p, inv, g.top); }, rest);
    }
    p = lengthened(p, rest, longer_lloyd, g.top);
    return round_parameters(g.side, p.scale, p.base);
}

/* What is stored for a group.  owner_code(j): the code to borrow. */
template <typename X, typename F> XQ_LANE parameters fit(const group<X> &g, const F &owner_code) {
    parameters p = {};
    if (g.side.bits == 0) {
        p.base = mean(g);
        return p;
    }
    switch (g.side.fit) {
    case XQ_FIT_CLIP:
        return fit_clip(g);
    case XQ_FIT_LLOYD:
        return fit_lloyd(g);
    case XQ_FIT_LSQ: {
        parameters flat = {};
        flat.base = mean(g);
        lanes rest;
        p = least_squares(g, moments_of(g), flat, owner_code, rest);
        break;
    }
    default:
        p = relaxed(g, g.side.eta);
    }
    return round_parameters(g.side, p.scale, p.base);
}

/* The parameters that own codes are chosen with: those that are stored (p), but the paper's codes belong to the full
 * range, before it was relaxed and rounded. */
template <typename X> XQ_LANE parameters grid_of(const group<X> &g, const parameters &p) {
    return g.side.fit == XQ_FIT_PAPER ? relaxed(g, 0.0f) : p;
}

/* x [n] times the normalised Hadamard matrix; X: a pointer to what has +, - and * float, or what is read like one. */
template <typename X> XQ_LANE void transform(X x, int n) {
    const int block = hadamard_block(n);
    const float norm = (float)(1.0 / sqrt((double)block));
    for (int h = 1; h < block; h *= 2) {
        for (int i = 0; i < n; i += 2 * h) {
            for (int k = i; k < i + h; ++k) {
                const auto a = x[k], b = x[k + h];
                x[k] = a + b;
                x[k + h] = a - b;
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        x[i] = x[i] * norm;
    }
}
