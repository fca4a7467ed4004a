"""Workers: rpc-server processes, on this or other machines, that hold layers of a model and their cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from xquant_gguf import fork
from xquant_gguf.log import errors


def names(servers: str | Sequence[str]) -> list[str]:
    """host:port of each worker; ValueError if one is something else."""
    found = [name.strip() for name in (servers.split(",") if isinstance(servers, str) else servers)]
    for name in found:
        host, colon, port = name.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"rpc_servers: {name!r} must be host:port")
    if not found:
        raise ValueError("rpc_servers is empty, must name a worker as host:port")
    return found


def devices(servers: str | Sequence[str]) -> Any:
    """The devices of workers, in their order, and behind them this machine's GPUs, as llama_model_params.devices takes
    them: a ctypes array that must live as long as the model is being loaded.

    servers: host:port, several with commas or as a list.  ValueError names a worker that does not answer.
    """
    ffi, lib = fork.load()
    rpc = lib.ggml_backend_reg_by_name(b"RPC")
    add = ffi.cast(
        "void * (*)(const char *)", lib.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_add_server")
    )
    free, total = ffi.new("size_t *"), ffi.new("size_t *")
    found = []
    for name in names(servers):
        with errors() as said:
            reg = add(name.encode())  # one that has answered before is not asked again
            if reg:
                lib.ggml_backend_dev_memory(lib.ggml_backend_reg_dev_get(reg, 0), free, total)
        if not reg or total[0] == 0:
            raise ValueError(f"rpc_servers: no worker answers at {name}: {'; '.join(said) or 'it has no devices'}")
        found += [lib.ggml_backend_reg_dev_get(reg, i) for i in range(lib.ggml_backend_reg_dev_count(reg))]
    found += fork.gpus()
    return (ctypes.c_void_p * (len(found) + 1))(*(int(ffi.cast("intptr_t", device)) for device in found))
