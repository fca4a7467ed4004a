/* xquant_pages.cpp: see xquant_pages.h. */
#include "xquant_pages.h"

#include "page_table.h"

#include <algorithm>

namespace {

struct array_view : xq::cell_view {
    array_view(const xq::page_shape &shape, const xq_pages_cells &cells) : shape(shape), cells(cells) {}

    bool is_used(int32_t stream, int32_t cell) const override { return sequences(stream, cell) != 0; }
    bool is_any_used(int32_t stream, int32_t page) const override { return content(stream, page).lowest != INT32_MAX; }
    xq::page_content content(int32_t stream, int32_t page) const override {
        xq::page_content out;
        for (int32_t cell = page * XQ_PAGE; cell < end_of(page); ++cell) {
            if (is_used(stream, cell)) {
                out.valid[cell % XQ_PAGE / 32] |= 1u << (cell % 32);
                out.lowest = std::min(out.lowest, cells.positions[(int64_t)stream * shape.n_cells + cell]);
            }
        }
        return out;
    }
    bool is_own(int32_t stream, int32_t page, int32_t sequence) const override {
        for (int32_t cell = page * XQ_PAGE; cell < end_of(page); ++cell) {
            if (is_used(stream, cell) && !(sequences(stream, cell) >> sequence & 1)) {
                return false;
            }
        }
        return true;
    }
    int32_t owner(int32_t stream, int32_t cell) const override { return __builtin_ctzll(sequences(stream, cell)); }

  private:
    uint64_t sequences(int32_t stream, int32_t cell) const {
        return cells.sequences[(int64_t)stream * shape.n_cells + cell];
    }
    int32_t end_of(int32_t page) const { return std::min((page + 1) * XQ_PAGE, shape.n_cells); }

    const xq::page_shape &shape;
    const xq_pages_cells &cells;
};

} // namespace

struct xq_pages {
    explicit xq_pages(const xq::page_shape &shape) : table(shape) {}
    xq::page_table table;
    xq::page_plan plan;
    xq::page_write write;
};

xq_pages *xq_pages_new(int32_t n_streams, int32_t n_cells, int32_t n_slots, int32_t n_bytes, int32_t reserved,
                       int32_t window, int32_t pinned, int32_t staged, int32_t first_block) {
    const xq::page_shape shape = {n_streams, n_cells, n_slots, n_bytes, reserved, staged, window, pinned, first_block};
    const bool fits = n_streams > 0 && n_cells > 0 && n_slots > 0 && n_slots <= shape.n_pages();
    return fits && n_bytes >= 0 && staged >= 0 ? new xq_pages(shape) : nullptr;
}

void xq_pages_free(xq_pages *pages) {
    delete pages;
}

void xq_pages_clear(xq_pages *pages) {
    pages->table.clear();
}

int32_t xq_pages_state(const xq_pages *pages, int32_t stream, int32_t page) {
    return pages->table.state(stream, page);
}

uint64_t xq_pages_age(const xq_pages *pages, const xq_pages_cells *cells, int32_t stream, int32_t page) {
    return pages->table.age(array_view(pages->table.shape(), *cells), stream, page);
}

int32_t xq_pages_find(const xq_pages *pages, const xq_pages_cells *cells, int32_t stream, int32_t n,
                      const int32_t *sequences, uint32_t head, uint32_t *out) {
    const array_view view(pages->table.shape(), *cells);
    const auto found = pages->table.find_cells(view, stream, {sequences, sequences + n}, head);
    std::copy(found.begin(), found.end(), out);
    return (int32_t)found.size();
}

xq_pages_counts xq_pages_plan(xq_pages *pages, const xq_pages_cells *cells, int32_t stream, int32_t n,
                              const uint32_t *written, int32_t *moves) {
    pages->write = {stream, {written, written + n}};
    pages->plan = pages->table.plan(array_view(pages->table.shape(), *cells), {pages->write});
    const xq::page_plan &plan = pages->plan;
    auto *at = (xq::page_move *)moves;
    for (const auto *list :
         {&plan.released, &plan.seals, &plan.shrinks, &plan.unseals, &plan.opens, &plan.after[0], &plan.after[1]}) {
        at = std::copy(list->begin(), list->end(), at);
    }
    const auto size = [](const std::vector<xq::page_move> &list) { return (int32_t)list.size(); };
    return {plan.fits,        size(plan.released), size(plan.seals),    size(plan.shrinks), size(plan.unseals),
            size(plan.opens), size(plan.after[0]), size(plan.after[1]), plan.n_staged};
}

void xq_pages_commit_seals(xq_pages *pages) {
    pages->table.commit_seals(pages->plan);
}

void xq_pages_commit_shrinks(xq_pages *pages) {
    pages->table.commit_moves(pages->plan.shrinks);
}

void xq_pages_commit_opens(xq_pages *pages) {
    pages->table.commit_opens(pages->plan);
}

void xq_pages_commit_after(xq_pages *pages) {
    pages->table.commit_after(pages->plan);
}

void xq_pages_commit_lost(xq_pages *pages) {
    pages->table.commit_lost(pages->plan);
}

int32_t xq_pages_commit_left(xq_pages *pages, int32_t step, int32_t *moves) {
    const auto left = pages->table.left_to_do(pages->plan, step, {pages->write});
    std::copy(left.begin(), left.end(), (xq::page_move *)moves);
    pages->table.commit_moves(left);
    return (int32_t)left.size();
}

void xq_pages_wrote(xq_pages *pages, const xq_pages_cells *cells) {
    pages->table.wrote(array_view(pages->table.shape(), *cells), pages->write);
}

void xq_pages_grow(xq_pages *pages, int32_t n_slots, int32_t n_bytes, int32_t reserved, int32_t staged) {
    pages->table.grow(n_slots, n_bytes, reserved, staged);
}

void xq_pages_copy_stream(xq_pages *pages, int32_t from, int32_t to) {
    pages->table.copy_stream(from, to);
}
