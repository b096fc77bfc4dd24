"""One rank of an evaluation: python -m megalina.evaluate.worker SPEC, with torchrun's variables."""

import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.collective_log import CollectiveLog
from megalina.config import ClusterConfig, InferConfig
from megalina.data.tokenizer import Tokenizer, open_tokenizer
from megalina.evaluate.emulation import device_of, emulated_parts, emulation_note, full_batch
from megalina.evaluate.interleaved import Competitor, run_interleaved, timed
from megalina.evaluate.measures import DEFINITIONS, STATIC, measure
from megalina.evaluate.perplexity import HeldOut, held_out_quality, open_held_out, read_documents, text_quality
from megalina.evaluate.profile import MOST_TOKENS, find_or_record
from megalina.evaluate.request_text import ServedText, given_text, text_of_run
from megalina.evaluate.tasks import read_tasks, score_tasks
from megalina.mesh import build_mesh
from megalina.rank_files import REFUSED, collectives_path, position_path, traceback_path
from megalina.serve.calibration import calibrated
from megalina.serve.engine import Engine
from megalina.serve.expert_memory import num_device_bytes
from megalina.serve.load_engine import Opened, open_checkpoint

DECODE_ROUNDS = 3
LINE_EVERY_S = 10.0  # where stderr is no terminal


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is to be done; the same on all ranks."""

    checkpoint: str
    modes: Mapping[str, InferConfig]  # `static` among them
    batches: int  # timed, of each mode
    sequences: int  # of a rank in a batch
    length: int  # tokens of a sequence; 0: as the model was trained, or all that it reads of a text
    decode: int  # tokens after each prompt; 0: none
    tasks: str = ""  # JSON lines
    text: str = ""  # "": the run's held-out text
    logs: str = ""  # folder in which a rank leaves why it ended
    out: str = ""  # JSON, written by rank 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the command, for the report
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # of an emulated device, if it asks for one

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Evaluation":
        values = json.loads(text)
        modes = {name: InferConfig(**config) for name, config in values.pop("modes").items()}
        return Evaluation(modes=modes, cluster=ClusterConfig(**values.pop("cluster")), **values)


@dataclass(frozen=True, slots=True)
class Judge:
    """How well a model writes, whatever its experts' placement: it should not matter."""

    evaluation: Evaluation
    held_out: HeldOut | None  # None: `documents`
    documents: Sequence[str]
    tokenizer: Tokenizer | None
    max_positions: int

    def quality(self, engine: Engine, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """`loss` (nats a token), `perplexity`, `bits_per_byte` and `tasks`, the same on every rank."""
        size = self.evaluation.sequences
        if self.held_out is not None:
            found = held_out_quality(engine, self.held_out, batch_size=size, progress=progress)
        else:
            assert self.tokenizer is not None
            found = text_quality(
                engine,
                self.documents,
                self.tokenizer,
                batch_size=size,
                max_positions=self.max_positions,
                progress=progress,
            )
        if not math.isfinite(found.loss):
            raise ValueError(f"the loss is {found.loss} nats a token: the weights of {self.evaluation.checkpoint} are no good")
        tasks = None
        if self.evaluation.tasks:
            assert self.tokenizer is not None
            asked = read_tasks(Path(self.evaluation.tasks))
            scores = score_tasks(engine, self.tokenizer, asked, batch_size=size, max_positions=self.max_positions)
            tasks = asdict(scores)
        return {
            "loss": found.loss,
            "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
            "bits_per_byte": found.bits_per_byte,
            "tasks": tasks,
        }  # fmt: skip


class Progress:
    """A line on stderr: the parts of the work, and the time that is left if all go on as fast."""

    def __init__(self, parts: Mapping[str, float], *, on: bool):
        """`parts`: how much work each is, in any unit."""
        self._parts, self._on = dict(parts), on
        self._began_s = self._shown_s = time.monotonic()

    def of(self, part: str) -> Callable[[int, int], None]:
        return lambda done, total: self.show(part, done, total)

    def show(self, part: str, done: int, total: int, what: str = "") -> None:
        now_s, terminal = time.monotonic(), sys.stderr.isatty()
        if not self._on or (not terminal and now_s - self._shown_s < LINE_EVERY_S):
            return
        self._shown_s = now_s
        names = list(self._parts)
        before = sum(self._parts[name] for name in names[: names.index(part)])
        share = (before + self._parts[part] * done / max(1, total)) / sum(self._parts.values())
        left = f", {(now_s - self._began_s) / share * (1 - share):.0f} s left" if share > 0 else ""
        line = f"{part} {done}/{total}, {share:.0%}{left}  {what}"
        print(f"\r{line:78.78s}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._on and sys.stderr.isatty():
            print(file=sys.stderr)


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """What was found, as eval.json has it, the same on every rank; all call it together, in a process group unless alone."""
    began_s = time.monotonic()
    mesh = build_mesh(ep=dist.get_world_size() if dist.is_initialized() else 1)
    log = CollectiveLog(mesh.world.rank)
    if evaluation.logs:  # they show where a rank was when it was lost
        log.position.mirror(position_path(Path(evaluation.logs), mesh.world.rank))
        log.mirror(collectives_path(Path(evaluation.logs), mesh.world.rank))
    checkpoint = Path(evaluation.checkpoint)
    per_node = devices_per_node(os.environ, mesh.world.size)
    opened = open_checkpoint(checkpoint, mesh, log=log, devices_per_node=per_node, infer=evaluation.modes[STATIC])
    judge, text = _texts(evaluation, opened)
    judged = judged_modes(evaluation.modes)
    work = (evaluation.batches + 1) * evaluation.sequences * text.length * len(evaluation.modes)
    parts = {"profile": MOST_TOKENS / mesh.world.size, "interleaved runs": 1.5 * work}
    parts |= {f"quality of {name}": float(_judged_tokens(judge, mesh.world.size)) for name in judged}
    progress = Progress(parts, on=mesh.world.rank == 0)
    profile, profile_text = find_or_record(checkpoint, opened, text, progress=progress.of("profile"))
    room = opened.loaded.max_positions - evaluation.decode - 1
    decoded = range(DECODE_ROUNDS if evaluation.decode else 0)
    prompts = [text.prompts(number, evaluation.sequences, room=room) for number in decoded]
    first = text.timed(0, evaluation.sequences)
    gpt = opened.loaded.gpt
    device = full_batch(evaluation.cluster, gpt.config, gpt.router, sequences=evaluation.sequences, length=text.length)
    modes = evaluation.modes
    if device is not None:  # what a row costs there is known
        modes = {n: replace(c, row_us=c.row_us or device.row_us) if c.trigger == "gain" else c for n, c in modes.items()}
    configs = {name: calibrated(config, opened, profile, first) for name, config in modes.items()}
    competitors = []
    for name, config in configs.items():
        policy, planner = timed(opened.policy(config, profile))
        competitors.append(Competitor(name, opened.engine(config, policy, device=device_of(device)), planner))
    try:
        run_interleaved(
            competitors,
            lambda number: text.timed(number, evaluation.sequences),
            prompts,
            rounds=evaluation.batches,
            decode=evaluation.decode,
            max_positions=opened.loaded.max_positions,
            progress=lambda done, total, name: progress.show("interleaved runs", done, total, name),
        )
        measured = measure(competitors, opened.loaded.gpt.moe_layers, opened.served.top_k)
        quality = {c.name: judge.quality(c.engine, progress.of(f"quality of {c.name}")) for c in competitors if c.name in judged}
    finally:
        progress.end()
        for competitor in competitors:
            competitor.engine.close()
    none = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "tasks"))
    model, expert_bytes = opened.loaded.gpt.config, opened.host.shape.num_bytes
    memory_mb = {name: num_device_bytes(c, opened.served, model, expert_bytes) / 1e6 for name, c in configs.items()}
    losses = [quality[name]["loss"] for name in quality]
    emulated = emulated_parts(device, os.environ)
    return {
        "modes": {
            name: (quality.get(name) or none) | asdict(found) | {"expert_mb": memory_mb[name]} for name, found in measured.items()
        },
        "quality_difference": (max(losses) - min(losses)) / min(losses),
        "settings": {
            **evaluation.settings,
            "checkpoint": str(checkpoint),
            "step": opened.loaded.step,
            "model": asdict(model),
            "top_k": opened.served.top_k,
            "ranks": mesh.world.size,
            "ranks_per_node": per_node or mesh.world.size,
            "emulated": emulated,
            "machine": machine(),
            "host_expert_mb": opened.host.num_layers * opened.host.num_experts * expert_bytes / 1e6,
            "batches": evaluation.batches,
            "sequences": evaluation.sequences,
            "tokens_a_sequence": text.length,
            "decode": evaluation.decode,
            "text": evaluation.text or "held out of the run",
            "tasks": evaluation.tasks,
            "profile": profile_text,
            "modes": {name: asdict(config) for name, config in configs.items()},
            "took_s": time.monotonic() - began_s,
        },
        "definitions": DEFINITIONS,
        "note": emulation_note(emulated),
    }


def devices_per_node(environ: Mapping[str, str], world: int) -> int:
    """As torchrun tells; 0: all are on one node, or nodes have different numbers."""
    local = int(environ.get("LOCAL_WORLD_SIZE", world))
    return local if local < world and world % local == 0 else 0


def machine() -> str:
    """What the ranks run on, in words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{cores} {'core' if cores == 1 else 'cores'} of {processor}, torch {torch.__version__}"


def judged_modes(modes: Mapping[str, InferConfig]) -> list[str]:
    """Whose quality is measured: static's, and that of best, or of the last mode in which text means something."""
    meant = [name for name, config in modes.items() if not config.even_routing]
    return list(dict.fromkeys([STATIC, "best" if "best" in meant else meant[-1]]))


def _texts(evaluation: Evaluation, opened: Opened) -> tuple[Judge, ServedText]:
    loaded, world = opened.loaded, opened.mesh.world
    tokenizer = open_tokenizer(loaded.tokenizer_path) if loaded.tokenizer_path else None
    if not evaluation.text:
        held_out = open_held_out(Path(evaluation.checkpoint))
        judge = Judge(evaluation, held_out, (), tokenizer, loaded.max_positions)
        return judge, text_of_run(held_out, world, length=evaluation.length)
    assert tokenizer is not None
    documents = read_documents(Path(evaluation.text))
    judge = Judge(evaluation, None, documents, tokenizer, loaded.max_positions)
    return judge, given_text(documents, tokenizer, world, length=evaluation.length or loaded.max_positions)


def _judged_tokens(judge: Judge, world: int) -> int:
    """About so many of each rank."""
    if judge.held_out is not None:
        return judge.held_out.num_sequences * judge.max_positions // world
    return sum(map(len, judge.documents)) // 4 // world


def work(evaluation: Evaluation) -> dict[str, Any]:
    """`evaluate` on this rank, in a process group from torchrun's variables."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=600))
    found = evaluate(evaluation)
    if world > 1:
        dist.destroy_process_group()
    return found


def main(spec_path: str) -> int:
    evaluation = Evaluation.from_json(Path(spec_path).read_text())
    return in_process(lambda: work(evaluation), logs=Path(evaluation.logs), out=Path(evaluation.out))


def in_process(find: Callable[[], dict[str, Any]], *, logs: Path, out: Path) -> int:
    """The rank's process under our own launcher, which shows why the rank ended that failed first; rank 0 writes what it has
    found to `out`."""
    rank = int(os.environ["RANK"])
    try:
        found = find()
        if rank == 0:
            out.write_text(json.dumps(found, allow_nan=False))
    except Exception as error:  # noqa: BLE001  the launcher shows it
        refused = isinstance(error, ValueError | OSError) and not isinstance(error, ConnectionError)
        traceback_path(logs, rank).write_text(str(error) if refused else traceback.format_exc())
        return REFUSED if refused else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
