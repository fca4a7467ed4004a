/* dispatch.cpp: which kernel set is in force, and the error message of a thread.
 *
 * A set may run if the CPU has its instructions and the operating system saves their registers (XGETBV; on ARM it says
 * so itself).  The best such set is taken, unless XQUANT_KERNELS or xq_kernels_force names one.
 */
#include "cpu_features.h"
#include "kernels.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace xq {

static thread_local char message[512];

int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    return status;
}

/* ---- features ---- */

#if defined(__x86_64__)
/* Bits of XCR0 that the operating system saves: 1 << 1 SSE, 1 << 2 AVX, 7 << 5 the registers of AVX-512. */
static uint64_t saved_state() {
    uint32_t eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (uint64_t)edx << 32 | eax;
}

bool has_avx2() {
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        return false;
    }
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const uint32_t needed = fma | osxsave | avx | f16c;
    if ((ecx & needed) != needed || (saved_state() & 6) != 6) {
        return false;
    }
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & 1u << 5);
}

bool has_avxvnni() {
    uint32_t eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
}

bool has_avx512() {
    uint32_t eax, ebx, ecx, edx;
    if (!has_avx2() || (saved_state() & 0xe6) != 0xe6 || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        return false;
    }
    const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
    const uint32_t needed = f | dq | bw | vl;
    return (ebx & needed) == needed && (ecx & vnni);
}
#elif defined(__aarch64__)
/* The kernel of the operating system says what it found and lets programs use. */
#if defined(__linux__)
bool has_dotprod() {
    return getauxval(AT_HWCAP) & 1ul << 20; // HWCAP_ASIMDDP, which old headers lack
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
bool has_i8mm() {
    return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM");
}
#else
bool has_dotprod() {
    return false;
}
bool has_i8mm() {
    return false;
}
#endif
#endif

/* ---- sets ---- */

static const kernel_set *const sets[] = {
#if defined(__x86_64__)
    &kernels_avx512,
#ifdef XQ_HAS_AVXVNNI
    &kernels_avxvnni,
#endif
    &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon_i8mm,
    &kernels_neon_dotprod,
    &kernels_neon,
#endif
    &kernels_scalar,
};

static const kernel_set *find(const char *name) {
    for (const kernel_set *set : sets) {
        if (strcmp(set->name, name) == 0) {
            return set;
        }
    }
    return nullptr;
}

static const std::string &available() {
    static const std::string names = [] {
        std::string list;
        for (const kernel_set *set : sets) {
            if (set->supported()) {
                list += (list.empty() ? "" : ",") + std::string(set->name);
            }
        }
        return list;
    }();
    return names;
}

/* The named set if it can run; else null and a message that says where the name came from. */
static const kernel_set *checked(const char *name, const char *from) {
    const kernel_set *set = find(name);
    if (!set || !set->supported()) {
        fail(XQ_ERR_KERNELS, "%s: kernel set \"%.32s\" %s; this machine can run %s", from, name,
             set ? "needs instructions that this machine lacks" : "is unknown", available().c_str());
        return nullptr;
    }
    return set;
}

static const kernel_set *choose() {
    const char *name = getenv("XQUANT_KERNELS");
    if (name && *name) {
        return checked(name, "XQUANT_KERNELS");
    }
    for (const kernel_set *set : sets) {
        if (set->supported()) {
            return set;
        }
    }
    return &kernels_scalar;
}

static std::atomic<const kernel_set *> active{nullptr};

const kernel_set *active_kernels() {
    const kernel_set *set = active.load(std::memory_order_acquire);
    if (!set) {
        set = choose();
        active.store(set, std::memory_order_release);
    }
    return set;
}

} // namespace xq

using namespace xq;

const char *xq_error(void) {
    return message;
}

const char *xq_kernels_available(void) {
    return available().c_str();
}

const char *xq_kernels(void) {
    const kernel_set *set = active_kernels();
    return set ? set->name : nullptr;
}

int xq_kernels_force(const char *name) {
    if (!name) {
        return fail(XQ_ERR_ARGUMENT, "xq_kernels_force: null");
    }
    const kernel_set *set = checked(name, "xq_kernels_force");
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    active.store(set, std::memory_order_release);
    return XQ_OK;
}

uint64_t xq_kernels_calls(const char *name) {
    const kernel_set *set = name ? find(name) : nullptr;
    return set ? set->calls->load(std::memory_order_relaxed) : 0;
}
