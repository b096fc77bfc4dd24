"""A plan in a file: what a search has found, for other runs of the same model, layout and batch on as many ranks.

A run that chooses a plan writes it to RUN/plan.json; `strategy.plan=RUN/plan.json` gives it to a run that then searches nothing,
such as each job of a sweep, or one that must be deterministic.  JSON: the plan, what it is of, and what was measured.

Questions are what a configuration leaves to measured steps, one after another, where its strategy says auto.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from megalina.blocks.model import step_shape
from megalina.config import BYTES, PretrainConfig
from megalina.layout import readers
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes
from megalina.plan_settings import AUTO, SEARCH, plan_of, strategy_of
from megalina.reference import is_reference
from megalina.step import candidates
from megalina.step.plan import Plan, WrongChecksum
from megalina.step.strategy import Setting, training_step
from megalina.validate_strategy import runs
from megalina.whole_file import write_whole

PLAN_FILE = "plan.json"  # in a run's folder
FREE_OF_SPEED = ("name", "init_std", "norm_eps")  # of the model: whatever they are, a step takes as long
Question = Callable[[Plan], Sequence[Plan]]  # the best plan so far -> alternatives to it


def write_plan(path: Path, config: PretrainConfig, world: int, plan: Plan, *, evidence: str) -> None:
    """Whole or not at all."""
    text = json.dumps({"plan": plan.as_json(), "of": job_of(config, world), "evidence": evidence}, indent=1, allow_nan=False)
    write_whole(path, text + "\n")


def with_plan(config: PretrainConfig, world: int) -> PretrainConfig:
    """The configuration with the numbers of the plan that `strategy.plan` names; the same one where it names none.

    ValueError for a file that isn't a plan, or is one of another model, layout, batch or world, or of another strategy than the
    configuration names; OSError for one that can't be read."""
    strategy = config.strategy
    if not strategy.plan:
        return config
    plan, of = read_plan(Path(strategy.plan))
    here = job_of(config, world)
    if differ := [key for key in here if of.get(key) != here[key]]:
        told = ", ".join(f"{key} is {of.get(key)} there and {here[key]} here" for key in differ[:3])
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        again = SEARCH if strategy.name == SEARCH else AUTO
        raise ValueError(
            f"strategy.plan={strategy.plan} is of another job: {told}{more}; leave it out and search with strategy={again}"
        )
    if strategy.name not in (AUTO, SEARCH, plan.strategy):
        raise ValueError(
            f"strategy.plan={strategy.plan} is a plan of {plan.strategy}: give strategy=auto with it, not {strategy.name}"
        )
    return replace(config, strategy=strategy_of(plan, strategy))


def check_order(config: PretrainConfig, world: int, *, vocab_size: int) -> None:
    """ValueError unless the order of instructions in `strategy.order`, if there is one, is of the list that this configuration
    gives, and where a strategy of your own gives no list that can be run.  `vocab_size`: before padding."""
    own = is_reference(config.strategy.name)
    if not (config.strategy.order or own):
        return
    try:
        training_step(config.strategy.name, setting_of(config, world, vocab_size))
    except ValueError as error:
        if own:
            raise ValueError(f"strategy.name={config.strategy.name} gives no list that can be run: {error}") from None
        told = f"strategy.plan={config.strategy.plan} can't be followed: {error}"
        raise ValueError(f"{told}; search anew with strategy=search") from None


def setting_of(config: PretrainConfig, world: int, vocab_size: int) -> Setting:
    """What a step is built from, without a model; buckets may have other padding than the model's."""
    plan, train = plan_of(config.strategy), config.train
    held = InstructionBytes(config, world, vocab_size=vocab_size, packing=plan.packing, piece_bytes=plan.piece_bytes)
    setting = Setting(
        step_shape(config),
        held.buckets,
        micro_batches=train.global_batch_size // (train.micro_batch_size * readers(held.axes)),
        recompute_mode=train.recompute,
        element_bytes=max(BYTES[train.dtype], 4),
    )
    return setting.under(plan)


def read_plan(path: Path) -> tuple[Plan, Mapping[str, Any]]:
    """A plan and what it is of; ValueError that says what is wrong with what isn't one."""
    plan, wrong = Plan(), ""
    found: Any = None
    try:
        found = json.loads(path.read_text())
        plan = Plan.from_json(found["plan"])
    except (UnicodeDecodeError, RecursionError):
        wrong = "it is no text in JSON"
    except json.JSONDecodeError as error:
        wrong = f"it is no JSON from line {error.lineno}, column {error.colno} on"
    except WrongChecksum:
        wrong = "the order of instructions in its 'plan' is not the one that its checksum is of"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        entry = found.get("plan") if isinstance(found, dict) else None
        names = {f.name for f in fields(Plan)}
        other = [name for name in entry if name not in names] if isinstance(entry, dict) else []
        kind = re.fullmatch(r"(\w+) is no (\w+)", str(error))
        wrong = f"a plan has no {other[0]!r}" if other else "its 'plan' is missing or damaged"
        wrong = f"{kind[1]} of its 'plan' is no {kind[2]}" if kind else wrong
    if not wrong and not isinstance(found.get("of"), dict):
        wrong = "what it is a plan of isn't there under 'of'"
    if wrong:
        raise ValueError(f"strategy.plan={path} is no plan of megalina's, {wrong}: take a {PLAN_FILE} from a run's folder")
    return plan, found["of"]


def job_of(config: PretrainConfig, world: int) -> dict[str, Any]:
    """What a step's list and its times depend on, as flat values: world, model, router, layout, batch."""
    train = config.train
    out: dict[str, Any] = {"world": world}
    for group in ("model", "router", "parallel"):
        values = getattr(config, group)
        assert is_dataclass(values) and not isinstance(values, type)
        out |= {f"{group}.{key}": value for key, value in asdict(values).items() if key not in FREE_OF_SPEED}
    out |= {"strategy.pipeline": config.strategy.pipeline} if config.parallel.pp > 1 else {}
    return out | {f"train.{key}": getattr(train, key) for key in ("micro_batch_size", "global_batch_size", "seq_len", "dtype")}


def questions(config: PretrainConfig, world: int, *, packings: Sequence[int]) -> list[Question]:
    """What `config.strategy` leaves to measured steps, question by question; [] where it leaves nothing.

    `packings`: those that groups were made for, as far as they are worth a trial."""
    strategy = config.strategy
    asked: list[Question] = []
    if strategy.name == AUTO:
        zero = bool(config.parallel.zero)
        asked += [lambda best: candidates.winners(zero=zero), lambda best: candidates.packed(best, packings)]
    elif strategy.packing == AUTO:
        asked.append(lambda best: [replace(best, packing=k) for k in packings])
    if strategy.chunks == AUTO:
        asked.append(candidates.in_chunks)
    if strategy.partition_bytes == AUTO or (strategy.name == AUTO and not config.parallel.zero):  # shards belong to pieces
        asked.append(candidates.in_pieces)
    if strategy.name == AUTO:
        asked += [candidates.yielding, candidates.with_late_layers, candidates.with_deferred_weights, candidates.with_partition]
        asked += [candidates.in_parts, candidates.joined]
        asked.append(lambda best: candidates.packed(best, packings))  # again, with what was found since
    return [_that_run(question, config, world) for question in asked]


def _that_run(question: Question, config: PretrainConfig, world: int) -> Question:
    """Without alternatives that this configuration can't run."""
    return lambda best: [plan for plan in question(best) if runs(config, plan, world)]
