/* xquant_pages.h: the page table (page_table.h) as C functions, for its tests.
 *
 * Cells are two arrays [stream][n_cells]: `sequences`, one bit a sequence (0: the cell is free), and `positions`.
 */
#ifndef XQUANT_PAGES_H
#define XQUANT_PAGES_H

#include "xquant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin */

typedef struct xq_pages xq_pages;

typedef struct xq_pages_cells {
    const uint64_t *sequences; /* [stream][n_cells] */
    const int32_t *positions;  /* [stream][n_cells] */
} xq_pages_cells;

/* What xq_pages_plan says: moves [n][XQ_MOVE_WORDS], all seven lists in one buffer, one after the other. */
typedef struct xq_pages_counts {
    int32_t fits, n_released, n_seals, n_shrinks, n_unseals, n_opens, n_after_codes, n_after_bytes, n_staged;
} xq_pages_counts;

/* window < 0: never seals.  reserved: slots that new tokens leave to windows.  staged: pages that the stage takes.
 * first_block: pages before it are never sealed. */
XQ_API xq_pages *xq_pages_new(int32_t n_streams, int32_t n_cells, int32_t n_slots, int32_t n_bytes, int32_t reserved,
                              int32_t window, int32_t pinned, int32_t staged, int32_t first_block);
XQ_API void xq_pages_free(xq_pages *pages);
XQ_API void xq_pages_clear(xq_pages *pages);
XQ_API int32_t xq_pages_state(const xq_pages *pages, int32_t stream, int32_t page);
XQ_API uint64_t xq_pages_age(const xq_pages *pages, const xq_pages_cells *cells, int32_t stream, int32_t page);
/* out: [n] cells for one token of each of the sequences; how many: n, or 0 if they do not fit. */
XQ_API int32_t xq_pages_find(const xq_pages *pages, const xq_pages_cells *cells, int32_t stream, int32_t n,
                             const int32_t *sequences, uint32_t head, uint32_t *out);
/* What must happen before n cells of a stream are written; moves: room for 7 * n_pages of them.  The plan is kept for
 * the commits. */
XQ_API xq_pages_counts xq_pages_plan(xq_pages *pages, const xq_pages_cells *cells, int32_t stream, int32_t n,
                                     const uint32_t *written, int32_t *moves);
XQ_API void xq_pages_commit_seals(xq_pages *pages);
XQ_API void xq_pages_commit_shrinks(xq_pages *pages);
XQ_API void xq_pages_commit_opens(xq_pages *pages);
XQ_API void xq_pages_commit_after(xq_pages *pages);
XQ_API void xq_pages_commit_lost(xq_pages *pages);
/* The moves of a step of the last plan that the other layers make when some had made it; how many. */
XQ_API int32_t xq_pages_commit_left(xq_pages *pages, int32_t step, int32_t *moves);
/* The cells of the last plan are written. */
XQ_API void xq_pages_wrote(xq_pages *pages, const xq_pages_cells *cells);
XQ_API void xq_pages_grow(xq_pages *pages, int32_t n_slots, int32_t n_bytes, int32_t reserved, int32_t staged);
XQ_API void xq_pages_copy_stream(xq_pages *pages, int32_t from, int32_t to);

/* cdef: end */

#ifdef __cplusplus
}
#endif

#endif /* XQUANT_PAGES_H */
