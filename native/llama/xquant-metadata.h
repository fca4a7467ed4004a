/* xquant-metadata.h: the plan that a GGUF file, or a GGUF block in memory, carries.
 *
 * Keys, one entry of an array for each layer of the model:
 *
 *     xquant.version  u32, 1               xquant.window, xquant.pinned  i32
 *     xquant.open_bits  i32, 8 or 16; without it 16, as all files were written for that came before the key
 *     xquant.{k,v}.bits, .group, .owner  i32[]     .eta  f32[]     .fit, .scale  string[]
 *     xquant.v.rotate  bool[]              xquant.v.source  i32[], the layer that a map reads, or -1
 *     xquant.k.rotate  bool[], may be missing: none; true does not count where keys have a norm
 *     xquant.map.N.heads   i32[KV head of layer N], the KV head of the source that each is predicted from
 *     xquant.map.N.weight  u16[KV head][e of the source][e], bits of F16 numbers
 *     xquant.transform.N.weight  u16[KV head][d][d], bits of F16 numbers, may be missing: what keys of layer N are
 *                                multiplied by (xquant-transform.h)
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
struct llama_model_loader;

namespace xquant {

/* How the values of one layer are predicted from those of its source. */
struct value_map {
    std::vector<int32_t> heads; /* [KV head] of the source */
    std::vector<float> weight;  /* [KV head][e of the source][e] */
};

/* A plan as a GGUF block says it. */
struct metadata {
    bool present = false; /* there is one */
    std::string error;    /* why it cannot be used */
    int32_t window = 0, pinned = 0, open_bits = 16;
    std::vector<xq_layer> layers; /* [layer of the model] */
    std::map<int32_t, value_map> maps;
    std::map<int32_t, std::vector<float>> transforms; /* [KV head][d][d] */
    double expected_kld = -1.0;                       /* negative: not measured */
};

/* What a model's file and the kv_overrides of its load say. */
struct model_metadata {
    std::shared_ptr<const metadata> plan;     /* of the file */
    std::map<std::string, std::string> given; /* kv_overrides whose key starts with "xquant." */
    uint64_t weights = 0;                     /* tells weights apart: see read_metadata() */
    /* of the tensors: what xquant-shared.cpp and xquant-rotation.cpp want to know */
    std::map<std::string, std::vector<float>> vectors;
};

using overrides = std::unordered_map<std::string, llama_model_kv_override>;

/* Reads a file that is being loaded.  `weights` is a hash of the tensors' names, types and shapes and of a few bytes of
 * some of them, so that a state of one model is not taken for one of another. */
std::shared_ptr<const model_metadata> read_metadata(llama_model_loader &loader);
/* kv_overrides that are ours; throws if one is of a type that it cannot have. */
std::map<std::string, std::string> read_overrides(const overrides &given);

/* The plan of a file, or of a GGUF block in memory, which may be cut off or anything else. */
metadata read_plan(const gguf_context *file);
metadata read_plan(const void *block, size_t size);

} // namespace xquant
