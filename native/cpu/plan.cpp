/* plan.cpp: what each layer stores: presets, names, checks, sizes.  The one description of all of them. */
#include "codec_format.h"
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace xq {

static const char *const fit_names[] = {"paper", "minmax", "clip", "lloyd", "lsq"};
static const char *const param_names[] = {"f16", "log8"};

/* ---- presets ---- */

/* Keys: with 4 bits there is nothing to gain from a search for the best fit. */
static xq_side key_side(int bits) {
    const int fit = bits == 4 ? XQ_FIT_MINMAX : bits == 3 ? XQ_FIT_LLOYD : XQ_FIT_CLIP;
    return {bits, XQ_PAGE, fit, XQ_PARAM_F16, 1, -1, -1, bits == 3 ? 0.06f : 0.0f};
}

static xq_side value_side(int bits) {
    return {bits, 0, XQ_FIT_LLOYD, XQ_PARAM_LOG8, 1, -1, -1, bits == 1 ? 0.3f : 0.09f};
}

/* The middle constants of the paper's search, section 3.2. */
static xq_side paper_side(int bits, int group, int owner) {
    return {bits, group, XQ_FIT_PAPER, XQ_PARAM_F16, 0, owner, -1, bits == 1 ? 1.0f / 6.0f : 0.045f};
}

static void uniform(xq_plan *plan, int k_bits, int v_bits) {
    for (int32_t l = 0; l < plan->n_layers; ++l) {
        plan->layers[l] = {key_side(k_bits), value_side(v_bits)};
    }
}

/* The paper's 1.375 schedule (32 layers: k_q 30, v_q 2, k_m 32, v_m 16), scaled to n layers. */
static void paper(xq_plan *plan, int32_t group) {
    const int32_t n = plan->n_layers;
    const int32_t k_q = (30 * n + 16) / 32, v_q = 2, v_m = n / 2;
    plan->pinned = 0;
    for (int32_t l = 0; l < n; ++l) {
        const bool borrows = l >= v_m && l % 2 == 1;
        plan->layers[l].k = paper_side(l < k_q ? 2 : 1, group, -1);
        plan->layers[l].v = paper_side(l < v_q ? 2 : 1, group, borrows ? l - 1 : -1);
    }
}

/* fill: sets the layers of a plan with a window of one page and one pinned page, both in bytes. */
static const struct {
    const char *name;
    void (*fill)(xq_plan *plan);
} presets[] = {
    {"xquant", [](xq_plan *plan) { uniform(plan, 4, 2); }},
    {"xquant-small", [](xq_plan *plan) { uniform(plan, 3, 2); }},
    {"xquant-tiny", [](xq_plan *plan) { uniform(plan, 2, 1); }},
    {"xquant-paper", [](xq_plan *plan) { paper(plan, 32); }},
    {"xquant-paper-128", [](xq_plan *plan) { paper(plan, 128); }},
};

/* The names of a table, separated by commas. */
template <typename T, typename F> static std::string joined(const T &table, const F &name_of) {
    std::string names;
    for (const auto &entry : table) {
        names += (names.empty() ? "" : ",") + std::string(name_of(entry));
    }
    return names;
}

} // namespace xq

using namespace xq;

const char *xq_plan_preset_names(void) {
    static const std::string names = joined(presets, [](const auto &preset) { return preset.name; });
    return names.c_str();
}

const char *xq_fit_names(void) {
    static const std::string names = joined(fit_names, [](const char *name) { return name; });
    return names.c_str();
}

const char *xq_param_names(void) {
    static const std::string names = joined(param_names, [](const char *name) { return name; });
    return names.c_str();
}

int xq_plan_preset(const char *name, int32_t n_layers, xq_plan *plan) {
    if (!name || !plan || n_layers < 0 || n_layers > XQ_MAX_LAYERS) {
        return fail(XQ_ERR_ARGUMENT, "xq_plan_preset: n_layers is %d, must be 0 to %d", n_layers, XQ_MAX_LAYERS);
    }
    for (const auto &preset : presets) {
        if (strcmp(preset.name, name) == 0) {
            memset(plan, 0, sizeof(*plan));
            plan->n_layers = n_layers;
            plan->window = 128;
            plan->pinned = 1;
            plan->open_bits = 8;
            preset.fill(plan);
            return XQ_OK;
        }
    }
    return fail(XQ_ERR_PLAN, "preset \"%.64s\" is unknown; there are %s", name, xq_plan_preset_names());
}

/* ---- checks ---- */

static int bad(int32_t layer, char side, const char *field, double value, const char *allowed) {
    return fail(XQ_ERR_PLAN, "layer %d, %c: %s is %g, must be %s", layer, side, field, value, allowed);
}

/* width: of this side's head, or 0 if unknown. */
static int check_fields(const xq_side &side, int32_t l, bool is_k, int32_t width) {
    const char name = is_k ? 'K' : 'V';
    if (side.bits < 0 || side.bits > 4) {
        return bad(l, name, "bits", side.bits, "0 to 4");
    }
    if (side.group != 32 && side.group != 64 && side.group != 128 && (is_k || side.group != 0)) {
        return bad(l, name, "group", side.group,
                   is_k ? "32, 64 or 128 tokens" : "32, 64 or 128 channels, or 0 for the whole head");
    }
    if (side.fit < 0 || side.fit > XQ_FIT_LSQ) {
        return bad(l, name, "fit", side.fit, "paper, minmax, clip, lloyd or lsq");
    }
    if (side.param != XQ_PARAM_F16 && side.param != XQ_PARAM_LOG8) {
        return bad(l, name, "param", side.param, "f16 or log8");
    }
    if (!(side.eta >= 0.0f && side.eta < 0.5f)) {
        return bad(l, name, "eta", side.eta, "in [0, 0.5)");
    }
    if (side.rotate != 0 && side.rotate != 1) {
        return bad(l, name, "rotate", side.rotate, "0 or 1");
    }
    if (width != 0 && !is_width(width)) {
        return fail(XQ_ERR_PLAN, "layer %d, %c: head width is %d, must be a multiple of 16 from 16 to %d", l, name,
                    width, XQ_MAX_HEAD_DIM);
    }
    if (!is_k && width != 0 && side.group > 0 && side.group < width && width % side.group != 0) {
        return fail(XQ_ERR_PLAN, "layer %d, V: group %d does not divide the head width %d; use 0 for the whole head", l,
                    side.group, width);
    }
    if (side.owner < -1) {
        return bad(l, name, "owner", side.owner, "an earlier layer, or -1");
    }
    if (side.source < -1 || (is_k && side.source != -1)) {
        return bad(l, name, "map", side.source, is_k ? "-1: keys are not mapped" : "an earlier layer, or -1");
    }
    if (side.source >= 0 && side.owner >= 0) {
        return fail(XQ_ERR_PLAN, "layer %d, V: a layer that borrows codes from %d cannot be mapped from %d as well", l,
                    side.owner, side.source);
    }
    if (side.owner < 0 && side.fit == XQ_FIT_LSQ) {
        return fail(XQ_ERR_PLAN, "layer %d, %c: fit lsq is for borrowed codes; use paper, minmax, clip or lloyd", l,
                    name);
    }
    if (side.owner >= 0 && (side.param != XQ_PARAM_F16 || side.fit == XQ_FIT_CLIP || side.fit == XQ_FIT_LLOYD)) {
        return fail(XQ_ERR_PLAN, "layer %d, %c: borrowed codes need fit paper, minmax or lsq and param f16", l, name);
    }
    return XQ_OK;
}

static int check_side(const xq_plan *plan, int32_t l, bool is_k, const int32_t *widths) {
    const xq_side &side = is_k ? plan->layers[l].k : plan->layers[l].v;
    const char name = is_k ? 'K' : 'V';
    const int32_t width = widths ? widths[l] : 0;
    if (const int status = check_fields(side, l, is_k, width); status != XQ_OK) {
        return status;
    }
    if (side.source >= l) {
        return bad(l, name, "map", side.source, "an earlier layer, or -1");
    }
    if (side.source >= 0) {
        const xq_side &source = plan->layers[side.source].v;
        if (source.owner != -1 || source.source != -1 || (widths && widths[side.source] != width)) {
            return fail(XQ_ERR_PLAN,
                        "layer %d, V: its map reads layer %d, which must be a layer of the cache with the same head "
                        "width, own codes and no map",
                        l, side.source);
        }
    }
    if (side.owner < 0) {
        return XQ_OK;
    }
    if (side.owner >= l) {
        return bad(l, name, "owner", side.owner, "an earlier layer, or -1");
    }
    const xq_side &owner = is_k ? plan->layers[side.owner].k : plan->layers[side.owner].v;
    if (owner.owner != -1 || owner.bits < 1 || (widths && widths[side.owner] != width)) {
        return fail(XQ_ERR_PLAN,
                    "layer %d, %c: owner %d must be a layer of the cache with the same head width and own codes", l,
                    name, side.owner);
    }
    if (side.bits != owner.bits || side.rotate != owner.rotate) {
        return fail(XQ_ERR_PLAN, "layer %d, %c: bits and rotation must be those of its owner %d", l, name, side.owner);
    }
    return XQ_OK;
}

int xq_check_side(const xq_side *side, int32_t is_k, int32_t width) {
    return side ? check_fields(*side, 0, is_k != 0, width) : fail(XQ_ERR_ARGUMENT, "xq_check_side: null");
}

int xq_plan_check(const xq_plan *plan, const int32_t *d, const int32_t *e) {
    if (!plan || plan->n_layers < 0 || plan->n_layers > XQ_MAX_LAYERS) {
        return fail(XQ_ERR_PLAN, "n_layers is %d, must be 0 to %d", plan ? plan->n_layers : -1, XQ_MAX_LAYERS);
    }
    if (plan->window < -1 || plan->window > 1 << 20) {
        return fail(XQ_ERR_PLAN, "window is %d, must be -1 (never seal) to %d tokens", plan->window, 1 << 20);
    }
    if (plan->pinned < 0 || plan->pinned > 1024) {
        return fail(XQ_ERR_PLAN, "pinned is %d, must be 0 to 1024 pages", plan->pinned);
    }
    if (plan->open_bits != 8 && plan->open_bits != 16) {
        return fail(XQ_ERR_PLAN, "open_bits is %d, must be 8 or 16", plan->open_bits);
    }
    for (int32_t l = 0; l < plan->n_layers; ++l) {
        if (d && d[l] == 0) {
            continue; // not part of the cache
        }
        for (const bool is_k : {true, false}) {
            if (!is_k && e && e[l] == 0) {
                continue; // nothing is stored
            }
            if (const int status = check_side(plan, l, is_k, is_k ? d : e); status != XQ_OK) {
                return status;
            }
        }
    }
    return XQ_OK;
}

/* ---- sizes ---- */

int xq_block_layout_of(const xq_layer *layer, int32_t d, int32_t e, xq_block_layout *layout) {
    if (!layer || !layout || !is_width(d) || (e != 0 && !is_width(e))) {
        return fail(XQ_ERR_ARGUMENT,
                    "head widths are %d and %d, must be multiples of 16 from 16 to %d; of values 0 where they are all "
                    "the keys'",
                    d, e, XQ_MAX_HEAD_DIM);
    }
    if (const int status = check_fields(layer->k, 0, true, d); status != XQ_OK) {
        return status;
    }
    if (const int status = e > 0 ? check_fields(layer->v, 0, false, e) : XQ_OK; status != XQ_OK) {
        return status;
    }
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
        const int64_t start = at;
        at += (bytes + 63) / 64 * 64;
        return bytes > 0 ? (int32_t)start : -1;
    };
    layout->k_codes = take(page_codes_bytes(layer->k, true, d));
    layout->k_param = take(page_param_bytes(layer->k, true, d));
    layout->v_codes = take(e > 0 ? page_codes_bytes(layer->v, false, e) : 0);
    layout->v_param = take(e > 0 ? page_param_bytes(layer->v, false, e) : 0);
    layout->bytes = (int32_t)at;
    return XQ_OK;
}

static int64_t pages_of(int64_t tokens) {
    return (tokens + XQ_PAGE - 1) / XQ_PAGE;
}

/* Pages of each kind that a plan wants in a stream. */
struct open_pages {
    int64_t rows, bytes;
};

static open_pages open_pages_of(const xq_plan &plan, int64_t n_pages, int64_t n_seq) {
    const int64_t stay = plan.pinned + pages_of(plan.window);
    if (plan.window < 0 || stay + 1 >= n_pages) {
        return {n_pages, 0};
    }
    const auto of_all = [&](int64_t n) { return n + std::min(n * (n_seq - 1), n_pages / 6); };
    return plan.open_bits == 8 ? open_pages{of_all(1), of_all(stay)}
                               : open_pages{std::min(of_all(stay + 1), n_pages), 0};
}

static int check_counts(const char *function, const xq_plan *plan, int32_t n_pages, int32_t n_seq) {
    return plan && n_pages > 0 && n_seq > 0
               ? XQ_OK
               : fail(XQ_ERR_ARGUMENT, "%s: %d pages, %d sequences: must be above 0", function, n_pages, n_seq);
}

int32_t xq_plan_slots(const xq_plan *plan, int32_t n_pages, int32_t n_seq) {
    const int status = check_counts("xq_plan_slots", plan, n_pages, n_seq);
    return status == XQ_OK ? (int32_t)open_pages_of(*plan, n_pages, n_seq).rows : status;
}

int32_t xq_plan_byte_slots(const xq_plan *plan, int32_t n_pages, int32_t n_seq) {
    const int status = check_counts("xq_plan_byte_slots", plan, n_pages, n_seq);
    return status == XQ_OK ? (int32_t)open_pages_of(*plan, n_pages, n_seq).bytes : status;
}

int32_t xq_plan_first_block(const xq_plan *plan, int32_t n_pages) {
    if (const int status = check_counts("xq_plan_first_block", plan, n_pages, 1); status != XQ_OK) {
        return status;
    }
    // with a window there are byte slots for as many pages as there are slots of rows, and for these pages besides: one
    // that must make room for a page that is written always finds a place
    return plan->window > 0 && open_pages_of(*plan, n_pages, 1).bytes > 0 ? plan->pinned : 0;
}

int64_t xq_cache_bytes(const xq_plan *plan, const int32_t *d, const int32_t *e, const int32_t *n_head_kv,
                       int32_t n_pages, int32_t n_slots, int32_t n_bytes) {
    if (!d || !e || !n_head_kv) {
        return fail(XQ_ERR_ARGUMENT, "xq_cache_bytes: d, e and n_head_kv must not be null");
    }
    if (const int status = xq_plan_check(plan, d, e); status != XQ_OK) {
        return status;
    }
    const int32_t first_block = xq_plan_first_block(plan, n_pages);
    if (first_block < 0) {
        return first_block;
    }
    int64_t bytes = 0;
    for (int32_t l = 0; l < plan->n_layers; ++l) {
        if (d[l] == 0) {
            continue;
        }
        const xq_shape shape = {d[l], e[l], n_head_kv[l], n_pages, n_slots, 1, n_bytes, first_block};
        const int64_t rows = xq_store_row_bytes(&shape);
        const int64_t blocks = n_slots < n_pages ? xq_store_block_bytes(&plan->layers[l], &shape) : 0;
        if (rows < 0 || blocks < 0) {
            return XQ_ERR_ARGUMENT;
        }
        bytes += rows + blocks;
    }
    return bytes;
}
