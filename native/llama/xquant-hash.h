/* xquant-hash.h: a 64-bit hash of bytes, against mix-ups and accidents, not against forgery.
 *
 * FNV-1a over words of eight bytes, with the high half folded into the low one after each: any change within one word
 * changes the value.  It does not depend on how the bytes were cut into pieces.
 */
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace xquant {

class hasher {
  public:
    void add(const void *data, size_t size) {
        const auto *bytes = (const uint8_t *)data;
        for (; size > 0 && n_ % sizeof(uint64_t) != 0; --size) {
            add_byte(*bytes++);
        }
        for (; size >= sizeof(uint64_t); size -= sizeof(uint64_t), bytes += sizeof(uint64_t)) {
            memcpy(&word_, bytes, sizeof(word_));
            n_ += sizeof(uint64_t);
            value_ = mixed(word_);
            word_ = 0;
        }
        for (; size > 0; --size) {
            add_byte(*bytes++);
        }
    }
    template <typename T> void add(const T &number) { add(&number, sizeof(number)); }

    uint64_t value() const { return mixed(word_ ^ n_ << 56); }

  private:
    void add_byte(uint8_t byte) {
        word_ |= (uint64_t)byte << (n_ % sizeof(uint64_t) * 8);
        if (++n_ % sizeof(uint64_t) == 0) {
            value_ = mixed(word_);
            word_ = 0;
        }
    }
    uint64_t mixed(uint64_t word) const {
        const uint64_t product = (value_ ^ word) * 0x100000001b3u;
        return product ^ product >> 32;
    }

    uint64_t value_ = 0xcbf29ce484222325u, word_ = 0, n_ = 0;
};

} // namespace xquant
