/* xquant-metadata.h: the plan that a GGUF file carries.
 *
 * Keys, one entry of an array for each layer of the model (README, "Calibrate"):
 *
 *     xquant.version  u32, 1               xquant.window, xquant.pinned  i32
 *     xquant.{k,v}.bits, .group, .owner  i32[]     .eta  f32[]     .fit, .scale  string[]
 *     xquant.v.rotate  bool[]              xquant.v.source  i32[], the layer that a map reads, or -1
 *     xquant.map.N.heads   i32[KV head of layer N], the KV head of the source that each is predicted from
 *     xquant.map.N.weight  u16[KV head][e of the source][e], bits of F16 numbers
 *
 * The file is not trusted: type and length of every key are checked before it is read.
 */
#pragma once

#include "xquant.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct gguf_context;
struct llama_model_kv_override;

namespace xquant {

/* How the values of one layer are predicted from those of its source. */
struct value_map {
    std::vector<int32_t> heads; /* [KV head] of the source */
    std::vector<float> weight;  /* [KV head][e of the source][e] */
};

struct metadata {
    std::map<std::string, std::string> given; /* kv_overrides whose key starts with "xquant." */
    bool present = false;                     /* the file carries a plan */
    std::string error;                        /* why the plan cannot be used */
    int32_t window = 0, pinned = 0;
    std::vector<xq_layer> layers; /* [layer of the model] */
    std::map<int32_t, value_map> maps;
    double expected_kld = -1.0; /* negative: not measured */

    /* Whether a cache follows the file's plan, and not a preset. */
    bool rules() const { return present && given.count("xquant.preset") == 0; }
};

/* The plan of a model's file, or of the file that the override xquant.plan_file names. */
std::shared_ptr<const metadata>
read_metadata(const gguf_context *file, const std::unordered_map<std::string, llama_model_kv_override> &overrides);

/* The plan of a file; null: it has none, or cannot be read. */
std::shared_ptr<const metadata> read_plan_file(const std::string &path);

} // namespace xquant
