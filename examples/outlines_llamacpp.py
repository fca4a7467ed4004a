"""outlines with the XQuant cache: an answer that fits a pydantic model, and one of a few words.

    python examples/outlines_llamacpp.py MODEL.gguf

Needs: pip install outlines numba
"""

from __future__ import annotations

import sys
from typing import Literal

import outlines
from pydantic import BaseModel, Field

from xquant_gguf import Llama


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


def main() -> None:
    llm = Llama(sys.argv[1], kv_type="xquant", n_ctx=4096, verbose=False)
    model = outlines.from_llamacpp(llm)
    print(City.model_validate_json(model("What is the capital of France?", City, max_tokens=80, temperature=0.0)))
    print(model("Is Paris in France or in Spain?", Literal["France", "Spain"], temperature=0.0))
    llm.close()


if __name__ == "__main__":
    main()
