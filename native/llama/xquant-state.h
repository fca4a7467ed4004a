/* xquant-state.h: the cache as a stream of bytes: a whole cache, or what one sequence has in it.
 *
 *     header    magic, bytes of a cell's extension, fingerprint of weights and plan, streams (0: one sequence)
 *     pages     per stream: where the next search for cells begins, how many pages, then of each: number, how it lies
 *               (page_kind), tokens since its newest one, bits of the cells that are saved, and per cell: position,
 *               shift that its key still lacks, sequences, extension
 *     data      page by page, layer by layer, KV head by KV head: the block of codes or of bytes, with nothing in it of
 *               cells that are not saved, or F16 rows of the saved cells: keys, then values
 *     checksum  of all that stands before it
 *
 * Sealed pages come first, then open ones, the longest unwritten first: in this order they can be put back one by one.
 * What was saved before there were pages in bytes is read as well.
 * A sequence's state holds what its own cells hold and nothing of others.  Nothing in it depends on the size of the
 * cache: any context of the same weights and plan may load it, and what was sealed stays as it is where there is room.
 */
#pragma once

#include "xquant-kv-cache.h"

#include "xquant-hash.h"

#include "llama-io.h"

#include <new>
#include <stdexcept>

namespace xquant {

constexpr uint32_t state_magic = 0x33535158, old_state_magic = 0x32535158; // "XQS3", "XQS2"

[[noreturn]] inline void refuse_state(const std::string &reason) {
    throw std::runtime_error("xquant: cannot restore the state: " + reason);
}

inline bool has_token(const uint32_t valid[4], int32_t t) {
    return valid[t / 32] >> (t % 32) & 1u;
}

/* Writes and reads for somebody else, and hashes what passes by: tensors' data as well, also where a flag keeps it on
 * the device, piece by piece as it is written: pages go with the rest. */
class checked_writer final : public llama_io_write_i {
  public:
    explicit checked_writer(llama_io_write_i &to) : to_(to) {}
    void write(const void *src, size_t size) override {
        hash_.add(src, size);
        to_.write(src, size);
    }
    void write_tensor(ggml_tensor *tensor, size_t offset, size_t size) override {
        bytes_.resize(size);
        ggml_backend_tensor_get(tensor, bytes_.data(), offset, size);
        write(bytes_.data(), size);
    }
    size_t n_bytes() override { return to_.n_bytes(); }
    uint64_t checksum() const { return hash_.value(); }

  private:
    llama_io_write_i &to_;
    hasher hash_;
    std::vector<uint8_t> bytes_;
};

class checked_reader final : public llama_io_read_i {
  public:
    explicit checked_reader(llama_io_read_i &from) : from_(from) {}
    void read(void *dst, size_t size) override {
        from_.read(dst, size);
        hash_.add(dst, size);
    }
    void read_tensor(ggml_tensor *, size_t, size_t) override { refuse_state("pages are not read into tensors"); }
    size_t n_left() override { return from_.n_left(); }
    size_t n_bytes() override { return from_.n_bytes(); }
    uint64_t checksum() const { return hash_.value(); }

  private:
    llama_io_read_i &from_;
    hasher hash_;
};

struct kv_cache::saved_cell {
    llama_pos pos, shift; /* shift: by how much the position moved since its key was rotated */
    std::vector<llama_seq_id> sequences;
    llama_kv_cell_ext ext;
};

enum page_kind : uint32_t { page_sealed, page_rows_f16, page_in_bytes };

struct kv_cache::saved_page {
    uint32_t number = 0, kind = page_sealed; /* number: of the page in the cache that was saved */
    uint64_t age = 0;                        /* tokens written since its newest one */
    uint32_t valid[4] = {};
    std::vector<saved_cell> cells; /* one per bit of valid */
    int32_t at = 0;                /* while it is saved: the page */
};

constexpr std::align_val_t cache_line{64};

struct aligned_deleter {
    void operator()(uint8_t *p) const { ::operator delete(p, cache_line); }
};

/* The data of one page, as it was saved, and as rows. */
struct kv_cache::page_data {
    std::unique_ptr<uint8_t, aligned_deleter> bytes; /* [layer][KV head]: a block, or rows of keys and of values */
    std::vector<std::vector<uint16_t>> decoded[2];   /* keys, values of each layer: F16 [XQ_PAGE][KV head][width] */

    /* Decodes blocks of all layers, owners and sources of maps among them. */
    void decode(const std::vector<std::unique_ptr<layer>> &layers, uint32_t kind);
};

struct kv_cache::saved_state {
    std::vector<uint32_t> heads;                        /* [stream]: where the next search for cells begins */
    std::vector<std::pair<uint32_t, saved_page>> pages; /* with the stream that each goes to */
    std::vector<page_data> data;                        /* [page] */
};

} // namespace xquant
