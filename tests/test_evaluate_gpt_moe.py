"""tools/evaluate_gpt_moe.py: what it refuses before a rank starts, what is measured, and one evaluation from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalina.cli import evaluate as evaluate_gpt_moe
from megalina.cli import generate
from megalina.cli.evaluate import BAD_INPUT, FAILED, command_of, main
from megalina.config import ClusterConfig, InferConfig, ModelConfig
from megalina.data.indexed import IndexedWriter
from megalina.evaluate.measures import accuracy
from megalina.evaluate.report import page
from megalina.evaluate.report_tables import tables
from megalina.evaluate.worker import Evaluation, evaluate
from megalina.launch import Member
from megalina.placement.controller import Controller, Outcome, Policy
from megalina.placement.planners.identity import identity
from megalina.placement.split import even
from megalina.placement.triggers import never
from megalina.serve.even_routing import EvenRouting
from megalina.serve.expert_memory import check_memory, num_device_bytes, num_expert_bytes
from megalina.serve.host_experts import experts_of
from megalina.serve.modes import read_mode
from megalina.serve.policies import Served
from tests.serve.small_engine import small_gpt
from tests.train.small_run import config_of, records_of

LENGTH = 24
ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf" / "infer"
KEYS = {
    "perplexity", "bits_per_byte", "p50_ms", "p95_ms", "p99_ms", "p50_ratio_to_static", "p95_ratio_to_static",
    "p95_ratio_to_ideal", "active_fraction",
    "load_max_over_mean", "idle_share", "phase2_rate", "planner_ms", "swapped_mb", "a2a_ms",
    "prefill_tokens_per_s", "decode_tokens_per_s", "accuracy_ordered", "accuracy_recall", "misordered_experts",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small: two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on bytes of a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    with IndexedWriter(folder / "tokens", np.uint16) as writer:
        for source in sorted(Path(__file__).parent.glob("*.py"))[:6]:
            writer.add_document(list(source.read_bytes()[:4000]) + [256])
    config = config_of(folder, "run", seq_len=LENGTH, steps=2, d_model=32, num_layers=3)
    records_of(replace(config, data=replace(config.data, tokenizer="bytes")))
    return folder / "run"


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(evaluate_gpt_moe, "run", started)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--modes fast", "there is no mode 'fast' (did you mean best?); there are best, ideal, lina"),
        ("--modes ,", "--modes names none"),
        ("infer.triger=never", "infer.triger=never: there is no setting infer.triger (did you mean trigger?)"),
        ("infer.trigger=sometimes", "mode static: infer.trigger is 'sometimes': choose one of never, always"),
        ("infer.slots_per_device=two", "infer.slots_per_device=two: infer.slots_per_device must be a whole number, not 'two'"),
        ("infer.even_routing=true", "infer.even_routing=true: choose the mode ideal"),
        ("trigger=never", "trigger=never must be infer.KEY=VALUE"),
        ("--ranks 2 infer.slots_per_device=1", "2 devices then have 2 slots for 4 experts; choose 2 or more"),
        ("infer.slots_per_device=10000000", "GB are free; most takes"),
        ("--length 25", "--length 25: the run's held-out sequences have 24 tokens"),
        ("--text {folder}/text --length 25", "--length 25: the model reads 24 tokens"),
        ("--decode 23", "that is 25, and the model reads 24 tokens; choose 22 or less"),
        ("--tasks {folder}/wrong.jsonl", "wrong.jsonl, line 2, field 'answer': expected an index from 0 to 1, not 2"),
        ("--tasks {folder}/none.jsonl", "there is no file"),
        ("--text {folder}/empty", "holds no text"),
        ("--tasks {folder}/long.jsonl", "task 1 has a text of 30 tokens after its context"),
        ("--wandb online", "--wandb online: this machine has no key; set WANDB_API_KEY or run `wandb login`"),
        ("cluster.attention_ms=3", "cluster.attention_ms (3) and cluster.experts_ms (0) go together: give both"),
        ("cluster.link_gbit=3", "links are emulated by tools/emulate_cluster.py"),
        ("--out {folder}/text/out", "is no folder; choose another one"),
        ("--out /proc/nowhere/out", "/proc can't be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Path,
    no_ranks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    said: str,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    task = {"context": "a", "choices": ["b", "c"], "answer": 1}
    (tmp_path / "wrong.jsonl").write_text("\n".join(map(json.dumps, [task, task | {"answer": 2}])))
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "target": "b" * 30}))
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").write_text("")
    before = sorted(tmp_path.rglob("*"))
    words = ["--out", str(tmp_path / "out"), *arguments.format(folder=tmp_path).split()]
    assert main([str(run), *words]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
    assert sorted(tmp_path.rglob("*")) == before and not (run / "evaluation").exists()


def test_no_checkpoint_is_one_line(no_ranks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, said in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "run", "has no checkpoint yet"), (tmp_path, "")):
        assert main([str(path)]) == BAD_INPUT
        err = capsys.readouterr().err
        assert said in err and str(path) in err and err.count("\n") == 1


def test_a_mode_file_with_an_unknown_or_wrong_key_names_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("split: even\nplaner: greedy\n")
    with pytest.raises(ValueError, match="own.yaml: there is no setting infer.planer .did you mean planner"):
        read_mode(tmp_path, "own")
    (tmp_path / "own.yaml").write_text("first_planned: true\n")
    with pytest.raises(ValueError, match="infer.first_planned must be a whole number, not True"):
        read_mode(tmp_path, "own")
    (tmp_path / "own.yaml").write_text("worth: 1\n")
    assert read_mode(tmp_path, "own", ["infer.kept=3"]) == InferConfig(name="own", worth=1.0, kept=3)


def test_overrides_are_for_all_but_ideal_and_static_is_always_there(
    run: Path, no_ranks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--modes", "best,ideal", "--dry-run", "infer.split=local_first"]) == 0
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert list(lines) == ["static", "best", "ideal"]
    assert ["split=local_first" in line for line in lines.values()] == [True, True, False]
    assert not (run / "evaluation").exists()


def test_a_mode_that_does_not_fit_is_left_out_unless_it_was_asked_for(
    run: Path, no_ranks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse_lina(config: InferConfig, served: Served) -> None:
        if config.name == "lina":
            raise ValueError("too few slots")

    monkeypatch.setattr("megalina.serve.policies.check_infer", refuse_lina)
    assert main([str(run), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == "mode lina is left out: too few slots\n" and "\nlina:" not in out and "\nwindow:" in out
    assert main([str(run), "--dry-run", "--modes", "lina"]) == BAD_INPUT
    assert capsys.readouterr().err == "mode lina: too few slots\n"


def test_even_routing_is_even_and_leaves_padding_alone() -> None:
    chosen_TK = torch.randint(0, 8, (1003, 2))
    chosen_TK[::5] = 8  # padding
    rows = sum(np.bincount(EvenRouting(8, 4, rank)(0, chosen_TK).flatten().numpy(), minlength=9) for rank in range(4))
    even_TK = EvenRouting(8, 4, 1)(0, chosen_TK)
    assert torch.equal(even_TK == 8, chosen_TK == 8)
    assert (even_TK[:, 0] != even_TK[:, 1])[chosen_TK[:, 0] != 8].all()
    assert rows[:8].max() - rows[:8].min() <= 4
    assert {int(EvenRouting(8, 4, rank)(0, torch.zeros(1, 1, dtype=torch.int64))) for rank in range(4)} == {0, 2, 4, 6}


def outcome(expected: list[float], counts: list[int]) -> Outcome:
    return Outcome(0, np.array(expected), np.array(counts), np.array([1]), False)


@pytest.mark.parametrize(
    ("expected", "counts", "found"),
    [
        ([0.4, 0.3, 0.2, 0.1], [9, 5, 3, 1], (True, 1.0, 0)),
        ([0.4, 0.3, 0.2, 0.1], [5, 9, 3, 1], (False, 1.0, 2)),  # swapped among the top two
        ([0.4, 0.3, 0.2, 0.1], [9, 3, 5, 1], (False, 0.5, 2)),
        ([0.4, 0.3, 0.2, 0.1], [9, 5, 1, 3], (True, 1.0, 2)),
        ([0.25, 0.25, 0.25, 0.25], [2, 2, 2, 2], (True, 1.0, 0)),  # ties: the lower one first
    ],
)
def test_accuracy_is_that_of_the_most_popular_experts(expected: list[float], counts: list[int], found: Any) -> None:
    assert accuracy(outcome(expected, counts), 2) == found


def test_a_controller_says_what_came_of_every_decision() -> None:
    controller = Controller(Policy(None, None, even, never), [identity(np.ones(2), 2, 1)])
    counts_RE = np.array([[3, 1], [4, 0]])
    placement = identity(np.ones(2), 2, 1)
    kept = controller.decide(0, counts_RE, placement, None)[2]
    assert (kept.count_E.tolist(), kept.load_N.tolist(), kept.expected_E, kept.replanned) == ([7, 1], [7, 1], None, False)


@pytest.mark.parametrize("model", [{}, {"bias": True, "activation": "gelu"}, {"bias": True}])
def test_the_memory_of_experts_is_that_of_their_tensors(model: dict[str, Any]) -> None:
    gpt = small_gpt(dtype=torch.float32, **model)
    shape, number = experts_of([dict(gpt.layers[0].experts.named_parameters())])
    assert num_expert_bytes(gpt.config) == shape.num_bytes
    served, config = Served(number, 2, 3), InferConfig(slots_per_device=4, swap_mib=5.5 * shape.num_bytes / 2**20)
    assert num_device_bytes(config, served, gpt.config, shape.num_bytes) == (3 * 4 + 5) * shape.num_bytes
    needed = (3 * number + 2 * (3 * 4 + 5)) * shape.num_bytes
    check_memory({"own": config}, served, gpt.config, local_ranks=2, free_bytes=int(needed / 0.9) + 2)
    with pytest.raises(ValueError, match="own, .* for 4 slots a layer and 5 experts on their way .* infer.swap_mib"):
        check_memory({"own": config}, served, gpt.config, local_ranks=2, free_bytes=int(needed / 0.9) - 2)
    small = InferConfig(slots_per_device=4, swap_mib=3.9 * shape.num_bytes / 2**20)
    with pytest.raises(ValueError, match=f"the 4 slots of one layer .* take {4 * shape.num_bytes} bytes; choose") as refused:
        check_memory({"own": small}, served, gpt.config, local_ranks=2, free_bytes=None)
    enough = float(str(refused.value).partition("infer.swap_mib=")[2].split()[0])
    check_memory({"own": replace(small, swap_mib=enough)}, served, gpt.config, local_ranks=2, free_bytes=None)
    assert isinstance(gpt.config, ModelConfig)


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    """All modes on one device, without a process group."""
    checkpoint = next((run / "checkpoints").iterdir())
    modes = {name: read_mode(CONF, name) for name in ("static", "lina", "window", "lookahead", "best", "ideal")}
    modes["best"] = read_mode(CONF, "best", ["infer.dispatch=once_per_rank"])
    return evaluate(Evaluation(str(checkpoint), modes, batches=3, sequences=2, length=0, decode=3))


def test_every_mode_is_measured(found: dict[str, Any]) -> None:
    assert list(found["modes"]) == ["static", "lina", "window", "lookahead", "best", "ideal"]
    for name, mode in found["modes"].items():
        assert mode.keys() >= KEYS
        assert len(mode["latency_ms"]) == 3 and mode["p50_ms"] == sorted(mode["latency_ms"])[1]
        assert mode["load_max_over_mean"] == 1  # one device
        assert (mode["accuracy_recall"] is None) == (name in ("static", "ideal"))
        assert (mode["planner_ms"] is None) == (name in ("static", "lina", "best", "ideal"))  # one device: no plan could gain
        assert [layer["layer"] for layer in mode["layers"]] == [0, 1, 2]
        assert mode["decode_tokens_per_s"] > 0
    static, ideal = found["modes"]["static"], found["modes"]["ideal"]
    for mode in found["modes"].values():
        assert mode["p50_ratio_to_static"] == pytest.approx(static["p50_ms"] / mode["p50_ms"])
        assert mode["p95_ratio_to_ideal"] == pytest.approx(mode["p95_ms"] / ideal["p95_ms"])
        assert mode["prefill_tokens_per_s"] == pytest.approx(2 * LENGTH / mode["p50_ms"] * 1e3)
    assert np.ptp(ideal["layers"][0]["popularity"]) < 1e-9 < np.ptp(static["layers"][0]["popularity"])


def test_the_gain_trigger_is_measured_before(found: dict[str, Any]) -> None:
    best = found["settings"]["modes"]["best"]
    assert best["trigger"] == "gain" and best["row_us"] > 0 and best["replan_ms"] > 0
    assert found["settings"]["modes"]["window"]["row_us"] == 0
    assert found["settings"]["profile"].startswith("recorded before")


def test_quality_is_the_same_under_every_placement(found: dict[str, Any]) -> None:
    static, best = (found["modes"][name] for name in ("static", "best"))
    assert static["perplexity"] == pytest.approx(best["perplexity"], rel=1e-6)
    assert found["quality_difference"] < 1e-6
    assert found["modes"]["lina"]["perplexity"] is None
    assert static["bits_per_byte"] == pytest.approx(static["loss"] / np.log(2), rel=0.05)  # a token is a byte, ends none


def test_the_report_shows_all_modes_and_needs_nothing_else(found: dict[str, Any]) -> None:
    html, text = page(found), tables(found)
    for name in found["modes"]:
        assert f"</i>{name}</td>" in html and f"\n{name} " in text
    for title in ("Latency", "Load of devices, before and after", "Popularity of experts", "Foresight by layer", "Quality"):
        assert f"<h2>{title}</h2>" in html
    assert html.count("<svg") == html.count("</svg>") == 8
    assert "http" not in html and "<script" not in html and ">nan" not in html and "None" not in html.split("<details>")[0]


@pytest.mark.full
def test_emulated_devices_take_the_time_they_are_told_to(run: Path) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    modes = {name: read_mode(CONF, name) for name in ("static", "best")}
    cluster = ClusterConfig(attention_ms=20.0, experts_ms=30.0)
    slow = evaluate(Evaluation(str(checkpoint), modes, batches=3, sequences=2, length=0, decode=2, cluster=cluster))
    for mode in slow["modes"].values():
        assert mode["p50_ms"] >= 1.02 * 3 * 50  # three layers, one device with all rows
        assert mode["overrun_share"] < 1
    static = slow["modes"]["static"]
    assert [layer["stage_ms"]["experts"] for layer in static["layers"]] == pytest.approx([30.6] * 3, rel=0.3)
    assert slow["settings"]["modes"]["best"]["row_us"] == pytest.approx(30e3 / (2 * LENGTH * 2))
    assert slow["note"].startswith("emulated: devices (attention 20 ms, experts 30 ms a layer")
    assert slow["quality_difference"] < 1e-6


def test_text_is_generated_the_same_for_a_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--prompt", "import ", "--max-tokens", "5"]
    said = []
    for seed in ("1", "1", "2"):
        assert generate.main([*words, "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and all(text.startswith("import ") for text in said)
    assert generate.main([*words, "--tokenizer", "nowhere.model"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_of_a_report_starts_its_ranks_as_it_was_started() -> None:
    words = ["my run", "--batches", "3"]
    own = "python tools/evaluate_gpt_moe.py 'my run' --batches 3"
    member = Member("torchrun", rank=0, world=4, local_rank=0, local_ranks=2, address="a", port=1)
    assert command_of(words, None, {}) == own
    assert command_of(words, member, {}) == f"torchrun --nnodes 2 --nproc-per-node 2 {own.removeprefix('python ')}"
    assert command_of(words, replace(member, launcher="slurm"), {}) == f"srun --nodes 2 --ntasks 4 {own}"
    emulated = command_of(words, member, {"MEGALINA_LINK_MBIT": "200"})
    assert emulated.endswith(f"emulate_cluster.py --nodes 2 --ranks-per-node 2 --link-mbit 200 -- .venv/bin/{own}")


@pytest.mark.full
def test_from_end_to_end_on_two_ranks(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [{"context": "import ", "choices": ["os", "zzz"], "answer": 0}, {"context": "def ", "target": "f"}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    (tmp_path / "text").write_text("from pathlib import Path\n" * 40)
    options = ["--ranks", "2", "--modes", "window,best", "--batches", "2", "--decode", "2", "--out", str(tmp_path / "out")]
    code = main(
        [
            str(run),
            *options,
            "infer.dispatch=once_per_rank",
            "--tasks",
            str(tmp_path / "tasks.jsonl"),
            "--text",
            str(tmp_path / "text"),
        ]
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.html", "eval.json"]
    assert list(found["modes"]) == ["static", "window", "best"] and found["settings"]["ranks"] == 2
    static, best = found["modes"]["static"], found["modes"]["best"]
    assert static["p95_ratio_to_ideal"] is None and static["a2a_ms"] > 0
    assert static["load_max_over_mean"] >= best["load_max_over_mean"] >= 1
    assert static["tasks"]["multiple_choice"]["num_tasks"] == static["tasks"]["cloze"]["num_tasks"] == 1
    assert static["tasks"]["cloze"]["log_likelihood"]["value"] == pytest.approx(
        best["tasks"]["cloze"]["log_likelihood"]["value"], rel=1e-5
    )
    assert found["quality_difference"] < 1e-6
    assert "nothing is emulated" in out and "multiple choice" in out and str(tmp_path / "out" / "eval.json") in out


@pytest.mark.full
def test_a_killed_rank_ends_all_and_is_named(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/evaluate_gpt_moe.py", str(run), "--ranks", "2", "--batches", "100000", "--modes", "static"]
    tool = subprocess.Popen([*command, "--out", str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        ranks: dict[int, int] = {}
        deadline = time.monotonic() + 60
        while not serving(ranks) and time.monotonic() < deadline and tool.poll() is None:
            ranks = dict(children(tool.pid))
            time.sleep(0.1)
        time.sleep(1.0)  # the timed batches have begun
        os.kill(ranks[1], signal.SIGKILL)
        began_s = time.monotonic()
        _, err = tool.communicate(timeout=30)
        assert time.monotonic() - began_s < 10
    finally:
        tool.kill()
    assert tool.returncode == FAILED
    assert "rank 1 of 2 was ended by SIGKILL" in err and "rank 0 was in step 0" in err
    assert not (tmp_path / "out").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def serving(ranks: dict[int, int]) -> bool:
    """Both ranks have all experts before them."""
    return len(ranks) == 2 and all("megalina_experts" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks.values())


def children(parent: int) -> Iterator[tuple[int, int]]:
    """(rank, process) of the ranks that a process has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            names = dict(line.partition("=")[::2] for line in (folder / "environ").read_text().split("\0"))
        except (OSError, UnicodeDecodeError):
            continue
        if "RANK" in names:
            yield int(names["RANK"]), int(folder.name)
