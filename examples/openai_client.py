"""The openai client against `xquant-gguf server`: a streamed answer, and a call of a tool.

    xquant-gguf server MODEL.gguf -c 32768 -np 4 --port 8080
    python examples/openai_client.py http://127.0.0.1:8080/v1

Needs: pip install openai
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def main() -> None:
    with OpenAI(base_url=sys.argv[1], api_key="none") as client:
        talk = [{"role": "user", "content": "What is the capital of France?"}]
        stream = client.chat.completions.create(model="any", messages=talk, max_tokens=30, temperature=0, stream=True)
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()

        talk = [{"role": "user", "content": "What is the weather in Paris?"}]
        answer = client.chat.completions.create(
            model="any", messages=talk, max_tokens=100, tools=[WEATHER], tool_choice="required", temperature=0
        )
        message = answer.choices[0].message
        for call in message.tool_calls or []:
            print("calls", call.function.name, json.loads(call.function.arguments))
        if not message.tool_calls:  # small models may talk instead
            print("calls nothing, says:", message.content)


if __name__ == "__main__":
    main()
