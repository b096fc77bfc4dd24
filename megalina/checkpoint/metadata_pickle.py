"""A metadata pickle: `.metadata` of a checkpoint, read as data.

torch defines the file as a pickle, and a pickle is a program.  Python's fast unpickler, even where it may import nothing but
harmless classes, can be made to take memory that the file only mentions, to change a class, or to end the interpreter with a
tuple nested a million deep.  So the slow one is used, with the operations, classes and arguments that torch's writer needs.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

_CLASSES = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "StorageMeta",
    },
}
_NAMES: frozenset[str] = frozenset[str]().union(*_CLASSES.values())
_CALLED: dict[tuple[str, str], type] = {  # with one argument, of this type
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
}
_ARGUMENTS = {name: kind for (_, name), kind in _CALLED.items()}
_PATHS = {"pathlib", "pathlib._local"}  # their home before and in Python 3.13
_Python: Any = pickle._Unpickler
_OPERATIONS = (
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1
    + pickle.SHORT_BINUNICODE + pickle.BINUNICODE + pickle.BINFLOAT
    + pickle.EMPTY_TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.TUPLE
    + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_DICT + pickle.SETITEM + pickle.SETITEMS
    + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET + pickle.STACK_GLOBAL + pickle.NEWOBJ + pickle.REDUCE + pickle.BUILD
)  # fmt: skip


def read_pickle(data: bytes) -> Any:
    """The object; ValueError, before anything is imported or called for it, where the pickle does what torch's writer doesn't."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except KeyError as error:  # no such place in the memo, or no such operation
        raise ValueError(f"it has the operation or reference {error}, which torch doesn't write") from error
    except Exception as error:  # a damaged pickle can make it stumble anywhere
        raise ValueError(str(error) or type(error).__name__) from error


class _Unpickler(_Python):
    """Python's own unpickler in Python: its table of operations can be cut down, its memo is no array."""

    dispatch: dict[int, Callable[[Any], None]] = {code: _Python.dispatch[code] for code in _OPERATIONS}

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)  # looks nothing up lazily
        known = name in _CLASSES.get(module, ()) or (module, name) in _CALLED or (module in _PATHS and name.endswith("Path"))
        if not is_dtype and not known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")
        if module in _PATHS:
            return _path  # where it was written: of no use, and of another system perhaps
        return super().find_class(module, name)

    def _reduce(self) -> None:
        function, arguments = self.stack[-2:]
        if function is not _path:
            wanted = _ARGUMENTS.get(getattr(function, "__name__", ""))
            if wanted is None or type(arguments) is not tuple or len(arguments) != 1 or type(arguments[0]) is not wanted:
                raise pickle.UnpicklingError(f"{function!r} is called with what torch never gives it")
            if wanted is tuple and not _is_shape(arguments[0]):
                raise pickle.UnpicklingError("a shape holds what is no number")
        _Python.load_reduce(self)

    def _newobj(self) -> None:
        cls, arguments = self.stack[-2:]
        if not isinstance(cls, type) or cls.__name__ not in _NAMES or arguments != ():
            raise pickle.UnpicklingError(f"{cls!r} is made as torch never makes it")
        _Python.load_newobj(self)

    def _build(self) -> None:
        instance, state = self.stack[-2:]
        if type(instance).__name__ not in _NAMES:
            raise pickle.UnpicklingError(f"the state of {type(instance).__name__} is set")
        if type(state) is dict:
            proper = all(type(key) is str and not key.startswith("__") for key in state)
        else:
            proper = hasattr(instance, "__setstate__")
        if not proper:
            raise pickle.UnpicklingError(f"the state of {type(instance).__name__} is none")
        _Python.load_build(self)

    def _setitem(self) -> None:
        _check_key(self.stack[-2])
        _Python.load_setitem(self)

    def _setitems(self) -> None:
        for key in self.stack[::2]:  # what is above the last mark
            _check_key(key)
        _Python.load_setitems(self)

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
    }


def _path(*parts: str) -> str:
    return "/".join(str(part) for part in parts if type(part) is str)


def _is_shape(sizes: Any) -> bool:
    return all(type(size) is int for size in sizes)


def _check_key(key: Any) -> None:
    """Keys are hashed, and the hash of a nested tuple is taken without a look at how deep it is."""
    if type(key) is MetadataIndex:
        fields = dict(vars(key)) if hasattr(key, "__dict__") else {}
        simple = all(type(value) in (str, int, torch.Size, type(None)) for value in fields.values())
    else:
        simple = type(key) is str
    if not simple:
        raise pickle.UnpicklingError(f"a key is a {type(key).__name__}")
