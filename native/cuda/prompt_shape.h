/* prompt_shape.h: how attention over F16 rows is cut into blocks of threads, and what it needs of scratch memory.
 *
 * Query rows of a KV head are counted token by token, as everywhere: row r is token r / n_rep and head r % n_rep of
 * those that share the KV head.  A block takes prompt_rows of them, a tile, over the pages of one part.  Scratch:
 *
 *     views    u8  [stream][tile][page]  what a tile sees of a page: enum view           padded to 256 bytes
 *     partial  F32 [part][stream][token][head][width]                                    if there are several parts
 *     states   F32 [part][stream][token][head][2]: exponent, sum                         likewise
 *
 * where a part's sum is of 2^(score * log2(e) - exponent), and partial the mix of values with the same weights.
 */
#pragma once

#include "xquant.h"

#include <cstdint>

namespace xq {

constexpr int prompt_rows = 128; /* query rows of a block */
constexpr float log2e = 1.4426950408889634f;

enum view : uint8_t {
    view_all,  /* every token of the tile sees every cell, and nothing is added to scores: the mask is 0 */
    view_some, /* the mask must be read */
    view_none, /* no token sees a cell */
};

struct prompt_shape {
    int n_rep, n_tiles, n_parts; /* heads of a KV head; tiles of a KV head and stream; parts of the pages */
    int64_t n_rows;              /* of the output, all heads and streams */
    int64_t partial, states;     /* bytes from the start of scratch to these */
    int64_t bytes;               /* of scratch */
};

/* Parts with which n_blocks blocks, if there were one part, keep n_processors busy for the shortest time.  Times are in
 * fortieths of a page's, as measured on an H200: a processor runs one block at a time, which takes three pages' time
 * besides its pages; of parts, each block's states are written and read again, and they are joined by one launch more.
 */
inline int prompt_parts(int64_t n_blocks, int n_pages, int n_processors) {
    constexpr int page = 40, block = 3 * page, states = 1, launch = 2 * page, most_rounds = 8;
    int best = 1;
    int64_t least = INT64_MAX;
    for (int n = 1; n == 1 || (2 * n <= n_pages && n_blocks * n <= (int64_t)most_rounds * n_processors); ++n) {
        const int64_t rounds = (n_blocks * n + n_processors - 1) / n_processors;
        const int64_t time =
            rounds * ((n_pages + n - 1) / n * page + block) + (n > 1 ? n_blocks * n * states + launch : 0);
        if (time < least) {
            best = n;
            least = time;
        }
    }
    return best;
}

inline prompt_shape prompt_shape_of(const xq_rows_args &a, int n_processors) {
    prompt_shape s = {};
    s.n_rep = a.n_head / a.n_head_kv;
    s.n_tiles = (int)(((int64_t)a.n_tokens * s.n_rep + prompt_rows - 1) / prompt_rows);
    const int64_t n_heads = (int64_t)a.n_streams * a.n_head_kv;
    s.n_parts = prompt_parts(s.n_tiles * n_heads, a.n_kv_pages, n_processors);
    s.n_rows = (int64_t)a.n_streams * a.n_tokens * a.n_head;
    s.partial = ((int64_t)a.n_streams * s.n_tiles * a.n_kv_pages + 255) / 256 * 256;
    const int64_t n_states = s.n_parts > 1 ? s.n_parts * s.n_rows : 0;
    s.states = s.partial + n_states * a.width * (int64_t)sizeof(float);
    s.bytes = s.states + n_states * 2 * (int64_t)sizeof(float);
    return s;
}

} // namespace xq
