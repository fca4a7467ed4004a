/* cpu-variant.cpp: chooses among the builds of ggml-cpu, each for the instructions of other CPUs.
 *
 * XQUANT_CPU_VARIANTS names them, the best first.  The last is libggml-cpu, which is linked; the others
 * (native/llama/cpu_variants.cmake) lie beside libggml, under names that llama.cpp's own search for backends does not
 * know.  So whoever asks for the first backend of a process, in whatever way, finds one CPU backend, which is chosen
 * here.  None is loaded, not even to ask it, before CPU and operating system are known to run it.
 */
#include "cpu-variant.h"

#include "cpu_features.h"
#include "ggml-backend-dl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "xquant_llama.h"

#include <cstdlib>
#include <string>
#include <vector>

namespace {

struct variant {
    std::string name;
    bool (*runs)();
};

const variant known[] = {
#if defined(__x86_64__)
    {"amx", [] { return xq::has_amx() && xq::has_bmi2(); }},
    {"avx512", [] { return xq::has_avx512() && xq::has_bmi2(); }},
    {"avxvnni", [] { return xq::has_avxvnni() && xq::has_bmi2(); }},
    {"avx2", [] { return xq::has_avx2() && xq::has_bmi2(); }},
    {"sse42", xq::has_sse42},
#elif defined(__aarch64__)
    {"neon-i8mm", [] { return xq::has_i8mm() && xq::has_fp16(); }},
    {"neon-dotprod", [] { return xq::has_dotprod() && xq::has_fp16(); }},
    {"neon", [] { return true; }},
#endif
    {"built-in", [] { return true; }}, // whatever the options of the build say
};

std::vector<variant> built() {
    std::vector<variant> list;
    std::string names = XQUANT_CPU_VARIANTS ",";
    for (size_t end; (end = names.find(',')) != std::string::npos; names.erase(0, end + 1)) {
        for (const variant &v : known) {
            if (v.name == names.substr(0, end)) {
                list.push_back(v);
            }
        }
    }
    return list;
}

/* The file of this library; empty if that is not known. */
fs::path this_library() {
#ifdef _WIN32
    HMODULE here;
    std::vector<wchar_t> path(1 << 15); // the longest that Windows has
    const DWORD how = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (!GetModuleHandleExW(how, (LPCWSTR)xquant_cpu_reg, &here) ||
        !GetModuleFileNameW(here, path.data(), (DWORD)path.size())) {
        return {};
    }
    return path.data();
#else
    Dl_info here;
    return dladdr((void *)xquant_cpu_reg, &here) ? here.dli_fname : "";
#endif
}

/* The CPU backend of a library beside this one; null if it cannot be loaded. */
ggml_backend_reg_t load(const std::string &name) {
    fs::path path = this_library();
    if (path.empty()) {
        return nullptr;
    }
    path.replace_filename(LIBRARY_PREFIX "xquant-cpu-" + name + LIBRARY_SUFFIX);
    // never closed: its threads and buffers live as long as the process
    dl_handle *library = dl_load_library(path);
    auto *reg = library ? (decltype(&xquant_cpu_variant))dl_get_sym(library, "xquant_cpu_variant") : nullptr;
    if (!reg) {
        GGML_LOG_WARN("xquant: %s cannot be loaded: %s\n", path.u8string().c_str(), dl_error());
        return nullptr;
    }
    return reg();
}

struct choice {
    std::string name;
    ggml_backend_reg_t reg;
    std::string problem; // why there is none
};

choice choose() {
    const std::vector<variant> variants = built();
    const char *wanted = getenv("XQUANT_CPU_VARIANT");
    std::string can;
    for (const variant &v : variants) {
        if (!v.runs()) {
            continue;
        }
        can += (can.empty() ? "" : ",") + v.name;
        if (wanted && *wanted && v.name != wanted) {
            continue;
        }
        const bool linked = &v == &variants.back();
        if (ggml_backend_reg_t reg = linked ? ggml_backend_cpu_reg() : load(v.name)) {
            if (!linked) {
                GGML_LOG_INFO("xquant: llama.cpp's CPU kernels are those for %s\n", v.name.c_str());
            }
            return {v.name, reg, ""};
        }
    }
    const std::string name = wanted && *wanted ? wanted : "";
    const std::string problem = name.empty() ? "llama.cpp's CPU kernels were built for " XQUANT_CPU_VARIANTS
                                               ", none of which this CPU runs"
                                             : "XQUANT_CPU_VARIANT: \"" + name.substr(0, 32) +
                                                   "\" is not one of llama.cpp's CPU kernels that "
                                                   "this build has and this machine can run, which are " +
                                                   (can.empty() ? "none" : can);
    GGML_LOG_ERROR("xquant: %s\n", problem.c_str());
    return {"", nullptr, problem};
}

const choice &chosen() {
    static const choice made = choose();
    return made;
}

} // namespace

ggml_backend_reg_t xquant_cpu_reg() {
    return chosen().reg;
}

const char *xquant_llama_cpu_variant(const char **problem) {
    const choice &made = chosen();
    if (made.reg) {
        return made.name.c_str();
    }
    *problem = made.problem.c_str();
    return nullptr;
}
