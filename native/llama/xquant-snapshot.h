/* xquant-snapshot.h: a part of a memory's state as bytes in this process: what a refused load gives back. */
#pragma once

#include "llama-io.h"
#include "llama-memory.h"

#include "ggml-backend.h"

#include <cstring>
#include <stdexcept>
#include <vector>

namespace xquant {

class snapshot {
  public:
    /* Of one sequence (-1: of all). */
    snapshot(const llama_memory_i &memory, llama_seq_id seq_id, llama_state_seq_flags flags)
        : seq_id_(seq_id), flags_(flags & ~(llama_state_seq_flags)LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        writer io(bytes_);
        memory.state_write(io, seq_id_, flags_);
    }

    /* In place of what the memory holds now. */
    void restore(llama_memory_i &memory) const {
        if (seq_id_ < 0) {
            memory.clear(false);
        } else {
            memory.seq_rm(seq_id_, -1, -1);
        }
        reader io(bytes_);
        memory.state_read(io, seq_id_, flags_);
    }

  private:
    struct writer : llama_io_write_i {
        explicit writer(std::vector<uint8_t> &bytes) : bytes(bytes) {}
        std::vector<uint8_t> &bytes;
        void write(const void *src, size_t size) override {
            bytes.insert(bytes.end(), (const uint8_t *)src, (const uint8_t *)src + size);
        }
        void write_tensor(ggml_tensor *tensor, size_t offset, size_t size) override {
            bytes.resize(bytes.size() + size);
            ggml_backend_tensor_get(tensor, bytes.data() + bytes.size() - size, offset, size);
        }
        size_t n_bytes() override { return bytes.size(); }
    };

    struct reader : llama_io_read_i {
        explicit reader(const std::vector<uint8_t> &bytes) : bytes(bytes) {}
        const std::vector<uint8_t> &bytes;
        size_t at = 0;
        const uint8_t *take(size_t size) {
            if (size > n_left()) {
                throw std::runtime_error("xquant: a snapshot is too short");
            }
            at += size;
            return bytes.data() + at - size;
        }
        void read(void *dst, size_t size) override { memcpy(dst, take(size), size); }
        void read_tensor(ggml_tensor *tensor, size_t offset, size_t size) override {
            ggml_backend_tensor_set(tensor, take(size), offset, size);
        }
        size_t n_bytes() override { return at; }
        size_t n_left() override { return bytes.size() - at; }
    };

    llama_seq_id seq_id_;
    llama_state_seq_flags flags_;
    std::vector<uint8_t> bytes_;
};

} // namespace xquant
