"""Expert load over time: for some steps, the share of each MoE layer's tokens that each expert got.

As a picture: one strip a MoE layer, time to the right, an expert a row.  Colour is the logarithm of load over balanced load:
neutral at 1, one colour below, another above, full at a quarter and at four times.  An expert without any token has a colour of
its own.

T snapshots, L MoE layers, E experts.  Shares of a layer sum to one; a balanced expert has 1 / E.
"""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_SNAPSHOTS = 200
FULL_COLOUR_LOG2 = 2.0  # a quarter and four times the balanced load
LEVELS = 65  # odd: the middle one is balance
NO_TOKEN = LEVELS  # index of the colour of an expert without a token
RGB = tuple[int, int, int]


def keep_snapshot(step: int, total_steps: int) -> bool:
    """Whether this step's expert load is stored: about `MAX_SNAPSHOTS` a run, evenly spaced, and the last.

    A function of the step alone, so a run that was cut into pieces stores what an uninterrupted one does.
    """
    stride = -(-total_steps // MAX_SNAPSHOTS)
    return step == total_steps or step % max(stride, 1) == 0


def short_shares(shares_LE: Sequence[Sequence[float]]) -> list[list[float]]:
    """Shares with five significant digits: enough for a picture, a third of the size."""
    return [[float(f"{share:.5g}") for share in layer] for layer in shares_LE]


def layer_numbers(model: Mapping[str, Any], num_moe_layers: int) -> list[int]:
    """The model's numbers (from 0) of its MoE layers, as `ModelConfig` places them, those of multi-token prediction last.

    A model section that says nothing of them, or of another count, gives 0, 1, ...
    """
    first, every = int(model.get("dense_layers_first", 0)), max(int(model.get("moe_every", 1)), 1)
    layers = int(model.get("num_layers", 0))
    numbers = [layer for layer in range(first, layers) if (layer - first + 1) % every == 0]
    if numbers and numbers[-1] == layers - 1:
        numbers += range(layers, layers + int(model.get("mtp_layers", 0)))
    return numbers if len(numbers) == num_moe_layers else list(range(num_moe_layers))


@dataclass(frozen=True, slots=True)
class LoadHistory:
    steps: list[int]
    share_TLE: np.ndarray  # float64

    @staticmethod
    def of(records: Sequence[Mapping[str, Any]]) -> "LoadHistory | None":
        """From the records that hold `expert_load` (layer x expert shares); None: no record does."""
        found = [(record["step"], record["expert_load"]) for record in records if record.get("expert_load")]
        if not found:
            return None
        shares = np.array([load for _, load in found], dtype=np.float64)  # a number that was not finite is None, here nan
        return LoadHistory([step for step, _ in found], np.nan_to_num(shares))

    @property
    def ratio_TLE(self) -> np.ndarray:
        """Share over balanced share: 1 is balanced, 0 no token."""
        return self.share_TLE * self.share_TLE.shape[-1]


@dataclass(frozen=True, slots=True)
class Colours:
    low: Sequence[RGB]  # from full under-load towards balance
    balanced: RGB
    high: Sequence[RGB]  # from balance to full over-load
    no_token: RGB

    def table(self) -> np.ndarray:
        """uint8 [LEVELS + 1, 3]."""
        stops = np.array([*self.low, self.balanced, *self.high], dtype=np.float64)
        # balance must sit in the middle, whatever the number of stops on either side
        at = np.concatenate([np.linspace(0, 0.5, len(self.low) + 1), np.linspace(0.5, 1, len(self.high) + 1)[1:]])
        ramp = np.stack([np.interp(np.linspace(0, 1, LEVELS), at, stops[:, channel]) for channel in range(3)], axis=1)
        return np.vstack([ramp, np.array([self.no_token])]).round().astype(np.uint8)


LIGHT = Colours(
    low=((18, 62, 130), (64, 132, 200), (160, 203, 232)),
    balanced=(246, 243, 236),
    high=((250, 200, 140), (232, 120, 50), (160, 40, 20)),
    no_token=(20, 20, 24),
)
DARK = Colours(
    low=((140, 205, 255), (64, 140, 215), (36, 74, 120)),
    balanced=(38, 41, 49),
    high=((120, 70, 36), (226, 122, 52), (255, 208, 130)),
    no_token=(232, 60, 200),
)


def colour_levels(ratio: np.ndarray) -> np.ndarray:
    """Load over balanced load -> index into `Colours.table()`, uint8, same shape."""
    with np.errstate(divide="ignore"):
        position = np.log2(ratio) / (2 * FULL_COLOUR_LOG2) + 0.5
    level = np.clip(position, 0, 1) * (LEVELS - 1)
    return np.where(ratio > 0, level.round(), NO_TOKEN).astype(np.uint8)


def png(levels_HW: np.ndarray, colours: Colours) -> bytes:
    """A palette image, a pixel an element."""
    height, width = levels_HW.shape
    rows = np.hstack([np.zeros((height, 1), dtype=np.uint8), levels_HW])  # each row begins with its filter: 0, none

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, palette
    parts = chunk(b"IHDR", header) + chunk(b"PLTE", colours.table().tobytes()) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def data_uri(levels_HW: np.ndarray, colours: Colours) -> str:
    return "data:image/png;base64," + base64.b64encode(png(levels_HW, colours)).decode("ascii")


def load_figure(history: LoadHistory, layer_numbers: Sequence[int], *, max_layers: int = 16) -> "Figure":
    """The light map as a matplotlib figure, for trackers that show images; at most `max_layers` layers, evenly chosen."""
    from matplotlib.figure import Figure

    num_layers, num_experts = history.share_TLE.shape[1:]
    shown = sorted({round(i) for i in np.linspace(0, num_layers - 1, min(max_layers, num_layers))})
    strip_inches = float(np.clip(num_experts * 0.09, 0.5, 1.6))
    figure = Figure(figsize=(8, 0.9 + len(shown) * (strip_inches + 0.1)), dpi=100, layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    pixels = LIGHT.table()[colour_levels(history.ratio_TLE)]  # [T, L, E, 3]
    for axis, layer in zip(axes, shown, strict=True):
        axis.imshow(pixels[:, layer].transpose(1, 0, 2), aspect="auto", interpolation="nearest")
        axis.set_ylabel(f"layer {layer_numbers[layer]}", rotation=0, ha="right", va="center", fontsize=9)
        axis.set_yticks([0, num_experts - 1], ["0", str(num_experts - 1)], fontsize=7)
    ticks = sorted({0, len(history.steps) // 2, len(history.steps) - 1})
    axes[-1].set_xticks(ticks, [str(history.steps[tick]) for tick in ticks])
    axes[-1].set_xlabel("step")
    figure.suptitle("expert load: blue under, orange over the balanced share, black: no token", fontsize=10)
    return figure
