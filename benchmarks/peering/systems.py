"""Peers: what trains the ladder's model with another framework's mixture of experts, as its users would run it, and tuned.

Each is built on every rank by all together.  What is tuned takes turns as a variant of its own; the fastest counts.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peering.model import Expert, PeerGPT
from benchmarks.peering.pace import Pace, Paced
from megalina.config import PretrainConfig

Step = Callable[[Tensor], float]  # tokens [B, S] -> loss


@dataclass(frozen=True, slots=True)
class Peer:
    """A framework's layer with a way to train it."""

    name: str
    packages: Sequence[str]  # without which it can't run
    variants: Mapping[str, Any]  # what is tuned, by a name for it
    build: Callable[[PretrainConfig, int, Pace, Any], Step]
    top_2_alone: bool = False

    def left_out(self, config: PretrainConfig) -> str:
        """Why it doesn't run here; "": it does."""
        if missing := [package for package in self.packages if importlib.util.find_spec(package) is None]:
            return f"{' and '.join(missing)} isn't installed"
        return f"its gate is top-2 alone, not top-{config.router.top_k}" if self.top_2_alone and config.router.top_k != 2 else ""


def deepspeed_mixture(config: PretrainConfig, pace: Pace, *, in_engine: bool = False) -> nn.Module:
    """`deepspeed.moe.layer.MoE` with as many rows for each expert as it gets when all are as popular.  Its engine makes the
    groups of ranks itself."""
    from deepspeed.moe.layer import MoE

    model = config.model
    layer = MoE(
        model.d_model, Expert(model.d_model, model.d_ff), model.num_experts, config.parallel.ep, config.router.top_k,
        capacity_factor=1.0, min_capacity=1, use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    if not in_engine:
        layer.set_deepspeed_parallelism()
    routed = layer.deepspeed_moe
    routed.experts = Paced(routed.experts, pace, config.cluster.experts_ms / 1e3, exchanged=True)
    return _First(layer)


def fairscale_mixture(config: PretrainConfig, pace: Pace) -> nn.Module:
    """`fairscale.nn.MOELayer` with its top-2 gate, one expert per rank."""
    from fairscale.nn import MOELayer, Top2Gate

    model = config.model
    expert = Paced(Expert(model.d_model, model.d_ff), pace, config.cluster.experts_ms / 1e3, exchanged=True)
    return MOELayer(Top2Gate(model.d_model, model.num_experts), expert)


class _First(nn.Module):
    """A layer without what it returns beside its output."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def is_expert(name: str) -> bool:
    return ".experts." in name


def with_ddp(mixture: Callable[[PretrainConfig, Pace], nn.Module]) -> Callable[[PretrainConfig, int, Pace, float], Step]:
    """The layer under torch's DDP, which sums what is dense in buckets of so many MiB; experts stay where they are."""

    def build(config: PretrainConfig, vocab_size: int, pace: Pace, bucket_mb: float) -> Step:
        model = PeerGPT(config, vocab_size, mixture, pace)
        experts = [name for name, _ in model.named_parameters() if is_expert(name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
        trained = DistributedDataParallel(model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
        dense = [p for name, p in model.named_parameters() if not is_expert(name)]
        own = [p for name, p in model.named_parameters() if is_expert(name)]
        optim = config.optim
        optimizer = torch.optim.AdamW([*dense, *own], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

        def step(tokens: Tensor) -> float:
            pace.waited()
            loss = trained(tokens)
            loss.backward()
            for p in own:
                assert p.grad is not None
                p.grad.div_(dist.get_world_size())  # all ranks' tokens went through it; what is dense is a mean already
            clip(dense, own, optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step

    return build


@torch.no_grad()
def clip(dense: Sequence[nn.Parameter], own: Sequence[nn.Parameter], limit: float) -> None:
    """By the norm of all gradients: those of experts are spread over the ranks."""
    if limit <= 0:
        return
    of_dense, of_own = (torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in (dense, own))
    square = of_own.square()
    dist.all_reduce(square)
    scale = (limit / ((square + of_dense.square()).sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for p in (*dense, *own) if p.grad is not None], scale)


def deepspeed_engine(config: PretrainConfig, vocab_size: int, pace: Pace, settings: Mapping[str, Any]) -> Step:
    """The layer in `deepspeed.initialize`'s engine."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    model = PeerGPT(config, vocab_size, partial(deepspeed_mixture, in_engine=True), pace)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optim, train = config.optim, config.train
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    words = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        **settings,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=words)

    def step(tokens: Tensor) -> float:
        pace.waited()
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def _zero(stage: int, bucket_mb: float) -> Mapping[str, Any]:
    numbers = int(bucket_mb * 2**20 / 4)
    return {"zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": numbers}}


DDP_BUCKETS = {"25 MiB": 25.0, "2 MiB": 2.0, "0.5 MiB": 0.5}
PEERS = (
    Peer("DeepSpeed's layer, DDP", ("deepspeed",), DDP_BUCKETS, with_ddp(deepspeed_mixture)),
    Peer("DeepSpeed's engine", ("deepspeed",), {"ZeRO-0": {}, "ZeRO-1, 2 MiB": _zero(1, 2.0)}, deepspeed_engine),
    Peer("fairscale's layer, DDP", ("fairscale",), DDP_BUCKETS, with_ddp(fairscale_mixture), top_2_alone=True),
)
# What can't be timed in these settings, and why.
NOT_RUN = {
    "Hugging Face's Mixtral, DDP": "no expert parallelism: each rank holds all experts, for which these devices have no room",
    "torch's pipelining": "no experts across ranks; benchmarks/torch_pipelines.py holds its schedules against ours",
    "Megatron-Core": "wants CUDA streams",
    "Tutel": "not in the package index; overlap wants CUDA streams",
}


def variants_of(peers: Sequence[Peer]) -> Iterator[tuple[str, Peer, Any]]:
    """(name of the variant, its peer, what is tuned)."""
    for peer in peers:
        for title, tuned in peer.variants.items():
            yield f"{peer.name}, {title}", peer, tuned
