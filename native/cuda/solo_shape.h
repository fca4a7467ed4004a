/* solo_shape.h: the blocks of attend_solo.cuh.  Dynamic shared memory:
 *
 *     [team][depth] pages, and in their place, at last, a state of each warp
 *     queries [product][lane][NT][2 registers]
 *     room: shares of the scores of a piece of an open page
 *     the list of pages
 */
#pragma once

#include "wide_shape.h"

namespace xq {

constexpr int solo_warps = 8; /* of a block: sums of many rows and channels need registers */
/* Warps that share a page of heads E wide: of wider ones fewer pages fit in shared memory. */
template <int E> constexpr int solo_team = E > 256 ? 4 : 2;

/* Bits of keys and values that attend_solo.cuh is compiled for. */
inline bool has_solo_bits(int k, int v) {
    return (k == 4 && v == 2) || (k == 3 && v == 2) || (k == 2 && v == 1) || (k == 4 && v == 4);
}

/* Whether attend_solo.cuh covers a launch without latent values. */
bool solo_covers(const xq_store &store, const xq_attend_args &args);
int launch_solo(const xq_store &store, const xq_attend_args &args, cudaStream_t stream);

} // namespace xq
