/* clear_tokens.cpp: takes tokens out of a sealed block, so that what is saved of a page is what may be saved of it.
 *
 * A token's codes become 0: of keys, 4 bytes of every unit of its 16 columns; of values, its bits of every column.  Its
 * own parameters (values) become those of a zero, and so do those of keys of a tile that has no tokens left.  What
 * tokens share with others, the parameters of their tile of keys, stays: the others cannot be read without them.
 * Likewise of a page in bytes, whose keys are one tile.
 */
#include "codec_format.h"
#include "half.h"
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace xq {

static bool is_kept(const uint32_t valid[4], int t) {
    return valid[t / 32] >> (t % 32) & 1u;
}

/* The parts of 16 columns of codes: 3 bits are a 2-bit and a 1-bit part.  Calls f(column, bits). */
template <typename F> static void each_part(int bits, int n_i, uint8_t *column, const F &f) {
    if (bits == 3) {
        f(column, 2);
        f(column + 64 * units_of(2, n_i), 1);
    } else {
        f(column, bits);
    }
}

static void clear_key(const xq_side &side, int d, uint8_t *codes, int t) {
    each_part(side.bits, d, codes + t / 16 * column_bytes(side.bits, d), [&](uint8_t *column, int bits) {
        for (int unit = 0; unit < units_of(bits, d); ++unit) {
            memset(column + 64 * unit + 4 * (t % 16), 0, 4);
        }
    });
}

static void clear_value(const xq_side &side, int e, uint8_t *codes, int t) {
    for (int j = 0; j < e; j += 16) {
        each_part(side.bits, XQ_PAGE, codes + j / 16 * column_bytes(side.bits, XQ_PAGE),
                  [&](uint8_t *column, int bits) {
                      const int rows = 32 / bits;
                      uint8_t *at = column + 64 * (t / rows) + t % 4;
                      const auto mask = (uint8_t)~(((1u << bits) - 1) << (bits * (t % rows / 4)));
                      for (int k = 0; k < 16; ++k) {
                          at[4 * k] &= mask;
                      }
                  });
    }
}

/* Parameters of number i of n become those of a zero. */
static void clear_parameters(const xq_side &side, int n, uint8_t *param, int i) {
    if (side.bits == 0 || side.param == XQ_PARAM_F16) {
        memset(param + 2 * i, 0, 2);
        if (side.bits > 0) {
            memset(param + 2 * (n + i), 0, 2);
        }
    } else {
        param[i] = 1; // the smallest scale
        param[n + i] = 0;
    }
}

static void clear(const xq_layer &layer, int d, int e, const xq_block_layout &at, const uint32_t valid[4],
                  uint8_t *block) {
    const int tile = group_length(layer.k, XQ_PAGE),
              group = e > 0 ? group_length(layer.v, e) : 1; // e = 0: nothing of V
    uint8_t *k_param = block + at.k_param, *v_param = block + at.v_param;
    for (int t0 = 0; t0 < XQ_PAGE; t0 += tile, k_param += parameter_bytes(layer.k, d)) {
        bool any = false;
        for (int t = t0; t < t0 + tile; ++t) {
            any = any || is_kept(valid, t);
        }
        for (int i = 0; i < d && !any; ++i) {
            clear_parameters(layer.k, d, k_param, i);
        }
    }
    for (int t = 0; t < XQ_PAGE; ++t) {
        if (is_kept(valid, t)) {
            continue;
        }
        if (at.k_codes >= 0) {
            clear_key(layer.k, d, block + at.k_codes, t);
        }
        if (at.v_codes >= 0) {
            clear_value(layer.v, e, block + at.v_codes, t);
        }
        for (int j0 = 0; j0 < e; j0 += group) {
            clear_parameters(layer.v, XQ_PAGE, v_param + j0 / group * parameter_bytes(layer.v, XQ_PAGE), t);
        }
    }
}

} // namespace xq

int xq_clear_tokens(const xq_layer *layer, int32_t d, int32_t e, const uint32_t valid[4], uint8_t *block) {
    xq_block_layout at;
    if (const int status = xq_block_layout_of(layer, d, e, &at); status != XQ_OK) {
        return status;
    }
    if (!valid || !block) {
        return xq::fail(XQ_ERR_ARGUMENT, "valid and block must not be null");
    }
    xq::clear(*layer, d, e, at, valid, block);
    return XQ_OK;
}

/* ---- pages in bytes ---- */

namespace xq {

static int check_byte_widths(const char *function, int32_t d, int32_t e, const void *block) {
    return block && is_width(d) && (e == 0 || is_width(e))
               ? XQ_OK
               : fail(XQ_ERR_ARGUMENT, "%s: widths %d and %d, must be multiples of 16 to %d, of values perhaps 0",
                      function, d, e, XQ_MAX_HEAD_DIM);
}

/* One side of the block of a KV head; is_k: it comes first. */
static byte_page bytes_in(uint8_t *block, bool is_k, int32_t d, int32_t e) {
    side_view side = {};
    side.width = is_k ? d : e;
    side.bytes = block + (is_k ? 0 : page_in_bytes(true, d));
    return bytes_at(side, is_k, XQ_SLOT_BYTES);
}

} // namespace xq

int64_t xq_byte_block_bytes(int32_t d, int32_t e) {
    const int status = xq::check_byte_widths("xq_byte_block_bytes", d, e, "");
    return status == XQ_OK ? xq::page_in_bytes(true, d) + xq::page_in_bytes(false, e) : status;
}

int xq_clear_bytes(int32_t d, int32_t e, const uint32_t valid[4], uint8_t *block) {
    if (const int status = xq::check_byte_widths("xq_clear_bytes", d, e, valid ? block : nullptr); status != XQ_OK) {
        return status;
    }
    const bool any = valid[0] | valid[1] | valid[2] | valid[3];
    for (const bool is_k : {true, false}) {
        const xq::byte_page page = xq::bytes_in(block, is_k, d, e);
        for (int t = 0; t < XQ_PAGE && page.width > 0; ++t) {
            if (!xq::is_kept(valid, t)) {
                memset(page.codes + t * page.width, 0, (size_t)page.width);
                if (!is_k) {
                    page.scale[t] = page.scale[page.n + t] = 0;
                }
            }
        }
        if (is_k && !any) {
            memset(page.scale, 0, (size_t)page.n * 2 * sizeof(uint16_t));
        }
    }
    return XQ_OK;
}

int xq_check_bytes(int32_t d, int32_t e, const uint8_t *block) {
    if (const int status = xq::check_byte_widths("xq_check_bytes", d, e, block); status != XQ_OK) {
        return status;
    }
    for (const bool is_k : {true, false}) {
        const xq::byte_page page = xq::bytes_in((uint8_t *)block, is_k, d, e);
        for (int i = 0; i < page.n && page.width > 0; ++i) {
            const float scale = xq::half_to_float(page.scale[i]), centre = xq::half_to_float(page.scale[page.n + i]);
            if (!(scale >= 0.0f) || !std::isfinite(scale) || !std::isfinite(centre)) {
                return xq::fail(XQ_ERR_ARGUMENT,
                                "parameter %d of %s in bytes is scale %g and centre %g, must be finite, "
                                "and the scale at least 0",
                                i, is_k ? "keys" : "values", (double)scale, (double)centre);
            }
        }
        for (int i = 0; i < XQ_PAGE * page.width; ++i) {
            if (page.codes[i] == -128) {
                return xq::fail(XQ_ERR_ARGUMENT, "byte %d of %s is -128, must be -127 to 127", i,
                                is_k ? "keys" : "values");
            }
        }
    }
    return XQ_OK;
}
