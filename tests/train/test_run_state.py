"""A checkpoint of one layout is the same run in any other."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.train.checkpoint import read_tensors, read_values
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import checkpoint, config_of, records_of, same_checkpoints, start

SAVED, STEPS = 3, 6
KINDS: dict[str, dict[str, Any]] = {
    "tied, float64": {"dtype": "float64"},
    "untied with router bias, float64": {
        "dtype": "float64", "kind": "sigmoid", "bias_update_rate": 0.01, "tie_embeddings": False, "bias": True, "norm": "layernorm",
        "positions": "learned", "dense_layers_first": 1, "shared_d_ff": 8,
    },
    "tied, float32": {"dtype": "float32"},
    "router bias, bfloat16": {"dtype": "bfloat16", "kind": "sigmoid", "bias_update_rate": 0.01, "tie_embeddings": False},
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "mixed": {"tp": 2, "ep": 2, "zero": 1},
    "experts": {"ep": 4, "micro_batch_size": 1},  # balance and capacity are a sequence's: the micro-batch is free
    "heads": {"tp": 4, "zero": 1, "recompute": "full"},
    "data": {"zero": 1, "micro_batch_size": 1},
}
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-3}  # of a loss of about 5.7, relative


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A run listens for signals; pytest wants its own handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def on_one_rank(folder: Path, kind: str, run: str, point: Path | None = None, **settings: Any) -> list[float]:
    config = config_of(folder, run, interval=1, steps=STEPS, **KINDS[kind], **settings)
    return records_of(config, point).of("loss")


def on_four_ranks(folder: Path) -> dict[str, Any]:
    """From the checkpoints of one rank, in every layout; and from what each layout wrote, in the next one."""
    out: dict[str, Any] = {}
    for kind, model in KINDS.items():
        for layout, parallel in LAYOUTS.items():
            config = config_of(folder, f"{kind} {layout}", interval=1, steps=STEPS, **model, **parallel)
            first = checkpoint(config_of(folder, f"{kind} one"), SAVED)
            run = start(config, first)
            run.state.save()  # as it was read: nothing may be lost on the way through a layout
            out[f"losses {kind} {layout}"] = records_of(config, checkpoint(config, SAVED)).of("loss")
        previous = list(LAYOUTS)[-1]
        for layout, parallel in LAYOUTS.items():
            config = config_of(folder, f"{kind} {previous} {layout}", interval=100, steps=STEPS, **model, **parallel)
            point = checkpoint(config_of(folder, f"{kind} {previous}"), SAVED + 1)
            out[f"next {kind} {layout}"] = records_of(config, point).of("loss")
            previous = layout
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, list[float]]:
    """Losses of the uninterrupted runs on one rank; their checkpoints of every step stay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = {kind: on_one_rank(folder, kind, f"{kind} one") for kind in KINDS}
    torch.set_num_threads(before)
    return losses


@pytest.fixture(scope="module")
def cut(folder: Path, whole: dict[str, list[float]]) -> dict[str, Any]:
    out: list[dict[str, Any]] = run_on_ranks(4, on_four_ranks, folder)
    assert all(rank == out[0] for rank in out)  # all ranks saw the same losses, to the bit
    return out[0]


def close(got: list[float], want: list[float], kind: str) -> bool:
    tolerance = TOLERANCE[str(KINDS[kind]["dtype"])]
    return len(got) == len(want) and all(abs(a - b) <= tolerance * abs(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_rank_goes_on_in_any_layout(kind: str, whole: dict[str, list[float]], cut: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        assert close(cut[f"losses {kind} {layout}"], whole[kind][SAVED:], kind), layout


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_from_each_layout_to_the_next(kind: str, whole: dict[str, list[float]], cut: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        assert close(cut[f"next {kind} {layout}"], whole[kind][SAVED + 1 :], kind), layout


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_many_ranks_goes_on_on_one(kind: str, folder: Path, whole: dict[str, list[float]], cut: dict[str, Any]) -> None:
    for layout in ("mixed", "experts"):
        point = checkpoint(config_of(folder, f"{kind} {layout}"), SAVED + 1)
        losses = on_one_rank(folder, kind, f"{kind} back from {layout}", point, micro_batch_size=4)
        assert close(losses, whole[kind][SAVED + 1 :], kind), layout


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_is_lost_on_the_way_through_a_layout(kind: str, folder: Path, cut: dict[str, Any]) -> None:
    one = checkpoint(config_of(folder, f"{kind} one"), SAVED)
    for layout in LAYOUTS:
        assert same_checkpoints(one, checkpoint(config_of(folder, f"{kind} {layout}"), SAVED)) == [], layout


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_in_the_same_layout_changes_no_bit(kind: str, folder: Path, whole: dict[str, list[float]]) -> None:
    config = config_of(folder, f"{kind} again", interval=100, steps=STEPS, **KINDS[kind])
    one = config_of(folder, f"{kind} one")
    assert records_of(config, checkpoint(one, SAVED)).of("loss") == whole[kind][SAVED:]
    assert same_checkpoints(checkpoint(config, STEPS), checkpoint(one, STEPS)) == []


def test_a_checkpoint_holds_moments_masters_biases_and_no_padding(folder: Path, whole: dict[str, list[float]]) -> None:
    point = checkpoint(config_of(folder, "router bias, bfloat16 one"), SAVED)
    tensors, values = read_tensors(point), read_values(point)
    assert values["optimizer_steps"] == SAVED and values["consumed_samples"] == 8 * SAVED
    weights = [name.removeprefix("model/") for name in tensors if name.startswith("model/") and "bias_E" not in name]
    for name in weights:
        for kind in ("exp_avg", "exp_avg_sq", "master"):
            assert tensors[f"{kind}/{name}"].shape == tensors[f"model/{name}"].shape and tensors[f"{kind}/{name}"].dtype == torch.float32
        assert torch.equal(tensors[f"master/{name}"].bfloat16(), tensors[f"model/{name}"])
        assert tensors[f"exp_avg_sq/{name}"].min() >= 0 and tensors[f"exp_avg_sq/{name}"].max() > 0, name
    assert tensors["model/embedding"].shape == (300, 32) and tensors["model/layers.0.experts.w1"].shape == (4, 32, 32)
    assert tensors["model/layers.1.router.bias_E"].abs().max() > 0
