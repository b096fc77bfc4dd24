"""A manifest: which tokenizer made an indexed dataset, in PREFIX.json beside it (the format itself has no place for that)."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from megalina.whole_file import naming

_MAX_BYTES = 1 << 16  # a larger file of that name is something else, such as the corpus itself


@dataclass(frozen=True, slots=True)
class Manifest:
    tokenizer: str  # its path when the dataset was made
    tokenizer_sha256: str
    vocab_size: int
    documents: int
    tokens: int

    def write(self, prefix: str | Path) -> None:
        path = Path(f"{prefix}.json")
        with naming(path):
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """None where there is none, as for datasets that other programs made."""
    path = Path(f"{prefix}.json")
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError):
        return None  # a file of that name that something else wrote
    kinds = get_type_hints(Manifest).items()
    return manifest if all(type(getattr(manifest, name)) is kind for name, kind in kinds) else None


def tokenizer_sha256(path: str) -> str:
    return hashlib.sha256(b"bytes" if path == "bytes" else Path(path).read_bytes()).hexdigest()
