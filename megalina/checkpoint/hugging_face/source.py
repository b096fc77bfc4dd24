"""A folder of a model in Hugging Face's format: config.json, and tensors in safetensors files, read one at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalina.checkpoint.safetensors_file import DTYPE_NAMES

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PICKLED = (b"PK\x03\x04", b"\x80")  # how torch.save's files begin, and older ones
REWRITE = "write it again where you trust it, with transformers' save_pretrained, or take the model's safetensors files"
LFS = b"version https://git-lfs.github.com"
_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Source:
    """ValueError where it is no such folder, a file is missing or damaged, or the tensors are of a kind that can't be taken:
    pickles, quantized ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._opened: tuple[str, Any] | None = None  # the last file: no more than one is mapped at a time
        self.files: dict[str, str] = {}  # key -> the file that has it
        self.listing: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        named = _named_files(folder)
        for file in sorted(set(named.values())) if named else [SINGLE]:
            try:
                opened = self._open(file)
                for key in opened.keys():  # noqa: SIM118  it is no dict
                    part = opened.get_slice(key)
                    if part.get_dtype() not in _TYPES:
                        raise ValueError(
                            f"{folder / file}: {key} is {part.get_dtype()}, which is quantized: {_dequantize(folder)}"
                        )
                    if key in self.files:
                        raise ValueError(f"{folder}: {key} is in {self.files[key]} and in {file}")
                    self.files[key] = file
                    self.listing[key] = tuple(part.get_shape()), _TYPES[part.get_dtype()]
            except SafetensorError as error:
                raise ValueError(_damaged(folder / file, error)) from error
        for key, file in named.items():
            if self.files.get(key) != file:
                where = f"it is in {self.files[key]}" if key in self.files else "it has no such tensor"
                raise ValueError(f"{folder / INDEX} says that {key} is in {file}: {where}; take both from the same place")

    def tensor(self, key: str) -> Tensor:
        """A whole tensor; as long as it is held, its file is mapped."""
        file = self.files[key]
        try:
            tensor: Tensor = self._open(file).get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(_damaged(self.folder / file, error)) from error
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.listing.values())

    def _open(self, file: str) -> Any:
        if self._opened is None or self._opened[0] != file:
            if not (self.folder / file).is_file():
                raise ValueError(f"{self.folder} has no {file}: take the whole model")
            self._opened = file, safe_open(self.folder / file, framework="pt").__enter__()
        return self._opened[1]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.  ValueError where there is none, or it says that tensors are quantized."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give one with {CONFIG} and safetensors files")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: give the folder of a model in Hugging Face's format")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is no JSON object")
    if quantization := config.get("quantization_config"):
        kind = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{folder} is quantized ({kind}): {_dequantize(folder)}")
    return config


def _dequantize(folder: Path) -> str:
    return (
        "megalina reads float32, float16 and bfloat16. Write it again with transformers, which dequantizes: "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='bfloat16', quantization_config=KIND(dequantize=True))"
        ".save_pretrained(NEW), where KIND is Mxfp4Config for MXFP4 (gpt-oss) and FineGrainedFP8Config for FP8 (DeepSeek-V3); "
        "then import NEW"
    )


def _named_files(folder: Path) -> dict[str, str]:
    """Key -> file, as the index has them; empty where one file has all."""
    if (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        return {}
    if not (folder / INDEX).is_file():
        found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if found:
            raise ValueError(
                f"{folder} has {found[0]}, a pickle, which can run code when it is read, and no safetensors file: {REWRITE}"
            )
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: take the whole model")
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        good = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map ({type(error).__name__} {error})") from error
    if not good or not weight_map or any(Path(file).name != file for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX} is damaged: its weight_map doesn't name files of this folder")
    return dict(weight_map)


def _damaged(file: Path, error: Exception) -> str:
    with file.open("rb") as opened:
        start = opened.read(len(LFS))
    if start == LFS:
        return f"{file} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    if start.startswith(PICKLED) and any(start[4:8]):  # there a safetensors file has zeros: its header has less than 4 GB
        return f"{file} is a pickle, which can run code when it is read, whatever its name: {REWRITE}"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    size = f"{file.stat().st_size:,} bytes"
    return f"{file} can't be read as a safetensors file ({size}): {reason}; it is cut off or damaged, take it again"
