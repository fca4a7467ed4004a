/* cpu-variant.h: which build of ggml-cpu runs; for ggml's registry of backends. */
#pragma once

#include "ggml-backend.h"

/* The CPU backend of the best build that this machine can run, or of the one that XQUANT_CPU_VARIANT names; the same at
 * every call.  Null: there is none, and the log says why. */
ggml_backend_reg_t xquant_cpu_reg();

/* The one name that a build beside libggml-cpu shows: its CPU backend. */
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t xquant_cpu_variant();
