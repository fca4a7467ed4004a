/* decode_shape.h: the blocks of the tensor-core attention for a layer on the device at hand. */
#pragma once

#include "launch.h"
#include "stage.cuh"

namespace xq {

/* Teams of warps of a block, buffers of sealed pages of each, warps that take open ones, where the buffers start, and
 * all of its dynamic shared memory. n_teams = 0: nothing fits. */
struct decode_shape {
    staged parts;
    int n_teams, depth, n_open, buffers, shared;
};

/* Query rows and pages of a launch's blocks, worked out on the host: divisions are long code. */
struct row_numbers {
    int n_rep, rows_of_head, n_tiles; /* rows_of_head: query rows of a KV head, n_tokens * n_rep */
    int n_pages;                      /* of a part, rounded up */
    uint32_t inverse;                 /* 2^31 / n_rep, rounded up */

    /* rows_of_tile: query rows of a block. */
    void count(const xq_store &store, const xq_attend_args &args, int rows_of_tile) {
        n_rep = args.n_head / store.n_head_kv;
        rows_of_head = args.n_tokens * n_rep;
        n_tiles = (rows_of_head + rows_of_tile - 1) / rows_of_tile;
        n_pages = (args.n_kv_pages + args.n_parts - 1) / args.n_parts;
        inverse = ((1u << 31) + n_rep - 1) / n_rep;
    }
    /* Row r of a KV head: its token, and which of the heads.  Exact while r * n_rep is below 2^31: `inverse` is too
     * large by less than 1, which adds less than r / 2^31, and so less than 1 / n_rep, to the quotient. */
    __device__ int token_of(int r) const { return (int)__umulhi(2 * (unsigned)r, inverse); }
    __device__ int rest_of(int r) const { return r - token_of(r) * n_rep; }
    /* Pages of a part: one less for the last ones. */
    __device__ int pages_of(const xq_attend_args &args, int part) const {
        return n_pages - ((n_pages - 1) * args.n_parts + part >= args.n_kv_pages);
    }
};

/* What a block does: a tile of the query rows of one KV head, from first_row on, over a part of a stream's pages: every
 * n_parts-th, from page `part` on. */
struct block_task {
    int part, head, nth_stream, first_row;
};

/* What a launch's blocks need to know. */
struct decode_blocks {
    decode_shape shape;
};
struct decode_call : decode_blocks, row_numbers {};
decode_shape decode_shape_of(const xq_store &store, int rows_of_lane);

} // namespace xq
