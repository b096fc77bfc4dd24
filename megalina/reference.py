"""References to code of your own in a configuration: "folder/file.py:Name", or "package.module:Name"."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def is_reference(text: str) -> bool:
    return ":" in str(text)  # a number, say, may come from a command line


def load(reference: str) -> Any:
    """What it names.  A file is read once in each process.  ValueError where there is no such file, module or name."""
    where, _, name = str(reference).rpartition(":")  # a number, say, may come from a command line
    if not (where and name):
        raise ValueError(f"{reference} names no code: write folder/file.py:Name or package.module:Name")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_package(where, reference)
    if not hasattr(module, name):
        raise ValueError(f"{reference}: {where} has no {name}")
    return getattr(module, name)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file (looked for in {Path.cwd()})")
    name = f"{path.stem}@{path.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _from_package(where: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        raise ValueError(f"{reference}: {error}; write folder/file.py:Name or package.module:Name") from None
