"""Which libraries those of a wheel for Windows or macOS need: what auditwheel says of wheels for Linux."""

from __future__ import annotations

from pathlib import Path

import pefile
from macholib.MachO import MachO

WINDOWS = ("api-ms-win-crt-", "kernel32.dll", "advapi32.dll", "bcrypt.dll", "ntdll.dll", "shell32.dll", "ws2_32.dll")
"""What Windows 10 has of what we need."""
MACOS = ("/usr/lib/libSystem.B.dylib",)


def needed(file: Path) -> list[str]:
    """Names of the libraries that a DLL, a dylib or a program for these systems loads; none: it is something else."""
    head = file.read_bytes()[:4]
    if head[:2] == b"MZ":
        image = pefile.PE(file, fast_load=True)
        image.parse_data_directories(pefile.DIRECTORY_ENTRY["IMAGE_DIRECTORY_ENTRY_IMPORT"])
        return [entry.dll.decode() for entry in image.DIRECTORY_ENTRY_IMPORT]
    if head == b"\xcf\xfa\xed\xfe":  # 64 bits, little-endian
        (header,) = MachO(str(file)).headers
        return [name for _, _, name in header.walkRelocatables()]
    return []


def lacking(folder: Path) -> list[str]:
    """What libraries and programs of a folder need that is neither in it nor in the system: `file: name`."""
    there = {file.name.lower() for file in folder.iterdir()}
    return [
        f"{file.name}: {name}"
        for file in sorted(folder.iterdir())
        for name in needed(file)
        if name.rpartition("/")[2].lower() not in there and not name.lower().startswith(WINDOWS) and name not in MACOS
    ]
