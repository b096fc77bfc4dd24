"""What a configuration reads, records and evaluates: checks of `data`, `profile` and `eval`."""

import math

from megalina.blocks.routers import capacity_text, kind_of
from megalina.config import LOCAL_TASKS, DataConfig, PretrainConfig, is_moe_layer
from megalina.nearest import nearest


def check_data(data: DataConfig) -> None:
    if not all(isinstance(entry, str) for entry in data.blend):  # omegaconf lets lists in lists pass
        raise ValueError(f"data.blend={data.blend} must be a list of words, as [0.7,stdlib,0.3,PREFIX]")
    if data.kind == "indexed" and not data.prefix and not data.blend:
        raise ValueError("data=indexed needs data.prefix=PREFIX (of PREFIX.bin and PREFIX.idx) or data.blend=[WEIGHT,CORPUS,...]")
    if data.prefix and data.blend:
        raise ValueError(f"data.prefix={data.prefix} and data.blend exclude each other: put the prefix into the blend")
    if data.prefix and data.kind != "indexed":
        raise ValueError(f"data.prefix={data.prefix} needs data=indexed, not data={data.kind}")
    if len(data.blend) % 2:
        raise ValueError(
            f"data.blend has {len(data.blend)} entries: weights and corpora must take turns, as in [0.7,stdlib,0.3,PREFIX]"
        )
    total = 0.0
    for text, corpus in zip(data.blend[::2], data.blend[1::2], strict=True):
        weight = _number(text, f"data.blend: the weight of {corpus}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"data.blend: the weight of {corpus} is {text}; weights must be finite and not negative")
        total += weight
    if data.blend and total <= 0:
        raise ValueError("data.blend: all weights are zero; give at least one corpus a positive weight")
    shares = [_number(text, f"data.split={data.split}: a share") for text in data.split.split(",")]
    if len(shares) > 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or shares[0] <= 0:
        raise ValueError(
            f"data.split={data.split} must be shares of training, validation, test as 969,30,1: none negative, the first not 0"
        )
    _check_skip(data.skip_samples)


def check_profile(config: PretrainConfig) -> None:
    model, router = config.model, config.router
    if not config.profile.record:
        return
    if kind_of(router).experts_choose:
        raise ValueError("profile.record with router=expert_choice: a token has no choices there: set profile.record=false")
    if kind_of(router).is_dense:
        raise ValueError("profile.record with router=dense: a token has no choices in training: set profile.record=false")
    if router.has_capacity:
        raise ValueError(
            f"profile.record with {capacity_text(router)}: capacity takes choices away in training and "
            "not in serving: set profile.record=false, and record afterwards with tools/record_routing.py"
        )
    if not any(is_moe_layer(model, layer) for layer in range(model.num_layers)):
        raise ValueError(
            f"profile.record, but none of {model.num_layers} layers is MoE (model.dense_layers_first={model.dense_layers_first}, "
            f"model.moe_every={model.moe_every}): set profile.record=false"
        )


def check_eval(config: PretrainConfig) -> None:
    tasks = config.eval.tasks
    if not config.eval.interval:
        return
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"eval.tasks=[{','.join(tasks)}] must name tasks, each once: choose some of {', '.join(LOCAL_TASKS)}")
    for name in tasks:
        if name not in LOCAL_TASKS:
            raise ValueError(f"eval.tasks: there is no task {name}{nearest(name, LOCAL_TASKS)}: choose {', '.join(LOCAL_TASKS)}")
    if kind_of(config.router).experts_choose:
        raise ValueError(
            f"eval.interval={config.eval.interval} with router=expert_choice: it looks at later tokens, and so at the answers: "
            "set eval.interval=0"
        )
    if config.data.kind == "indexed" and not config.data.tokenizer and not {"stdlib", "prose"} & set(config.data.blend):
        raise ValueError(f"eval.interval={config.eval.interval} needs data.tokenizer, as tasks are text: give it, or set 0")


def _check_skip(ends: list[int]) -> None:
    odd = len(ends) % 2 or not all(isinstance(end, int) for end in ends)
    if odd or sorted(ends) != ends or (ends and ends[0] < 0) or any(a == b for a, b in zip(ends[::2], ends[1::2], strict=True)):
        raise ValueError(
            f"data.skip_samples={ends} must be pairs FIRST,STOP of training sequences in rising order, as [640,704,1280,1344]"
        )


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what} is {text!r}, not a number") from None
