"""xquant-gguf serve: llama_cpp's OpenAI-compatible server with our Llama; needs the extra `server`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import llama_cpp
import uvicorn
import yaml
from fastapi import Depends, HTTPException
from llama_cpp.server import app as server
from llama_cpp.server.cli import add_args_from_model, parse_model_from_args
from llama_cpp.server.model import LlamaProxy
from llama_cpp.server.settings import ConfigFileSettings, ModelSettings, ServerSettings
from pydantic import Field

from xquant_gguf import session
from xquant_gguf.kv_types import LLAMA_TYPES
from xquant_gguf.llama import Llama
from xquant_gguf.plan import preset_names

KV_TYPE = f"One of {', '.join((*preset_names(), *LLAMA_TYPES))} (default: xquant)."


class Served(Llama):
    """A Llama that always has a word on its cache ready, also while another thread decodes.

    told: what kv_cache_info said of the whole cache, without its layers, after the last tokens.
    """

    def __init__(self, model_path: str, **options: Any) -> None:
        super().__init__(model_path, **_known(options))
        self._tell()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Served:
        return super().from_pretrained(*args, **_known(options))

    def check_grammar(self, grammar: llama_cpp.LlamaGrammar) -> None:
        """As Llama's; what a client sent is the client's error."""
        try:
            super().check_grammar(grammar)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    def eval(self, tokens: Sequence[int]) -> None:
        super().eval(tokens)
        self._tell()

    def _tell(self) -> None:
        self.told = {name: value for name, value in self.kv_cache_info().items() if not isinstance(value, list)}


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Without what llama_cpp's server hands to Llama although Llama does not know it."""
    return {name: value for name, value in options.items() if name != "mul_mat_q"}


class Model(ModelSettings):
    """Settings of one model: llama_cpp's, and the KV cache."""

    # Optional, since llama_cpp's parser of options does not know "str | None"
    kv_type: Optional[str] = Field(default=None, description=KV_TYPE)  # noqa: UP045
    kv_plan: Optional[str] = Field(default=None, description="JSON file with a plan of the KV cache.")  # noqa: UP045

    def llama(self) -> type[Llama]:
        """What llama_cpp's server is to make instead of llama_cpp.Llama."""
        settings = self

        class Configured(Served):
            def __init__(self, model_path: str, **options: Any) -> None:
                if "flash_attn" not in settings.model_fields_set:
                    del options["flash_attn"]  # the server's default is no, which contradicts a quantized cache
                if settings.rpc_servers is not None and "n_gpu_layers" not in settings.model_fields_set:
                    del options["n_gpu_layers"]  # likewise: none for workers
                super().__init__(
                    model_path, **{**options, "kv_type": settings.cache_of(model_path), "kv_plan": settings.kv_plan}
                )

        return Configured

    def cache_of(self, model_path: str) -> str | None:
        """The kv_type that was asked for, or else ours; F16, with a warning, for a model that cannot have it."""
        if self.kv_type or self.kv_plan or self.type_k is not None or self.type_v is not None:
            return self.kv_type
        with session.Model(model_path, weights=False) as model:
            try:
                model.session("xquant", n_ctx=256).close()
            except ValueError as error:
                warnings.warn(f"{error}: it is served with an F16 cache", stacklevel=2)
                return "f16"
        return "xquant"


class Config(ConfigFileSettings):
    """A configuration file: settings of the server and of its models."""

    models: list[Model] = Field(default=[], description="Model configs")


class Proxy(LlamaProxy):
    """Loads models when they are asked for, as llama_cpp's server does, with their KV caches.

    current: the name of the model that was loaded last, and the model.
    """

    current: tuple[str, Served]

    def load_llama_from_model_settings(self, settings: Model) -> Served:
        with _in_place_of(llama_cpp, "Llama", settings.llama()):
            llama: Served = LlamaProxy.load_llama_from_model_settings(settings)
        self.current = settings.model_alias, llama
        print(f"xquant-gguf: {settings.model_alias}: {json.dumps(llama.told)}", file=sys.stderr, flush=True)
        return llama


@contextmanager
def _in_place_of(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module's name stands for something else meanwhile: llama_cpp's server knows no other way to another Llama."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


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
    server, models = _given(argv)
    if "interrupt_requests" not in server.model_fields_set:
        server.interrupt_requests = False  # llama_cpp's default ends an answer when somebody else asks
    return server, models


def _given(argv: Sequence[str]) -> tuple[ServerSettings, list[Model]]:
    args = parser().parse_args([_underscores(word) for word in argv])
    path = os.environ.pop("CONFIG_FILE", args.config_file)  # llama_cpp would read it again, with its own models
    if path is None:
        args.model = args.path or args.model
        if not args.model and "MODEL" not in os.environ:
            raise ValueError("serve: name a model, or a --config_file")
        return parse_model_from_args(ServerSettings, args), [parse_model_from_args(Model, args)]
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith((".yaml", ".yml")):
        text = json.dumps(yaml.safe_load(text))
    config = Config.model_validate_json(text)
    return ServerSettings.model_validate(config.model_dump(exclude={"models"}, exclude_unset=True)), config.models


def _underscores(word: str) -> str:
    """--n-ctx as --n_ctx, which is how llama_cpp's server spells options."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def application(server_settings: ServerSettings, models: Sequence[Model]) -> Any:
    """llama_cpp's FastAPI application over our Llama; the first model is loaded at once."""
    for settings in models:  # now rather than at the first request, but for models that are not here yet
        if Path(settings.model).exists():
            settings.kv_type = settings.cache_of(settings.model)
    proxy = Proxy(list(models))
    with _in_place_of(server, "LlamaProxy", lambda models: proxy):
        app = server.create_app(server_settings=server_settings, model_settings=list(models))

    async def kv_cache() -> dict[str, Any]:  # takes no lock: whoever waits for it ends the answer that streams now
        model, llama = proxy.current
        return {"model": model, **llama.told}

    secured = [Depends(server.authenticate)]
    app.add_api_route("/extras/kv_cache", kv_cache, summary="KV cache", tags=["Extras"], dependencies=secured)
    return app


def serve(argv: Sequence[str]) -> int:
    """Serves until it is stopped; argv: options as llama_cpp.server takes them."""
    server_settings, models = settings_of(argv)
    uvicorn.run(
        application(server_settings, models),
        host=server_settings.host,  # options first, then $HOST: its settings read the environment themselves
        port=server_settings.port,
        ssl_keyfile=server_settings.ssl_keyfile,
        ssl_certfile=server_settings.ssl_certfile,
    )
    return 0
