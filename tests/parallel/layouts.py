"""One configuration of the star test: a model, a router and a layout, run by program on ranks and plainly on one process.

The oracle knows no program, no bucket, no mesh: `GPT.forward`, autograd, torch's own optimizer and clipping.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.config import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RouterConfig,
    StrategyConfig,
    TrainConfig,
)
from megalina.mesh import Mesh, build_mesh
from megalina.model.gpt import GPT
from megalina.model.init import initialise, spec_of
from megalina.parallel.functions import Verdict
from megalina.parallel.shard import cut_of
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer

SEQUENCES, LENGTH, VOCABULARY, SEED, STEPS = 8, 8, 200, 7, 3


@dataclass(frozen=True)
class Case:
    """A layout and what it runs."""

    world: int = 1
    tp: int = 1
    ep: int = 1
    sequence: bool = True
    zero: int = 0
    micro_batch: int = 2  # sequences
    recompute: str = "none"
    piece_mb: float = 0.0
    optimizer: str = "sgd"
    model: tuple[tuple[str, Any], ...] = ()
    router: tuple[tuple[str, Any], ...] = ()
    one_word: bool = False  # the text is one word again and again: with a hash router one expert gets every token

    @property
    def reference(self) -> "Case":
        """The same work on one process that knows nothing of parallelism."""
        return replace(self, world=1, tp=1, ep=1, sequence=True, zero=0, recompute="none", piece_mb=0.0)


@dataclass
class Outcome:
    """What is compared."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step, whole
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the last step, whole


def config_of(case: Case) -> PretrainConfig:
    model = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 4, "num_experts": 4, "d_ff": 16, "dense_d_ff": 24}
    router = {"top_k": 2, "balance_loss": 0.1, "z_loss": 0.01}
    optim = {"lr": 0.1 if case.optimizer == "sgd" else 1e-3, "clip_norm": 1.0}
    return PretrainConfig(
        model=ModelConfig(**(model | dict(case.model))),
        router=RouterConfig(**(router | dict(case.router))),
        parallel=ParallelConfig(tp=case.tp, ep=case.ep, sequence=case.sequence, zero=case.zero),
        strategy=StrategyConfig(gradient_piece_mb=case.piece_mb),
        optim=OptimConfig(name=case.optimizer, **optim),
        train=TrainConfig(
            global_batch_size=SEQUENCES,
            micro_batch_size=case.micro_batch,
            seq_len=LENGTH,
            dtype="float64",
            seed=SEED,
            recompute=case.recompute,
        ),
    )


@cache
def text(step: int, one_word: bool) -> Batch:
    """The global batch of a step: documents, masked labels, padding."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    if one_word:
        tokens.fill_(5)
    document = torch.rand(SEQUENCES, LENGTH, generator=generator).lt(0.2).long().cumsum(1)
    mask = torch.rand(SEQUENCES, LENGTH, generator=generator) > 0.2
    valid = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    valid[1, 5:] = valid[6, 2:] = False
    position = torch.arange(LENGTH).repeat(SEQUENCES, 1)
    sample = torch.arange(step * SEQUENCES, (step + 1) * SEQUENCES)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask & valid, valid, position, document, sample)


def rows(batch: Batch, first: int, count: int) -> Batch:
    return batch.split(count)[first // count]


def one_process(case: Case) -> Outcome:
    """The oracle."""
    config = config_of(case)
    gpt = GPT(config.model, config.router, vocab_size=VOCABULARY, max_positions=LENGTH, seed=SEED)
    initialise(gpt, seed=SEED, dtype=torch.float64)
    gpt.train()
    out = Outcome()
    optim = config.optim
    parameters = dict(gpt.named_parameters())
    decayed = [p for p in parameters.values() if spec_of(p).decay]
    others = [p for p in parameters.values() if not spec_of(p).decay]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if optim.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=optim.lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    for step in range(STEPS):
        parts = (
            [text(step, case.one_word)] if config.router.group == "global" else text(step, case.one_word).split(case.micro_batch)
        )
        tokens = sum(int(b.loss_mask_BS.sum()) for b in parts)
        valid = sum(int(b.valid_BS.sum()) for b in parts)
        loss, chosen = 0.0, torch.zeros(len(gpt.moe_layers), config.model.num_experts, dtype=torch.int64)
        optimizer.zero_grad(set_to_none=False)
        for batch in parts:
            found = gpt(batch)
            whole = (
                found.loss / tokens + config.router.balance_loss * found.balance / valid + config.router.z_loss * found.z / valid
            )
            whole.backward()
            loss += found.loss.item() / tokens
            chosen += torch.stack(found.loads)[:, :-1]
        out.losses.append(loss)
        if step == 0:
            out.gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
        out.norms.append(
            torch.nn.utils.clip_grad_norm_([p for p in gpt.parameters() if p.grad is not None], optim.clip_norm).item()
        )
        optimizer.step()
        for layer, counts in zip(gpt.moe_layers, chosen, strict=True):
            if gpt.layers[layer].router.bias_E is not None:
                gpt.layers[layer].router.update_bias(counts)
    out.weights = {n: p.detach() for n, p in parameters.items()}
    return out


@cache
def mesh_of(tp: int, ep: int) -> Mesh:
    """Communicators take longer than a case."""
    return build_mesh(tp=tp, ep=ep)


def on_ranks(case: Case, reference: Outcome) -> dict[str, float]:
    """The same by program on the ranks of the default group: the largest difference of each quantity on this rank."""
    config = config_of(case)
    mesh = mesh_of(case.tp, case.ep)
    trainable = Trainable(config, mesh, vocab_size=VOCABULARY, device=torch.device("cpu"), wish_to_stop=lambda: False)
    optimizer = BucketOptimizer(config.optim, trainable.buckets)
    errors: dict[str, float] = {}
    own = SEQUENCES // mesh.dp.size
    for step in range(STEPS):

        def update(name: str, verdict: Verdict, first: bool = step == 0) -> None:
            if first:
                _compare_gradients(name, trainable, mesh, reference, errors)
            optimizer.update(name, verdict)

        verdict = trainable.step(rows(text(step, case.one_word), mesh.dp.rank * own, own), update)
        errors[f"loss {step}"] = abs(verdict.loss - reference.losses[step])
        errors[f"norm {step}"] = abs(verdict.grad_norm - reference.norms[step])
        for layer, load in zip(trainable.gpt.moe_layers, verdict.loads, strict=True):
            if trainable.gpt.layers[layer].router.bias_E is not None:
                trainable.gpt.layers[layer].router.update_bias(load[:-1])
    for name, p in trainable.gpt.named_parameters():
        errors[f"weight {name}"] = (p.detach() - _own_part(reference.weights[name], p, mesh)).abs().max().item()
    return errors


def _own_part(whole: Tensor, p: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of a whole tensor, in the shape in which it is held."""
    spec = spec_of(p)
    if spec.rows:
        whole = torch.cat([whole, whole.new_zeros(spec.shape[0] - len(whole), *whole.shape[1:])])
    return cut_of(mesh).local(whole.reshape(spec.shape), spec).reshape(p.shape)


def _compare_gradients(name: str, trainable: Trainable, mesh: Mesh, reference: Outcome, errors: dict[str, float]) -> None:
    """Where ZeRO-1 shards a bucket only the own slices are summed."""
    bucket = trainable.buckets[name]
    want = torch.zeros_like(bucket.grad)
    for m in bucket.members:
        want[m.start : m.stop] = _own_part(reference.gradients[m.name], m.parameter, mesh).flatten()
    for s in bucket.slices:
        difference = (bucket.grad[s.start : s.stop] - want[s.start : s.stop]).abs().max().item()
        errors[f"gradient {name}"] = max(errors.get(f"gradient {name}", 0.0), difference)
