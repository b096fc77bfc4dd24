"""The links of one model, grouped by tensor on either side and held against what is really there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from megalina.config import ModelConfig, RouterConfig
from megalina.families.family import Family, Settings
from megalina.families.links import Link, uncovered
from megalina.model.gpt import GPT
from megalina.model.init import spec_of

SHOWN = 3  # of the tensors that are wrong, in an error

Shapes = Mapping[str, tuple[int, ...]]


class Linked:
    """AssertionError for a family whose links leave out, or name twice, a number of a tensor, or a tensor of the model: it names
    the tensor, and the expert where it is one's."""

    def __init__(self, family: Family, settings: Settings) -> None:
        self.family, self.settings = family, settings
        self.theirs: dict[str, list[Link]] = {}  # by key, in the order of the family
        self.ours: dict[str, list[Link]] = {}  # by name
        for link in family.links(settings):
            self.theirs.setdefault(link.theirs.name, []).append(link)
            self.ours.setdefault(link.ours.name, []).append(link)
        for links, side in ((self.theirs, "theirs"), (self.ours, "ours")):
            left = uncovered(getattr(link, side) for of in links.values() for link in of)
            assert not left, f"{family.name}: elements of {side} are not linked once: {self._said(left)}"
        declared = our_shapes(settings)
        shapes = {name: links[0].ours.shape for name, links in self.ours.items()}
        assert declared == shapes, f"{family.name}: {sorted(declared.items() ^ shapes.items())}"

    def _said(self, left: Mapping[str, int]) -> str:
        said = []
        for name, count in left.items():
            by_row = self.by_row(name) if name in self.ours else None
            rows = range(self.ours[name][0].ours.shape[0]) if by_row is not None else ()
            lost = [row for row in rows if by_row is not None and row not in by_row]
            said.append(f"{count:,} of {name}" + (f", all of {lost[:SHOWN]}" if lost else ""))
        return "; ".join(said[:SHOWN])

    def by_row(self, name: str) -> Mapping[int, Sequence[Link]] | None:
        """The links of each index of our tensor's first dim; None where one is of several."""
        out: dict[int, list[Link]] = {}
        for link in self.ours[name]:
            if link.ours.first is None:
                return None
            out.setdefault(link.ours.first, []).append(link)
        return out

    def key_shapes(self) -> Shapes:
        return {key: links[0].theirs.shape for key, links in self.theirs.items()}

    def keys_by_tensor(self) -> list[str]:
        """Every key, those of one of our tensors together, so that each tensor is read once."""
        return sorted(self.theirs, key=lambda key: _natural(self.theirs[key][0].ours.name))


def our_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Of the weights and router state of our model, by name; takes no memory."""
    gpt = gpt_of(settings)
    out = {name: spec_of(p).shape for name, p in gpt.named_parameters()}
    return out | {name: tuple(value.shape) for name, value in gpt.router_state().items()}


def gpt_of(settings: Settings) -> GPT:
    """The model, on the meta device."""
    model = settings.model
    return GPT(model, settings.router, vocab_size=model.vocab_size, max_positions=model.max_positions, seed=0)


def check_keys(there: Shapes, wanted: Shapes, where: str) -> None:
    """ValueError that names the first tensors which are missing, of another shape, or unknown."""
    missing = [f"{key} is missing" for key in wanted if key not in there]
    wrong = [f"{key} is {list(there[key])}, not {list(shape)}" for key, shape in wanted.items() if there.get(key, shape) != shape]
    unknown = [f"{key} {list(shape)} is unknown" for key, shape in there.items() if key not in wanted]
    if found := missing + wrong + unknown:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        count = f"{len(missing)} missing, {len(wrong)} of another shape, {len(unknown)} unknown"
        raise ValueError(f"{where}: {'; '.join(found[:SHOWN])}{more} (of {len(wanted)} tensors {count})")


def overrides(settings: Settings) -> list[str]:
    """The words of a command line that make this model."""
    return _given("model", settings.model, ModelConfig()) + _given("router", settings.router, RouterConfig())


def _given(group: str, values: Any, default: Any) -> list[str]:
    out = []
    for field in fields(values):
        value = getattr(values, field.name)
        if value != getattr(default, field.name):
            out.append(f"{group}.{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return out


def settings_of(config: Mapping[str, Mapping[str, object]], vocab_size: int) -> Settings:
    """The model of a checkpoint: of its configuration, nested, and the size of its vocabulary."""
    model, router = ModelConfig(**config["model"]), RouterConfig(**config["router"])  # type: ignore[arg-type]
    positions = model.max_positions or config["train"]["seq_len"]
    known = asdict(model) | {"vocab_size": vocab_size, "max_positions": positions}
    return Settings(ModelConfig(**known), router)


def _natural(name: str) -> list[str | int]:
    """For sorting: layer 2 before layer 10."""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name)]


def numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
