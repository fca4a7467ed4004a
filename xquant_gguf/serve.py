"""xquant-gguf serve: llama_cpp's OpenAI-compatible server with our Llama; needs the extra `server`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional
from unittest.mock import patch

import uvicorn
import yaml
from fastapi import Depends
from llama_cpp.server import app as server
from llama_cpp.server.cli import add_args_from_model, parse_model_from_args
from llama_cpp.server.model import LlamaProxy
from llama_cpp.server.settings import ConfigFileSettings, ModelSettings, ServerSettings
from pydantic import Field

from xquant_gguf.llama import LLAMA_TYPES, Llama, llama_cpp
from xquant_gguf.plan import preset_names

KV_TYPE = f"One of {', '.join((*preset_names(), *LLAMA_TYPES))} (default: xquant)."


class Model(ModelSettings):
    """Settings of one model: llama_cpp's, and the KV cache."""

    # Optional, since llama_cpp's parser of options does not know "str | None"
    kv_type: Optional[str] = Field(default=None, description=KV_TYPE)  # noqa: UP045
    kv_plan: Optional[str] = Field(default=None, description="JSON file with a plan of the KV cache.")  # noqa: UP045

    def llama(self) -> type[Llama]:
        """What llama_cpp's server is to make instead of llama_cpp.Llama."""
        settings = self

        class Configured(Llama):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                if "flash_attn" not in settings.model_fields_set:
                    del kwargs["flash_attn"]  # the server's default is no, which contradicts a quantized cache
                kv_type = settings.kv_type
                if kv_type is None and settings.kv_plan is None and settings.type_k is None and settings.type_v is None:
                    kv_type = "xquant"
                super().__init__(*args, kv_type=kv_type, kv_plan=settings.kv_plan, **kwargs)

        return Configured


class Config(ConfigFileSettings):
    """A configuration file: settings of the server and of its models."""

    models: list[Model] = Field(default=[], description="Model configs")


class Proxy(LlamaProxy):
    """Loads models when they are asked for, as llama_cpp's server does, with their KV caches."""

    @staticmethod
    def load_llama_from_model_settings(settings: Model) -> Llama:
        with patch.object(llama_cpp, "Llama", settings.llama()):
            llama = LlamaProxy.load_llama_from_model_settings(settings)
        print(f"xquant-gguf: {settings.model_alias}: {json.dumps(summary(llama))}", file=sys.stderr, flush=True)
        return llama


def summary(llama: Llama) -> dict[str, Any]:
    """What kv_cache_info says of the whole cache, without its layers."""
    return {name: value for name, value in llama.kv_cache_info().items() if not isinstance(value, list)}


def parser() -> argparse.ArgumentParser:
    """All options of llama_cpp.server, and ours."""
    out = argparse.ArgumentParser(
        prog="xquant-gguf serve",
        description="OpenAI-compatible server with an XQuant KV cache; /extras/kv_cache tells what the cache holds.",
    )
    out.add_argument("path", nargs="?", metavar="MODEL", help="GGUF file")
    add_args_from_model(out, Model)
    add_args_from_model(out, ServerSettings)
    out.add_argument("--config_file", help="JSON or YAML file with settings of the server and of several models.")
    return out


def settings_of(argv: Sequence[str]) -> tuple[ServerSettings, list[Model]]:
    """Settings from the command line, or from the configuration file that it or $CONFIG_FILE names."""
    args = parser().parse_args([_underscores(word) for word in argv])
    path = os.environ.pop("CONFIG_FILE", args.config_file)  # llama_cpp would read it again, with its own models
    if path is None:
        args.model = args.path or args.model
        if not args.model and "MODEL" not in os.environ:
            raise ValueError("serve: name a model, or a --config_file")
        return parse_model_from_args(ServerSettings, args), [parse_model_from_args(Model, args)]
    text = Path(path).read_text()
    if path.endswith((".yaml", ".yml")):
        text = json.dumps(yaml.safe_load(text))
    config = Config.model_validate_json(text)
    return ServerSettings.model_validate(config.model_dump(exclude={"models"})), config.models


def _underscores(word: str) -> str:
    """--n-ctx as --n_ctx, which is how llama_cpp's server spells options."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def application(server_settings: ServerSettings, models: Sequence[Model]) -> Any:
    """llama_cpp's FastAPI application over our Llama; the first model is loaded at once."""
    with patch.object(server, "LlamaProxy", Proxy):
        app = server.create_app(server_settings=server_settings, model_settings=list(models))

    async def kv_cache(llama_proxy: Any = Depends(server.get_llama_proxy)) -> dict[str, Any]:  # noqa: B008
        return {"model": llama_proxy._current_model_alias, **summary(llama_proxy._current_model)}

    secured = [Depends(server.authenticate)]
    app.add_api_route("/extras/kv_cache", kv_cache, summary="KV cache", tags=["Extras"], dependencies=secured)
    return app


def serve(argv: Sequence[str]) -> int:
    """Serves until it is stopped; argv: options as llama_cpp.server takes them."""
    server_settings, models = settings_of(argv)
    uvicorn.run(
        application(server_settings, models),
        host=os.getenv("HOST", server_settings.host),
        port=int(os.getenv("PORT", server_settings.port)),
        ssl_keyfile=server_settings.ssl_keyfile,
        ssl_certfile=server_settings.ssl_certfile,
    )
    return 0
