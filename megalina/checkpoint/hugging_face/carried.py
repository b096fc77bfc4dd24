"""The files that go along with a model unchanged: its tokenizer, its defaults for generation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

FOLDER = "hugging_face"  # in a checkpoint
REPORT = "import_report.json"  # of an import, in the checkpoint that it wrote
PATTERNS = (
    *("tokenizer*", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "spiece.model", "sentencepiece*.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json"),
)


def carried(folder: Path) -> list[Path]:
    """Those that a folder has, in the order of their names."""
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def copy_all(source: Path, target: Path) -> list[str]:
    """Copy those that `source` has into the folder `target`; returns their names."""
    found = carried(source)
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def carry_from(checkpoint: Path) -> Callable[[Path], None]:
    """What takes these files from one checkpoint into the folder of another, if the first has any."""

    def carry(target: Path) -> None:
        if (checkpoint / FOLDER).is_dir():
            shutil.copytree(checkpoint / FOLDER, target / FOLDER)

    return carry


def tokenizer_of(folder: Path) -> Path | None:
    """The file that `megalina.data.tokenizer` opens."""
    return next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()), None)


def num_ids(tokenizer: Path) -> int:
    """Ids up to the largest that a tokenizer can write.  ValueError where it can't be read."""
    if tokenizer.suffix != ".json":
        from megalina.data.tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(tokenizer).vocab_size
    try:
        found = json.loads(tokenizer.read_bytes())
        vocab = found["model"]["vocab"]
        largest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
        return 1 + max([int(largest), *(int(token["id"]) for token in found.get("added_tokens") or [])])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{tokenizer} is no Hugging Face tokenizer file: {type(error).__name__} {error}") from error
