#!/usr/bin/env bash
# The `llm` command with the XQuant cache, through its plugin llm-gguf: one environment variable, no other change.
#
#     examples/llm_command.sh MODEL.gguf "What is the capital of France?"
#
# Needs: pip install llm llm-gguf
set -euo pipefail
llm gguf register-model xquant-example "$1" > /dev/null
XQUANT_KV_TYPE=xquant llm -m gguf/xquant-example "$2"
