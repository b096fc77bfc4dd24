"""The command that runs what was planned, whole: to be pasted on the cluster."""

import shlex
from collections.abc import Sequence

from megalina.config import PretrainConfig

WIDEST_HEAD = 256  # kernels of attention end there


def planned_for(given: Sequence[str], config: PretrainConfig, *, world: int, vocab_size: int) -> list[str]:
    """The overrides that were given, with what else the plan is made for: so many ranks, and the vocabulary."""
    own = [] if config.model.vocab_size == vocab_size else [f"model.vocab_size={vocab_size}"]
    return joined(given, [*own, f"launch.ranks={world}"])


def joined(words: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Overrides, but where others are chosen."""
    keys = {_key(word) for word in chosen}
    return [*(word for word in words if _key(word) not in keys), *chosen]


def command(words: Sequence[str], *, nodes: int, ranks_per_node: int) -> str:
    """One line: started by this program on one node, by torchrun on each of several."""
    if nodes == 1:
        return shlex.join(["python", "pretrain_gpt_moe.py", *words])
    torchrun = f"torchrun --nnodes {nodes} --nproc-per-node {ranks_per_node} --rdzv-backend c10d --rdzv-endpoint HEAD:29500"
    kept = [word for word in words if _key(word) != "launch.ranks"]  # torchrun says it
    return f"{torchrun} {shlex.join(['pretrain_gpt_moe.py', *kept])}"


def heads(config: PretrainConfig) -> str:
    """Heads and their width, with a warning where a kernel would not take them."""
    model = config.model
    width = model.head_dim or model.d_model // model.num_heads
    told = f"{model.num_heads} heads x {width}, {model.num_kv_heads} of keys and values"
    if width > WIDEST_HEAD:
        told += f"; warning: heads wider than {WIDEST_HEAD} have no fast attention: set model.num_heads or model.head_dim"
    return told


def origin(given: Sequence[str], config: PretrainConfig) -> str:
    """The model that the overrides start from, where they don't name it; \"\" where they do."""
    keys = {_key(word) for word in given}
    changed = [word for word in given if word.lstrip("+").startswith("model.")]
    if not changed or keys & {"model", "experiment"}:
        return ""
    return f"{' '.join(changed)} start from model={config.model.name}, as no model=NAME is given"


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+~")
