/* cpu-variant-entry.cpp: by which cpu-variant.cpp enters a build of ggml-cpu.  libggml-cpu lacks this name; its
 * functions are called, in programs, in place of those that a library shows under the same names. */
#include "cpu-variant.h"
#include "ggml-cpu.h"

ggml_backend_reg_t xquant_cpu_variant() {
    return ggml_backend_cpu_reg();
}
