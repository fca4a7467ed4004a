/* page_list.cuh: which pages of a block's part are sealed, which are open, and which nobody looks at. */
#pragma once

#include "launch.h"

#include <cuda_fp16.h>

namespace xq {

namespace {

/* Pages of a block's part: sealed ones from the front on, open ones, with their slots, from the back.  LIST below:
 * this, or the same with room for as many pages as a part has. */
struct page_list {
    static constexpr int size = XQ_CUDA_PART_PAGES;
    int n_sealed, n_open;
    int pages[size], slots[size];
    uint8_t seen[size];
};

/* Notes which of the n pages of a block's part are seen by any of n_tokens tokens.  mask: of the first of them.  By all
 * threads. */
template <typename LIST>
__device__ void find_seen_pages(LIST &list, const xq_attend_args &args, const uint16_t *mask, int n_tokens, int n) {
    const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32, lane = threadIdx.x % 32;
    for (int nth = warp; nth < n; nth += n_warps) {
        const int page = blockIdx.x + nth * args.n_parts;
        const char *at = (const char *)mask + (page * XQ_PAGE + 4 * lane) * (int)sizeof(__half);
        bool some = false;
#pragma unroll 1
        for (int token = 0; token < n_tokens; ++token) {
            const uint2 x = *(const uint2 *)(at + token * args.mask_token_stride);
            some |= x.x != 0xfc00fc00u || x.y != 0xfc00fc00u; // -inf twice
        }
        list.seen[nth] = __any_sync(~0u, some);
    }
    __syncthreads();
}

/* Lists the n pages of a block's part.  Of more tokens than one, most may see none of a page, which is then left out.
 * table: [page] of the stream.  mask: of the first token of the tile, or null.  By all threads. */
template <typename LIST>
__device__ void list_pages(LIST &list, const xq_store &store, const xq_attend_args &args, const int32_t *table,
                           const uint16_t *mask, int n_tokens, int n) {
    const bool looks = mask && args.n_tokens > 1;
    if (looks) {
        find_seen_pages(list, args, mask, n_tokens, n);
    }
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int n_sealed = 0, n_open = 0;
#pragma unroll 1
        for (int base = 0; base < n; base += 32) {
            const int nth = base + lane, page = blockIdx.x + nth * args.n_parts;
            const int slot = nth < n && (!looks || list.seen[nth]) ? safe_slot(store, page, table[page]) : XQ_SLOT_NONE;
            const uint32_t sealed = __ballot_sync(~0u, slot == XQ_SLOT_SEALED);
            const uint32_t open = __ballot_sync(~0u, is_open(slot));
            const uint32_t before = (1u << lane) - 1;
            if (slot == XQ_SLOT_SEALED) {
                list.pages[n_sealed + __popc(sealed & before)] = page;
            } else if (is_open(slot)) {
                const int at = list.size - 1 - n_open - __popc(open & before);
                list.pages[at] = page;
                list.slots[at] = slot;
            }
            n_sealed += __popc(sealed);
            n_open += __popc(open);
        }
        list.n_sealed = n_sealed;
        list.n_open = n_open;
    }
    __syncthreads();
}

/* Asks for the table, if the stream is what it usually is: what leads to it takes as long as itself. */
__device__ inline void prefetch_table(const xq_store &store, const xq_attend_args &args, int part, int nth_stream) {
    if (threadIdx.x < 64) {
        const int page = part + (int)threadIdx.x * args.n_parts;
        if (page < args.n_kv_pages) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(table_of(store, args.table, nth_stream) + page));
        }
    }
}

} // namespace

} // namespace xq
