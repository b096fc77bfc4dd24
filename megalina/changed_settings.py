"""The settings that a run changes when it goes on: which may, which need a word, and which can't.

Pure: two configurations in, rows out.  What a setting may do is one table here; every setting of the schema has a row in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from megalina.config import PretrainConfig

SHOWN = 3  # of the settings that differ, in an error
LONGEST = 200  # characters of a value that are shown


class Kind(Enum):
    """What a change of a setting does to a run that goes on from a checkpoint."""

    START = "it belongs to one start of the run"  # where, how long, from what: not reported
    FREE = "the run goes on and says so"
    MEANING = "the order of the data or the meaning of the saved state changes"  # train.allow_changes=true
    STATE = "the saved state is not what this run needs"


MEANINGS_OF_POSITIONS = (  # of the model: they say what weights are used for
    *("window", "full_attention_every", "rotary_fraction", "rope_theta", "rope_scaling", "rope_factor"),
    *("rope_original_positions", "rope_beta_fast", "rope_beta_slow", "rope_truncate"),
    *("rope_mscale", "rope_mscale_all_dim", "rope_attention_factor"),
)
# The longest row that a setting's name is, or begins with, counts.
KINDS: Mapping[str, Kind] = {
    "run": Kind.START,
    "launch": Kind.FREE,
    "launch.dry_run": Kind.START,
    "launch.restarts": Kind.START,
    "model": Kind.STATE,
    "model.name": Kind.FREE,
    "model.norm_eps": Kind.MEANING,
    **{f"model.{name}": Kind.MEANING for name in MEANINGS_OF_POSITIONS},
    "model.max_positions": Kind.MEANING,  # learned positions: STATE, see `kind_of`
    "model.vocab_size": Kind.MEANING,  # the tensors tell whether it fits: 0 may be the same number
    "model.init_std": Kind.MEANING,
    "model.dropout": Kind.MEANING,
    "model.mtp_loss": Kind.MEANING,
    "router": Kind.MEANING,
    "router.kind": Kind.STATE,
    "router.bias": Kind.STATE,
    "router.capacity_bound": Kind.STATE,  # the delta that capacity follows
    "router.replay": Kind.FREE,
    "router.replay_validation": Kind.FREE,
    "parallel": Kind.FREE,
    "strategy": Kind.FREE,
    "optim": Kind.FREE,
    "optim.name": Kind.STATE,
    "optim.muon_routers": Kind.STATE,  # which state a router has
    "schedule": Kind.FREE,
    "data": Kind.MEANING,
    "data.cache_dir": Kind.FREE,
    "data.tokenizer": Kind.FREE,
    "data.skip_samples": Kind.FREE,
    "tracker": Kind.FREE,
    "cluster": Kind.FREE,
    "train": Kind.FREE,
    "train.seq_len": Kind.MEANING,
    "train.dtype": Kind.MEANING,  # with bfloat16 on one side: STATE, see `kind_of`
    "train.seed": Kind.MEANING,
    "train.resume": Kind.START,
    "train.allow_changes": Kind.START,
    "train.init_from": Kind.START,
    "train.exit_step": Kind.START,
    "train.max_minutes": Kind.START,
    "checkpoint": Kind.FREE,
    "guard": Kind.FREE,
    "hang": Kind.FREE,
    "timeline": Kind.FREE,
    "profile": Kind.FREE,
    "eval": Kind.FREE,
}


@dataclass(frozen=True, slots=True)
class Change:
    setting: str  # dotted
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.setting} {_text(self.old)} -> {_text(self.new)}"


def changes(saved: Mapping[str, Any], config: PretrainConfig) -> list[Change]:
    """What differs between the configuration in a checkpoint, nested, and this one, in the order of the schema.

    A setting that the checkpoint doesn't know had its default; one that this version doesn't know is left out."""
    default, before, now = flat(asdict(PretrainConfig())), flat(saved), flat(asdict(config))
    pairs = {key: (before.get(key, default[key]), value) for key, value in now.items()}
    positions = config.model.positions
    found = [Change(k, old, new, kind_of(k, old, new, positions=positions)) for k, (old, new) in pairs.items() if old != new]
    return [change for change in found if change.kind is not Kind.START]


def kind_of(setting: str, old: Any, new: Any, *, positions: str = "rope") -> Kind:
    """KeyError for a setting without a row."""
    if setting == "train.dtype" and "bfloat16" in (old, new):  # which has master weights besides
        return Kind.STATE
    if setting == "model.max_positions" and positions == "learned":
        return Kind.STATE
    if setting == "router.bias_update_rate" and not (old and new):  # without it there is no selection bias
        return Kind.STATE
    return KINDS[row_of(setting)]


def row_of(setting: str) -> str:
    """The row of `KINDS` that counts for a setting.  KeyError where there is none."""
    words = setting.split(".")
    for count in range(len(words), 0, -1):
        if (row := ".".join(words[:count])) in KINDS:
            return row
    raise KeyError(setting)


def check_changes(path: object, saved: Mapping[str, Any], config: PretrainConfig) -> list[Change]:
    """The settings with which a run goes on from the checkpoint `path` otherwise than it was made.

    ValueError where that can't be, or needs `train.allow_changes`."""
    found = changes(saved, config)
    if stuck := [change for change in found if change.kind is Kind.STATE]:
        model = any(change.setting.startswith(("model.", "router.")) for change in stuck)
        what = "another model" if model else "another optimizer or number type"
        weights = "" if model else f", from its weights alone with train.init_from={path}"
        raise ValueError(
            f"checkpoint {path} is of {what}: {some(stuck)}: set back what differs, or start anew in another run.dir{weights}"
        )
    meaning = [change for change in found if change.kind is Kind.MEANING]
    if meaning and not config.train.allow_changes:
        raise ValueError(
            f"checkpoint {path} is of another run: {some(meaning)}: this changes the order of the data or what the saved state "
            "means; set it back, go on all the same with train.allow_changes=true, or start anew in another run.dir"
        )
    return found


def some(found: Sequence[Change]) -> str:
    """The first ones, for an error."""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(map(str, found[:SHOWN])) + more


def change_line(step: int, pairs: Mapping[str, Sequence[Any]]) -> str:
    """One line about a run that goes on after `step`; `pairs`: old and new value by setting, as `as_json` has them."""
    return f"changed since step {step}: " + ", ".join(f"{k} {_text(old)} -> {_text(new)}" for k, (old, new) in pairs.items())


def as_json(found: Sequence[Change]) -> dict[str, list[Any]]:
    """Old and new value by setting."""
    return {change.setting: [change.old, change.new] for change in found}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their dotted names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    text = str(value) or "''"
    return text if len(text) <= LONGEST and "\n" not in text else f"{text.splitlines()[0][:LONGEST]}..."
