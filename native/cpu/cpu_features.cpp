/* cpu_features.cpp: asks the CPU and the operating system. */
#include "cpu_features.h"

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace xq {

#if defined(__x86_64__)
namespace {

struct registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

/* All zero where the CPU does not know the leaf. */
registers cpuid(uint32_t leaf, uint32_t part = 0) {
    registers r;
    if (!__get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx, &r.edx)) {
        return registers();
    }
    return r;
}

constexpr uint32_t bit(int i) {
    return 1u << i;
}

bool has(uint32_t bits, uint32_t wanted) {
    return (bits & wanted) == wanted;
}

/* Bits of XCR0 that the operating system saves. */
enum : uint32_t { SAVES_AVX = 3u << 1, SAVES_AVX512 = SAVES_AVX | 7u << 5, SAVES_AMX = 3u << 17 };

bool saves(uint32_t state) {
    if (!has(cpuid(1).ecx, bit(27))) { // without OSXSAVE there is no XGETBV
        return false;
    }
    uint32_t eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return has(eax, state);
}

} // namespace

bool has_sse42() {
    const uint32_t ssse3 = bit(9), sse41 = bit(19), sse42 = bit(20), popcnt = bit(23);
    return has(cpuid(1).ecx, ssse3 | sse41 | sse42 | popcnt);
}

bool has_avx2() {
    const uint32_t fma = bit(12), avx = bit(28), f16c = bit(29), avx2 = bit(5);
    return has(cpuid(1).ecx, fma | avx | f16c) && saves(SAVES_AVX) && has(cpuid(7).ebx, avx2);
}

bool has_bmi2() {
    return has(cpuid(7).ebx, bit(8));
}

bool has_avxvnni() {
    return has_avx2() && has(cpuid(7, 1).eax, bit(4));
}

bool has_avx512() {
    const uint32_t f = bit(16), dq = bit(17), cd = bit(28), bw = bit(30), vl = bit(31), vnni = bit(11);
    const registers r = cpuid(7);
    return has_avx2() && saves(SAVES_AVX512) && has(r.ebx, f | dq | cd | bw | vl) && has(r.ecx, vnni);
}

bool has_amx() {
    const uint32_t vbmi = bit(1), tile = bit(24), int8 = bit(25), bf16 = bit(5);
    const registers r = cpuid(7);
    return has_avx512() && saves(SAVES_AMX) && has(r.ecx, vbmi) && has(r.edx, tile | int8) &&
           has(cpuid(7, 1).eax, bf16);
}
#elif defined(__aarch64__)
/* The kernel of the operating system says what it found and lets programs use. */
#if defined(__linux__)
bool has_dotprod() {
    return getauxval(AT_HWCAP) & 1ul << 20; // HWCAP_ASIMDDP, which old headers lack
}
bool has_fp16() {
    return getauxval(AT_HWCAP) & 1ul << 10; // HWCAP_ASIMDHP
}
bool has_i8mm() {
    return has_dotprod() && (getauxval(AT_HWCAP2) & 1ul << 13); // HWCAP2_I8MM
}
#elif defined(__APPLE__)
static bool has_feature(const char *name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() {
    return has_feature("hw.optional.arm.FEAT_DotProd");
}
bool has_fp16() {
    return has_feature("hw.optional.arm.FEAT_FP16");
}
bool has_i8mm() {
    return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM");
}
#else
bool has_dotprod() {
    return false;
}
bool has_fp16() {
    return false;
}
bool has_i8mm() {
    return false;
}
#endif
#endif

} // namespace xq
