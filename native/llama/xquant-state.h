/* xquant-state.h: the cache as a stream of bytes: a whole cache, or what one sequence has in it.
 *
 *     header  magic, bytes of a cell's extension, fingerprint of weights and plan, number of streams (0: one sequence)
 *     pages   per stream: where the next search for cells begins, how many pages, then of each: number, open or sealed,
 * tokens since its newest one, bits of the cells that are saved, and per cell: position, shift that its key still
 * lacks, sequences, extension data    page by page, layer by layer, KV head by KV head: the block, with nothing in it
 * of cells that are not saved, or F16 rows of the saved cells: keys, then values
 *
 * Sealed pages come first, then open ones, the longest unwritten first: in this order they can be put back one by one.
 * A sequence's state holds what its own cells hold and nothing of others.  Nothing in it depends on the size of the
 * cache: any context of the same weights and plan may load it, and what was sealed stays as it is where there is room.
 */
#pragma once

#include "xquant-kv-cache.h"

#include "llama-io.h"

#include <stdexcept>

namespace xquant {

constexpr uint32_t state_magic = 0x33535158, old_state_magic = 0x32535158; // "XQS3", "XQS2"

[[noreturn]] inline void refuse_state(const std::string &reason) {
    throw std::runtime_error("xquant: cannot restore the state: " + reason);
}

inline bool has_token(const uint32_t valid[4], int32_t t) {
    return valid[t / 32] >> (t % 32) & 1u;
}

struct kv_cache::saved_cell {
    llama_pos pos, shift; /* shift: by how much the position moved since its key was rotated */
    std::vector<llama_seq_id> sequences;
    llama_kv_cell_ext ext;
};

struct kv_cache::saved_page {
    uint32_t number = 0, open = 0; /* number: of the page in the cache that was saved */
    uint64_t age = 0;              /* tokens written since its newest one */
    uint32_t valid[4] = {};
    std::vector<saved_cell> cells; /* one per bit of valid */
    int32_t at = 0;                /* while it is saved: the page */
};

struct kv_cache::saved_state {
    std::vector<uint32_t> heads;                        /* [stream]: where the next search for cells begins */
    std::vector<std::pair<uint32_t, saved_page>> pages; /* with the stream that each goes to */
};

} // namespace xquant
