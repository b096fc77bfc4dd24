"""A checkpoint of one layout is the same run in any other."""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megalina.checkpoint.files import read_values
from megalina.checkpoint.stored import read_tensors
from megalina.train.trainer import Trainer
from tests.in_groups import InGroups
from tests.parallel.ranks import run_on_ranks
from tests.train.small_run import Recorder, checkpoint, config_of, records_of, same_checkpoints, start, write_tokens

SAVED, STEPS = 3, 6
KINDS: dict[str, dict[str, Any]] = {
    "tied, float64": {"dtype": "float64"},
    "untied with router bias, float64": {
        "dtype": "float64", "kind": "sigmoid", "bias_update_rate": 0.01, "tie_embeddings": False, "bias": True,
        "norm": "layernorm", "positions": "learned", "dense_layers_first": 1, "shared_d_ff": 8,
    },
    "tied, float32": {"dtype": "float32"},
    "router bias, bfloat16": {"dtype": "bfloat16", "kind": "sigmoid", "bias_update_rate": 0.01, "tie_embeddings": False},
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "mixed": {"tp": 2, "ep": 2, "zero": 1},
    "experts": {"ep": 4, "micro_batch_size": 1},  # balance and capacity are a sequence's: the micro-batch is free
    "heads": {"tp": 4, "zero": 1, "recompute": "full"},
    "data": {"zero": 1, "micro_batch_size": 1},
    "sequences": {"cp": 2, "ep": 2, "zero": 1, "micro_batch_size": 1},
}
FLOAT64 = list(KINDS)[:2]
CASES = [
    *((kind, layout) for kind in FLOAT64 for layout in LAYOUTS),
    ("tied, float32", "mixed"),
    ("router bias, bfloat16", "mixed"),
    ("router bias, bfloat16", "heads"),
]
QUICK = [(FLOAT64[1], "mixed")]
every_case = pytest.mark.parametrize(
    ("kind", "layout"), [pytest.param(*case, marks=[pytest.mark.full] * (case not in QUICK)) for case in CASES]
)
CHANGES = [
    *((FLOAT64[0], "heads", "mixed"), (FLOAT64[1], "mixed", "experts")),
    *((FLOAT64[1], "data", "heads"), (FLOAT64[1], "mixed", "sequences"), (FLOAT64[0], "sequences", "heads")),
]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-3}  # of a loss of about 5.7, relative


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A run listens for signals; pytest wants its own handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def name_of(*case: str) -> str:
    return " ".join(case)


def finish(run: Trainer) -> list[float]:
    run.loop()
    assert isinstance(run.tracker, Recorder)
    return run.tracker.of("loss")


def on_four_ranks(folder: Path, cases: Sequence[str]) -> dict[str, Any]:
    """From the checkpoints of one rank, in every layout; and from what one layout wrote, in another."""
    out: dict[str, Any] = {}
    for kind, layout in (case for case in CASES if name_of(*case) in cases):
        config = config_of(folder, f"{kind} {layout}", interval=SAVED + 1, steps=STEPS, **KINDS[kind], **LAYOUTS[layout])
        run = start(config, checkpoint(config_of(folder, f"{kind} one"), SAVED))
        run.state.save()  # as it was read: nothing may be lost on the way through a layout
        out[name_of(kind, layout)] = finish(run)
    for kind, layout, other in (change for change in CHANGES if name_of(*change) in cases):
        config = config_of(folder, f"{kind} {layout} {other}", steps=STEPS, **KINDS[kind], **LAYOUTS[other])
        point = checkpoint(config_of(folder, f"{kind} {layout}"), SAVED + 1)
        out[name_of(kind, layout, other)] = records_of(config, point).of("loss")
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts")
    write_tokens(path / "tokens")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, list[float]]:
    """Losses of the uninterrupted runs on one rank; their checkpoints stay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = {
        kind: records_of(config_of(folder, f"{kind} one", interval=SAVED, steps=STEPS, **model)).of("loss")
        for kind, model in KINDS.items()
    }
    torch.set_num_threads(before)
    return losses


@pytest.fixture(scope="module")
def cut(folder: Path, whole: dict[str, list[float]]) -> dict[str, Any]:
    def made(cases: Sequence[str]) -> dict[str, Any]:
        out: list[dict[str, Any]] = run_on_ranks(4, on_four_ranks, folder, cases)
        assert all(rank == out[0] for rank in out)  # all ranks saw the same losses, to the bit
        return out[0]

    quick = [name_of(*case) for case in (*QUICK, CHANGES[1])]
    return InGroups([quick, [name for case in (*CASES, *CHANGES) if (name := name_of(*case)) not in quick]], made)


def close(got: list[float], want: list[float], kind: str) -> bool:
    tolerance = TOLERANCE[str(KINDS[kind]["dtype"])]
    return len(got) == len(want) and all(abs(a - b) <= tolerance * abs(b) for a, b in zip(got, want, strict=True))


@every_case
def test_a_run_of_one_rank_goes_on_in_any_layout(
    kind: str, layout: str, whole: dict[str, list[float]], cut: dict[str, Any]
) -> None:
    assert close(cut[f"{kind} {layout}"], whole[kind][SAVED:], kind)


@pytest.mark.parametrize(
    ("kind", "layout", "other"), [pytest.param(*change, marks=[pytest.mark.full] * (i != 1)) for i, change in enumerate(CHANGES)]
)
def test_a_run_goes_from_layout_to_layout(
    kind: str, layout: str, other: str, whole: dict[str, list[float]], cut: dict[str, Any]
) -> None:
    assert close(cut[f"{kind} {layout} {other}"], whole[kind][SAVED + 1 :], kind)


@every_case
def test_a_run_of_many_ranks_goes_on_on_one(
    kind: str, layout: str, folder: Path, whole: dict[str, list[float]], cut: dict[str, Any]
) -> None:
    assert cut[name_of(kind, layout)]
    config = config_of(folder, f"{kind} back from {layout}", steps=STEPS, micro_batch_size=4, **KINDS[kind])
    point = checkpoint(config_of(folder, f"{kind} {layout}"), SAVED + 1)
    assert close(records_of(config, point).of("loss"), whole[kind][SAVED + 1 :], kind)


@every_case
def test_no_bit_is_lost_on_the_way_through_a_layout(kind: str, layout: str, folder: Path, cut: dict[str, Any]) -> None:
    assert cut[name_of(kind, layout)]
    one, many = (checkpoint(config_of(folder, f"{kind} {run}"), SAVED) for run in ("one", layout))
    assert same_checkpoints(one, many) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_in_the_same_layout_changes_no_bit(kind: str, folder: Path, whole: dict[str, list[float]]) -> None:
    config = config_of(folder, f"{kind} again", steps=STEPS, **KINDS[kind])
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
            assert (
                tensors[f"{kind}/{name}"].shape == tensors[f"model/{name}"].shape
                and tensors[f"{kind}/{name}"].dtype == torch.float32
            )
        assert torch.equal(tensors[f"master/{name}"].bfloat16(), tensors[f"model/{name}"])
        assert tensors[f"exp_avg_sq/{name}"].min() >= 0 and tensors[f"exp_avg_sq/{name}"].max() > 0, name
    assert tensors["model/embedding"].shape == (300, 32) and tensors["model/layers.0.experts.w1"].shape == (4, 32, 32)
    assert tensors["model/layers.1.router.bias_E"].abs().max() > 0
