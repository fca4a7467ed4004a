/* xquant-sliding.cpp: states of models with sliding layers, which have two caches.
 *
 * That of the sliding layers comes first in the state, as llama.cpp writes it; what it was is put back if the rest is
 * refused.
 */
#include "xquant-cache.h"

#include "llama-impl.h"
#include "llama-io.h"

#include <cstring>
#include <stdexcept>

namespace xquant {

namespace {

/* A state in memory. */
struct memory_writer : llama_io_write_i {
    std::vector<uint8_t> bytes;
    void write(const void *src, size_t size) override {
        bytes.insert(bytes.end(), (const uint8_t *)src, (const uint8_t *)src + size);
    }
    void write_tensor(ggml_tensor *tensor, size_t offset, size_t size) override {
        bytes.resize(bytes.size() + size);
        ggml_backend_tensor_get(tensor, bytes.data() + bytes.size() - size, offset, size);
    }
    size_t n_bytes() override { return bytes.size(); }
};

struct memory_reader : llama_io_read_i {
    explicit memory_reader(const std::vector<uint8_t> &bytes) : bytes(bytes) {}
    const std::vector<uint8_t> &bytes;
    size_t at = 0;
    void read(void *dst, size_t size) override {
        if (size > n_left()) {
            throw std::runtime_error("xquant: a saved sliding cache is too short");
        }
        memcpy(dst, bytes.data() + at, size);
        at += size;
    }
    void read_tensor(ggml_tensor *tensor, size_t offset, size_t size) override {
        if (size > n_left()) {
            throw std::runtime_error("xquant: a saved sliding cache is too short");
        }
        ggml_backend_tensor_set(tensor, bytes.data() + at, offset, size);
        at += size;
    }
    size_t n_bytes() override { return at; }
    size_t n_left() override { return bytes.size() - at; }
};

} // namespace

bool may_load_cell(llama_pos pos, uint32_t n_sequences, uint32_t n_seq_max) {
    if (pos < 0 || pos > max_position || n_sequences < 1 || n_sequences > n_seq_max) {
        LLAMA_LOG_ERROR("xquant: a saved cell at position %d of %u sequences: must be 0 to %d, and 1 to %u\n", pos,
                        n_sequences, max_position, n_seq_max);
        return false;
    }
    return true;
}

void state_read_sliding(llama_kv_cache &base, llama_kv_cache &sliding, llama_io_read_i &io, llama_seq_id seq_id,
                        llama_state_seq_flags flags) {
    memory_writer before;
    sliding.state_write(before, seq_id, flags);
    try {
        sliding.state_read(io, seq_id, flags);
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            base.state_read(io, seq_id, flags);
        }
    } catch (...) {
        io.discard();
        if (seq_id < 0) {
            sliding.clear(false);
        } else {
            sliding.seq_rm(seq_id, -1, -1);
        }
        memory_reader back(before.bytes);
        sliding.state_read(back, seq_id, flags);
        throw;
    }
}

} // namespace xquant
