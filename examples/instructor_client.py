"""instructor against `xquant-gguf server`: an answer that fits a pydantic model, whole and as it grows.

    xquant-gguf server MODEL.gguf -c 32768 -np 4 --port 8080
    python examples/instructor_client.py http://127.0.0.1:8080/v1

Needs: pip install instructor
"""

from __future__ import annotations

import sys
from typing import Any

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


def main() -> None:
    with OpenAI(base_url=sys.argv[1], api_key="none") as openai:
        client = instructor.from_openai(openai, mode=instructor.Mode.JSON_SCHEMA)
        request: dict[str, Any] = {"model": "any", "response_model": City, "max_tokens": 80, "temperature": 0}
        request["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
        print(client.chat.completions.create(**request))
        for part in client.chat.completions.create_partial(**request):
            print("so far", part)


if __name__ == "__main__":
    main()
