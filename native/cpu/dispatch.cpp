/* dispatch.cpp: which kernel set is in force, and the error message of a thread.
 *
 * A set may run if the CPU and the operating system let it (cpu_features.h).  The best such set is taken, unless
 * XQUANT_KERNELS or xq_kernels_force names one.
 */
#include "cpu_features.h"
#include "kernels.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace xq {

static thread_local char message[512];

int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    return status;
}

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
