"""A job that can't go on is explained within seconds, with places and call sites, and ended; a slow one is left alone."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from megalina import worker
from megalina.comm import exchange
from megalina.config import PretrainConfig
from megalina.data.source import PackedSamples
from megalina.launch import later_starts
from megalina.parallel.functions import InstructionFunctions
from megalina.parallel.trainable import Trainable
from megalina.step.program import Instruction, Kind, Op
from megalina.train.board import StoreBoard
from megalina.train.trainer import train
from tests.train.forked_ranks import Outcome, run_job
from tests.train.small_run import config_of, write_tokens

TIMEOUT_S = 2.0
WITHIN_S = 10.0
FAULT_STEP = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_tokens(path / "tokens")
    return path


@pytest.fixture
def job(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`job(plant, *arguments, **settings)`: a run on two ranks; `plant(rank, mark, *arguments)` is called on each beforehand.

    `mark()` is for the plant to call when its fault begins: from then on the time is taken."""

    def run(plant: Callable[..., None], *arguments: Any, restarts: int = 0, **settings: Any) -> Outcome:
        name = "_".join([plant.__name__, *(str(a) for a in arguments if isinstance(a, int))])
        config = config_of(folder, name, **{"ep": 2, "steps": 4, **settings})
        config.hang.timeout_s = TIMEOUT_S
        run_dir = Path(config.run.dir)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        next_start = later_starts(run_dir / "checkpoints", config.train.resume)

        def again() -> tuple[list[str], str]:
            resume, origin = next_start()
            return [resume], origin

        outcome = run_job(monkeypatch, capsys, run_dir, rank_of_job, run_dir, plant, arguments, restarts=restarts, again=again)
        if (run_dir / "mark").exists():
            outcome.seconds = time.time() - (run_dir / "mark").stat().st_mtime
        return outcome

    return run


def rank_of_job(rank: int, resume: list[str], run_dir: Path, plant: Callable[..., None], arguments: Sequence[Any]) -> int:
    plant(rank, lambda: (run_dir / "mark").touch(), *arguments)
    return worker.main([str(run_dir / "config.yaml"), *resume], checked)


def explained(outcome: Outcome, *texts: str) -> str:
    """The explanation, of which there must be one, in time."""
    assert outcome.error
    for text in texts:
        assert outcome.text.count(text) == 1, f"{text!r} occurs {outcome.text.count(text)} times in\n{outcome.text}"
    assert outcome.seconds < WITHIN_S
    return outcome.text


def checked(config: PretrainConfig) -> dict[str, Any]:
    """Train, and leave word of whether the step that failed has changed a weight."""
    run_step, rank = Trainable.step, os.environ["RANK"]

    def step(self: Trainable, *arguments: Any, **named: Any) -> Any:
        before = [p.detach().clone() for p in self.gpt.parameters()]
        try:
            return run_step(self, *arguments, **named)
        except Exception:
            same = all(torch.equal(a, b) for a, b in zip(before, self.gpt.parameters(), strict=True))
            (Path(config.run.dir) / f"weights.{rank}").write_text("same" if same else "changed")
            raise

    Trainable.step = step
    return train(config)


def before_experts(fault: Callable[[], None], *, on: int, times: int = 1) -> Callable[[int], None]:
    """Plant `fault` in an instruction function of step FAULT_STEP on rank `on`."""
    left = [times]

    def faulty(self: InstructionFunctions) -> None:
        if self.mesh.world.rank == on and self.log.position.step == FAULT_STEP and left[0]:
            left[0] -= 1
            fault()

    before(faulty, "experts")


def before(act: Callable[[InstructionFunctions], None], *names: str) -> None:
    """`act` comes before the functions of these instructions."""
    functions_of = InstructionFunctions.__call__

    def functions(self: InstructionFunctions, instruction: Instruction) -> Callable[..., Any]:
        function = functions_of(self, instruction)

        def acted(*arguments: Any) -> Any:
            act(self)
            return function(*arguments)

        return acted if instruction.name in names else function

    InstructionFunctions.__call__ = functions


def sleeps(rank: int, mark: Callable[[], None]) -> None:
    def sleep() -> None:
        mark()
        time.sleep(60)

    before_experts(sleep, on=1)


def loops(rank: int, mark: Callable[[], None]) -> None:
    def loop() -> None:
        mark()
        while True:
            pass

    before_experts(loop, on=0)


def signals_itself(rank: int, mark: Callable[[], None], on: int, number: int) -> None:
    def send() -> None:
        mark()
        os.kill(os.getpid(), number)

    before_experts(send, on=on)


def raises(rank: int, mark: Callable[[], None]) -> None:
    def fail() -> None:
        mark()
        raise KeyError("the lost key")

    before_experts(fail, on=1)


def sleeps_outside(rank: int, mark: Callable[[], None]) -> None:
    run_step = Trainable.step

    def step(self: Trainable, *arguments: Any, **named: Any) -> Any:
        if rank == 1 and self.log.position.step == FAULT_STEP:
            mark()
            time.sleep(60)
        return run_step(self, *arguments, **named)

    Trainable.step = step


def never_reads(rank: int, mark: Callable[[], None]) -> None:
    """The sequences of step FAULT_STEP, which are read ahead, never come on rank 1."""
    read, calls = PackedSamples.batch, []

    def batch(self: PackedSamples, first: int, count: int, stride: int = 1) -> Any:
        calls.append(first)
        if rank == 1 and len(calls) == FAULT_STEP:
            mark()
            time.sleep(60)
        return read(self, first, count, stride)

    PackedSamples.batch = batch


def swaps_buckets(rank: int, mark: Callable[[], None]) -> None:
    """Rank 1 sends the gradients of two layers, which are of one size, in the other order."""
    make = Trainable.__init__

    def init(self: Trainable, *arguments: Any, **settings: Any) -> None:
        make(self, *arguments, **settings)
        if rank == 1:
            program = list(self.program)
            a, b = (
                i for i, s in enumerate(program) if s.op is Op.GRADS and s.kind is Kind.START and s.name in ("dense.0", "dense.1")
            )
            program[a], program[b] = program[b], program[a]
            self.run_with(tuple(program), self.functions)

    Trainable.__init__ = init


def sends_another_size(rank: int, mark: Callable[[], None]) -> None:
    start_sum = exchange.start_sum

    def start(x: torch.Tensor, axis: Any, log: Any) -> Any:
        if rank == 1 and log.position.tag == "U:divisor>.-.0" and log.position.step == FAULT_STEP:
            mark()
            x = torch.cat([x, x])
        return start_sum(x, axis, log)

    exchange.start_sum = start


def sends_other_splits(rank: int, mark: Callable[[], None]) -> None:
    all_to_all = exchange.start_all_to_all

    def start(x: torch.Tensor, send: list[int], receive: list[int], axis: Any, log: Any) -> Any:
        position = log.position
        if rank == 1 and position.step == FAULT_STEP and position.tag == "F:dispatch>.0.0":
            mark()
            receive = [receive[0] + 3, *receive[1:]]
        return all_to_all(x, send, receive, axis, log)

    exchange.start_all_to_all = start


def swaps_messages(rank: int, mark: Callable[[], None]) -> None:
    """The first stage sends the streams of two micro-batches in the other order."""
    make = Trainable.__init__

    def init(self: Trainable, *arguments: Any, **settings: Any) -> None:
        make(self, *arguments, **settings)
        if rank == 0:
            program = list(self.program)
            sent = [i for i, s in enumerate(program) if s.op is Op.SEND and s.kind is Kind.START and s.part in ("0", "1")]
            first = program.pop(sent[0])
            wait = next(i for i, s in enumerate(program) if s.op is Op.SEND and s.kind is Kind.WAIT and s.part == "0")
            program[sent[1] : sent[1]] = [first, program.pop(wait)]
            self.run_with(tuple(program), self.functions)

    Trainable.__init__ = init


def loses_a_message(rank: int, mark: Callable[[], None]) -> None:
    send = exchange.start_send

    def start(x: torch.Tensor, name: str, axis: Any, log: Any) -> Any:
        if rank == 0 and log.position.step == FAULT_STEP and name == "x>.2.1":
            mark()
            return exchange.Pending(None, lambda: x)
        return send(x, name, axis, log)

    exchange.start_send = start


def stops_in_a_send(rank: int, mark: Callable[[], None]) -> None:
    """The first stage doesn't come back from sending the stream of micro-batch 1."""
    send = exchange.start_send

    def start(x: torch.Tensor, name: str, axis: Any, log: Any) -> Any:
        if rank == 0 and log.position.step == FAULT_STEP and name == "x>.2.1":
            mark()
            time.sleep(60)
        return send(x, name, axis, log)

    exchange.start_send = start


def waits_alone(rank: int, mark: Callable[[], None]) -> None:
    """Rank 1 waits for a sum that nobody else has asked for."""
    asked: list[int] = []

    def one_more(self: InstructionFunctions) -> None:
        if rank == 1 and self.log.position.step == FAULT_STEP and not asked:
            asked.append(1)
            mark()
            exchange.start_sum(torch.zeros(4), self.mesh.world, self.log).wait()

    before(one_more, "experts")


def computes_long(rank: int, mark: Callable[[], None]) -> None:
    """Rank 1 takes its time in three instructions, while rank 0 waits for it in one, for longer than the time-out."""

    def slow(self: InstructionFunctions) -> None:
        position = self.log.position
        if rank == 1 and position.step == FAULT_STEP and position.tag.endswith((".-.0", ".0.0")):
            time.sleep(TIMEOUT_S / 2)

    before(slow, "embed", "attention", "route")
    claim = StoreBoard.claim
    StoreBoard.claim = lambda self, number: (mark(), claim(self, number))[1]


@pytest.mark.full
def test_a_rank_that_sleeps_in_an_instruction_is_named_with_its_stack(job: Callable[..., Outcome], folder: Path) -> None:
    text = explained(job(sleeps), "no rank has made progress", "rank 1 computes in instruction F:experts.0.0 of step 2")
    assert text.count("time.sleep(60)") == 1
    assert "rank 0 waits in instruction F:combine<.0.0 of step 2" in text
    assert "on axis ep (all-to-all), which rank 1 has not submitted" in text
    for rank in range(2):
        report = (folder / "sleeps" / "logs" / f"hang_rank_{rank}.txt").read_text()
        assert "last collectives:\n" in report
        assert "all-to-all in instruction F:dispatch>.0.0 of step 2 (torch.float32, uneven of [32])" in report


def test_a_rank_in_an_endless_loop_is_named_with_its_stack(job: Callable[..., Outcome]) -> None:
    explained(job(loops), "no rank has made progress", "rank 0 computes in instruction F:experts.0.0 of step 2", "while True:")


@pytest.mark.full
def test_a_rank_that_does_not_come_back_to_its_program_is_named_with_its_stack(job: Callable[..., Outcome]) -> None:
    text = explained(job(sleeps_outside), "rank 1 is outside of the instructions, in step 2", "time.sleep(60)")
    assert "rank 0 waits in instruction F:counts<" in text


@pytest.mark.full
def test_a_rank_whose_sequences_never_come_is_named_with_the_stack_of_their_reader(job: Callable[..., Outcome]) -> None:
    text = explained(job(never_reads), "rank 1 is outside of the instructions, in step 2", "time.sleep(60)")
    assert "in never_reads" in text or "in batch" in text
    assert "rank 0 waits in instruction F:counts<" in text or "rank 0 waits in instruction U:divisor<" in text


@pytest.mark.full
def test_a_rank_that_waits_for_a_collective_of_its_own_is_shown_in_it(job: Callable[..., Outcome]) -> None:
    text = explained(
        job(waits_alone), "no rank has made progress", "exchange.start_sum(torch.zeros(4), self.mesh.world, self.log).wait()"
    )
    assert "rank 0 waits in instruction F:combine<.0.0" in text


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])  # rank 0 has the store: it stops as well
def test_a_stopped_rank_is_said_to_be_silent(job: Callable[..., Outcome], rank: int) -> None:
    text = explained(job(signals_itself, rank, int(signal.SIGSTOP)), f"rank {rank} does not answer: its process is stopped")
    assert "it was last in step 2, instruction F:experts.0.0" in text
    assert text.count(f"rank {1 - rank} waits in instruction F:combine<.0.0 of step 2") == 1


def test_a_killed_rank_is_named_with_its_place_and_nothing_is_updated(job: Callable[..., Outcome], folder: Path) -> None:
    outcome = job(signals_itself, 1, int(signal.SIGKILL))
    explained(outcome, "rank 1 of 2 was ended by SIGKILL (out of memory?) in step 2, instruction F:experts.0.0")
    assert "rank 0 was in step 2, instruction F:combine<.0.0" in outcome.error
    assert (folder / "signals_itself_1_9" / "weights.0").read_text() == "same"


def test_a_rank_that_raises_is_shown_and_not_the_one_that_lost_it(job: Callable[..., Outcome]) -> None:
    outcome = job(raises)
    explained(outcome, "rank 1 of 2 failed with exit code 1 in step 2, instruction F:experts.0.0", "KeyError: 'the lost key'")
    assert "closed by peer" not in outcome.text and "reset by peer" not in outcome.text


def test_gradients_that_gloo_mixes_up_in_silence_are_caught_before_the_update(job: Callable[..., Outcome], folder: Path) -> None:
    outcome = job(swaps_buckets)
    found = explained(outcome, "collectives in step 1; nothing was updated", "is not the same on all ranks")
    assert "rank 0: sum in instruction B:dense.1>" in found and "rank 1: sum in instruction B:dense.0>" in found
    assert found.count("megalina/parallel/executor.py:") >= 2
    assert [(folder / "swaps_buckets" / f"weights.{rank}").read_text() for rank in range(2)] == ["same", "same"]


def test_another_size_on_one_rank_is_explained_though_gloo_ends_the_process(job: Callable[..., Outcome]) -> None:
    outcome = job(sends_another_size)
    explained(outcome, "is not the same on all ranks")
    assert "rank 0: sum in instruction U:divisor>.-.0 of step 2 (torch.float64, 4 rows of [])" in outcome.text
    assert "rank 1: sum in instruction U:divisor>.-.0 of step 2 (torch.float64, 8 rows of [])" in outcome.text


@pytest.mark.full
def test_split_sizes_that_do_not_match_are_explained(job: Callable[..., Outcome]) -> None:
    text = explained(job(sends_other_splits), "on axis ep has sizes that don't match", "rank 0 sends", "rank 1 receives")
    assert "all-to-all in instruction F:dispatch>.0.0 of step 2" in text


@pytest.mark.full
def test_a_slow_rank_is_looked_into_and_left_alone(job: Callable[..., Outcome], folder: Path) -> None:
    outcome = job(computes_long)
    assert outcome.error == ""
    assert (folder / "computes_long" / "mark").exists(), "nobody was alarmed: the test shows nothing"
    assert "stands still" not in outcome.text
    assert not list((folder / "computes_long" / "logs").glob("hang_*"))


def killed_once(rank: int, mark: Callable[[], None], flag: Path) -> None:
    """Rank 1 is killed in step 3 of the first start."""
    run_step = Trainable.step

    def step(self: Trainable, *arguments: Any, **named: Any) -> Any:
        if rank == 1 and self.log.position.step == 3 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return run_step(self, *arguments, **named)

    Trainable.step = step


def nothing(rank: int, mark: Callable[[], None]) -> None:
    """No fault."""


@pytest.mark.full
def test_a_lost_rank_changes_no_number_of_a_run_with_restarts(job: Callable[..., Outcome], folder: Path) -> None:
    outcome = job(killed_once, folder / "killed", restarts=2, interval=2, resume="none")
    assert outcome.error == ""
    assert outcome.text.count("rank 1 of 2 was ended by SIGKILL") == 1
    assert outcome.text.count("start 2 of 3, from checkpoint step_00000002") == 1
    assert (folder / "killed_once" / "logs" / "start_1" / "rank_1.log").is_file()
    assert job(nothing).error == ""
    lost, whole = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("killed_once", "nothing")
    )
    for key in ("step", "loss", "grad_norm", "consumed_samples"):
        assert [record[key] for record in lost] == [record[key] for record in whole]


PIPELINE = {"ep": 1, "pp": 2, "micro_batch_size": 2}


@pytest.mark.full
def test_messages_of_a_pipeline_that_change_places_are_caught_before_the_update(
    job: Callable[..., Outcome], folder: Path
) -> None:
    found = explained(job(swaps_messages, **PIPELINE), "on axis pp0-1 is not the same on all ranks")
    assert "rank 0: message in instruction F:stream>.2.1" in found and "rank 1: message in instruction F:stream>.2.0" in found
    assert [(folder / "swaps_messages" / f"weights.{rank}").read_text() for rank in range(2)] == ["same", "same"]


@pytest.mark.full
def test_a_message_that_never_leaves_its_stage_is_named(job: Callable[..., Outcome]) -> None:
    text = explained(job(loses_a_message, **PIPELINE), "no rank has made progress", "on axis pp0-1 is not the same on all ranks")
    assert "rank 1 waits in instruction F:stream<.2.1 of step 2" in text


@pytest.mark.full
def test_a_stage_that_stops_in_the_middle_of_a_send_is_named_with_the_one_that_waits_for_it(job: Callable[..., Outcome]) -> None:
    text = explained(
        job(stops_in_a_send, **PIPELINE),
        "no rank has made progress",
        "rank 0 computes in instruction F:stream>.2.1 of step 2",
        "time.sleep(60)",
        "rank 1 waits in instruction F:stream<.2.1 of step 2",
    )
    assert "on axis pp0-1 (message), which rank 0 has not submitted" in text


@pytest.mark.full
def test_a_killed_stage_is_named_and_the_other_changes_nothing(job: Callable[..., Outcome], folder: Path) -> None:
    outcome = job(signals_itself, 0, int(signal.SIGKILL), **PIPELINE)
    explained(outcome, "rank 0 of 2 was ended by SIGKILL (out of memory?) in step 2, instruction F:experts.0.0")
    assert (folder / "signals_itself_0_9" / "weights.1").read_text() == "same"
