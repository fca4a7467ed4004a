/* wide_shape.h: the blocks of the wide kernel (attend_wide.cuh) for a layer on the device at hand.
 *
 * A block is n_teams teams of W warps; NT tiles of eight query rows.  Dynamic shared memory:
 *
 *     [team] pages that come through a ring, and in their place, at last, two states      (n_teams * ring bytes)
 *     queries [product][lane][NT][2 registers]
 *     [team] room:  folded [tile of keys] as the queries; when scores are there, in their place, p [part of codes]
 *                   likewise, 8 products each (place_of_p)
 *                   scales, zeros [group of channels][quad of tokens][4] halves, if values have several groups
 *                   constants [tile of keys][warp][row] | tops [2][row], shares [warp][row][2]
 *     the list of pages
 */
#pragma once

#include "decode_shape.h"

namespace xq {

constexpr int max_wide_width = 512; /* of values */

/* Warps of a block, at most: sums of many rows and channels need registers. */
template <int W, int T, int NT> constexpr int wide_warps = W == 4 && T == 4 && NT == 2 ? 12 : 16;

/* One part, of 1, 2 or 4 bits, of the codes of a matrix with n_i rows i.  A quad is four rows i .. i + 3 that share a
 * word; unit u of a column has the quads planes * u .. planes * u + planes - 1, and a product takes, of a plane, those
 * of four units, one each lane t. */
struct code_part {
    int bits, planes, steps; /* planes: 8 / bits */
    int at;                  /* bytes from the start of 16 columns */

    XQ_BOTH int products() const { return steps * planes; }
};
XQ_BOTH code_part low_part(int bits, int n_i) {
    const int b = bits == 3 ? 2 : bits;
    return {b, 8 / b, (units_of(b, n_i) + 3) / 4, 0};
}
/* Of 3 bits. */
XQ_BOTH code_part high_part(int n_i) {
    return {1, 8, (units_of(1, n_i) + 3) / 4, 64 * units_of(2, n_i)};
}
XQ_BOTH int products_of(int bits, int n_i) {
    return low_part(bits, n_i).products() + (bits == 3 ? high_part(n_i).products() : 0);
}
constexpr int page_products = XQ_PAGE / 16; /* of the tokens of a page, each part */
/* Tokens one after the other, 16 a product: of latent and of open values. */
XQ_BOTH code_part token_order() {
    return {8, 1, page_products, 0};
}

/* What the launch's blocks need to know, worked out on the host: divisions are long code.  Sizes and offsets in bytes.
 */
struct wide_call : row_numbers {
    staged parts;
    int n_teams, depth;          /* depth: pages of a ring */
    int ring, state;             /* sizes: of a team's ring, of a state */
    int queries, rooms, list;    /* offsets */
    int room, folded;            /* sizes: of a team's room, of one tile's folded vectors */
    int scales, constants, tops; /* offsets in a room */
    int shared;
    int width, first_channel; /* channels of values that this launch takes, and where they are in a row of the output */
    bool rotate;
    code_part k_low, k_high, v_low, v_high;
    int k_column, v_column;  /* of 16 columns of codes */
    int k_param, v_param;    /* of the parameters of one tile, of one group */
    int tiles, log_tile;     /* tiles of a page's keys, and the logarithm of their tokens */
    int n_groups, log_group; /* groups of values, 0: one; the logarithm of their channels */
    int n_shares; /* of the warps: chunks of 32 channels of values, or planes of eight units of latent codes */
};

/* What depends on the layer alone. */
wide_call wide_call_of(const xq_store &store, bool latent);

inline int aligned(int bytes) {
    return (bytes + 127) / 128 * 128;
}

} // namespace xq
