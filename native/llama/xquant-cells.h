/* xquant-cells.h: llama.cpp's cells as the page table sees them. */
#pragma once

#include "xquant-kv-cache.h"

#include <algorithm>

namespace xquant {

class kv_cache::cells_view : public xq::cell_view {
  public:
    explicit cells_view(const kv_cache &kv) : kv(kv) {}

    bool is_used(int32_t stream, int32_t cell) const override { return !cells(stream).is_empty((uint32_t)cell); }
    bool is_any_used(int32_t stream, int32_t page) const override {
        const auto &c = cells(stream);
        uint32_t cell = first_of(page);
        while (cell < end_of(c, page) && c.is_empty(cell)) {
            cell++;
        }
        return cell < end_of(c, page);
    }
    xq::page_content content(int32_t stream, int32_t page) const override {
        const auto &c = cells(stream);
        xq::page_content out;
        for (uint32_t cell = first_of(page); cell < end_of(c, page); ++cell) {
            if (!c.is_empty(cell)) {
                out.valid[cell % XQ_PAGE / 32] |= 1u << (cell % 32);
                out.lowest = std::min(out.lowest, c.pos_get(cell));
            }
        }
        return out;
    }
    bool is_own(int32_t stream, int32_t page, int32_t sequence) const override {
        const auto &c = cells(stream);
        for (uint32_t cell = first_of(page); cell < end_of(c, page); ++cell) {
            if (!c.is_empty(cell) && !c.seq_has(cell, sequence)) {
                return false;
            }
        }
        return true;
    }
    int32_t owner(int32_t stream, int32_t cell) const override {
        const auto &c = cells(stream);
        int32_t sequence = 0;
        while (!c.seq_has((uint32_t)cell, sequence)) {
            sequence++;
        }
        return sequence;
    }

  private:
    const llama_kv_cells &cells(int32_t stream) const { return kv.v_cells[stream]; }
    static uint32_t first_of(int32_t page) { return (uint32_t)page * XQ_PAGE; }
    static uint32_t end_of(const llama_kv_cells &c, int32_t page) {
        return std::min(first_of(page) + XQ_PAGE, c.size());
    }

    const kv_cache &kv;
};

} // namespace xquant
