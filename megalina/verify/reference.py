"""The reference: the steps on one process, by the model's own functions, autograd, torch's optimizer and clipping.

It knows no program, mesh or bucket.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.bucket_layout import Member
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.sizes import NEARNESS_BINS
from megalina.config import OptimConfig, ParallelConfig, PretrainConfig, StrategyConfig
from megalina.model.block_functions import Routed, Seen
from megalina.model.gpt import GPT, Layer
from megalina.model.init import Cut, initialize, spec_of
from megalina.model.locmoe import grap
from megalina.model.routers import Router
from megalina.reference import is_reference
from megalina.step.program import Matrices
from megalina.train.optim import FlatOptimizer, FlatTensor
from megalina.verify.muon_by_hand import MuonByHand, clip_heads, is_hidden, largest_logits
from megalina.verify.recording import (
    INITIAL,
    SEQUENCES,
    Entry,
    Layout,
    Recording,
    bias_name,
    bits_of,
    choices_of,
    columns_of,
    order_of,
    stream_name,
    terms_of,
    widened,
)
from megalina.verify.start import shake


@dataclass(slots=True)
class Pass:
    """A forward pass over some sequences: what is differentiated, and what was seen, each [sequences, L, ...]."""

    loss: Tensor  # sum over tokens
    ahead: dict[str, Tensor]  # that of multi-token prediction, if the model has it
    routed: list[Routed]  # of each MoE layer
    seen: dict[tuple[str, str], Tensor]
    near: list[list[float]]  # of each MoE layer: cosines between valid tokens and the rows of the experts they want
    logits: list[Tensor]  # of each layer, [sequences, H], if they were asked for


def reference_config(config: PretrainConfig) -> PretrainConfig:
    """What of a configuration one process can tell: layouts that differ in the rest share a reference."""
    grouped = config.router.group == "micro_batch"
    train = replace(config.train, recompute="none", micro_batch_size=config.train.micro_batch_size if grouped else SEQUENCES)
    launch = replace(config.launch, ranks=1)
    return replace(config, launch=launch, parallel=ParallelConfig(), strategy=StrategyConfig(), train=train)


def record(config: PretrainConfig, batches: Sequence[Batch]) -> Recording:
    """One step for each global batch."""
    config = reference_config(config)
    gpt, optim = model_of(config), config.optim
    parameters = dict(gpt.named_parameters())
    optimizer = _optimizer(config, gpt)
    entries = [Entry(INITIAL, "weight", name, value) for name, value in _weights(gpt).items()]
    for step, batch in enumerate(batches):
        clips = optimizer_of(optim).clips_heads
        parts = [forward(gpt, part, logits=clips) for part in batch.split(config.train.micro_batch_size)]
        counted = _counted(batch)
        auxiliary = _auxiliary(gpt, parts)
        losses = [{"loss": p.loss} | more for p, more in zip(parts, auxiliary, strict=True)]
        whole = sum(of.weight * found[of.name] / counted[of.divisor] for found in losses for of in gpt.blocks.losses if of.weight)
        optimizer.zero_grad()
        assert isinstance(whole, Tensor)
        whole.backward()
        found = {key: torch.cat([p.seen[key] for p in parts]) for key in parts[0].seen}
        sums = {
            of.name: sum(part[of.name].item() for part in losses) / counted[of.divisor] / of.layers for of in gpt.blocks.losses
        }
        sums |= counted
        found |= {("loss", name): _scalar(value) for name, value in sums.items()}
        loads = _loads(parts)
        for layer, load in zip(gpt.moe_layers, loads, strict=True):
            found["routing", f"layers.{layer}.load"] = load
        for name, p in parameters.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found["gradient", name] = gradient.reshape(spec_of(p).shape).clone()
        norm = _clip(gpt, optim.clip_norm)
        scale = min(1.0, optim.clip_norm / (norm + 1e-6)) if optim.clip_norm > 0 else 1.0
        found |= {("norm", "grad_norm"): _scalar(norm), ("norm", "grad_scale"): _scalar(scale)}
        optimizer.step()
        if clips:
            clip_heads(gpt, optim, [torch.cat(of_parts).amax(0) for of_parts in zip(*(p.logits for p in parts), strict=True)])
        for layer, load in zip(gpt.moe_layers, loads, strict=True):
            router = gpt.layers[layer].router
            follow_load(router, load)
            if router.bias_E is not None:
                found["routing", bias_name(layer)] = bits_of(router.bias_E)
        for i, layer in enumerate(gpt.moe_layers):
            follow_nearness(gpt.layers[layer].router, [cosine for part in parts for cosine in part.near[i]])
        found |= {("weight", name): value for name, value in _weights(gpt).items()}
        entries += [Entry(step, kind, name, found[kind, name]) for kind, name in order_of(gpt.blocks, list(parameters))]
    return Recording(None, config, list(batches), entries)


def follow_load(router: Router, load: Tensor) -> None:
    """What a step's load [E + 1] does to the selection bias, if there is one: by the rate, an expert that fewer tokens chose than
    the mean becomes easier to choose, one that more chose becomes harder.  Done by hand, as it is an oracle."""
    if router.bias_E is None:
        return
    chosen, config = load[:-1].tolist(), router.config
    total, number = sum(chosen), len(chosen)
    signs = [(count * number < total) - (count * number > total) for count in chosen]
    if config.bias_update == "proportional":
        steps = [1.0 / number - count / total if total else 0.0 for count in chosen]
    else:
        steps = [sign - (sum(signs) / number if config.bias_centered else 0.0) for sign in signs]
    for expert, step in enumerate(steps):
        router.bias_E[expert] += config.bias_update_rate * torch.tensor(step, dtype=router.bias_E.dtype)


def follow_nearness(router: Router, cosines: Sequence[float]) -> None:
    """What a step's cosines do to the delta of the capacity bound, if there is one: by hand, as it is an oracle."""
    if router.delta is None or not cosines:
        return
    config, found = router.config, sorted(max(0, min(NEARNESS_BINS - 1, int(c * NEARNESS_BINS))) for c in cosines)
    place = 0 if config.capacity_delta == "min" else max(0, math.ceil(config.capacity_quantile * len(found)) - 1)
    delta = found[place] / NEARNESS_BINS
    if config.capacity_delta == "mean":
        delta = (sum(found) / len(found) + 0.5) / NEARNESS_BINS
    old = router.delta.item()
    if old < 0:
        router.delta.fill_(delta)
    elif config.capacity_ema:
        router.delta.fill_(config.capacity_ema * old + (1 - config.capacity_ema) * delta)


def wanted_cosines(layer: Layer, x_TD: Tensor, batch: Batch) -> list[float]:
    """Of the MoE layer `layer` and its input: between each valid token and the rows that it has the largest products with."""
    router, n_TD = layer.router, layer.mlp_norm(x_TD)
    rows_ED = grap(router.num_experts, n_TD) if router.weight is None else router.weight
    if rows_ED.shape[1] < n_TD.shape[1]:  # each row's own features
        rows_ED = torch.block_diag(*rows_ED.unsqueeze(1))
    best_TK = router.logits(n_TD).sort(dim=1, descending=True, stable=True).indices[:, : router.top_k]
    cosine_TK = torch.nn.functional.cosine_similarity(n_TD[:, None], rows_ED[best_TK], dim=2)
    found: list[float] = cosine_TK[batch.valid_BS.flatten()].flatten().tolist()
    return found


def detail(recording: Recording, layout: Layout) -> None:
    """Fill a reference's `unit_gradients` for a layout's micro-batches."""
    config, batch = recording.config, recording.batches[0]
    gpt = model_of(config)
    parameters = dict(gpt.named_parameters())
    units = [forward(gpt, part) for part in batch.split(layout.micro_batch)]
    counted = _counted(batch)
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    terms = terms_of(gpt.blocks)
    weights = {of.name: of.weight / counted[of.divisor] for of in gpt.blocks.losses}
    for unit, auxiliary in zip(units, _auxiliary(gpt, units), strict=True):
        losses = {"loss": unit.loss} | auxiliary
        for name in terms:
            term = losses[name] * weights[name] if name in losses else unit.loss.new_zeros(())
            wanted: Sequence[Tensor | None] = [None] * len(parameters)
            if term.requires_grad:
                wanted = torch.autograd.grad(term, list(parameters.values()), retain_graph=name != terms[-1], allow_unused=True)
            for (of, p), gradient in zip(parameters.items(), wanted, strict=True):
                value = torch.zeros_like(p) if gradient is None else gradient
                found[of].append(value.detach().reshape(spec_of(p).shape))
    recording.unit_gradients = {
        name: torch.stack(values).view(len(units), len(terms), *values[0].shape) for name, values in found.items()
    }


def model_of(config: PretrainConfig) -> GPT:
    """The model at the start, whole."""
    train, model = config.train, config.model
    gpt = GPT(
        model, config.router, vocab_size=model.vocab_size, max_positions=model.max_positions or train.seq_len, seed=train.seed
    )
    initialize(gpt, seed=train.seed, dtype=torch.float64)
    shake(gpt, train.seed, Cut())
    return gpt.train()


def forward(gpt: GPT, batch: Batch, *, logits: bool = False) -> Pass:
    """What `GPT.forward` computes, with everything that is compared noted on the way; `logits`: the largest of each head, too."""
    sequences, length = batch.tokens_BS.shape
    seen: dict[tuple[str, str], Tensor] = {}

    def note(kind: str, name: str, value_TA: Tensor) -> None:
        seen[kind, name] = value_TA.detach().view(sequences, length, -1)

    columns = columns_of(gpt.config, gpt.router)
    x_TD = gpt.embedder.embed(batch)
    note("activation", "embedded", x_TD)
    routed = Seen()
    near: list[list[float]] = []
    ahead: dict[str, Tensor] = {}
    largest: list[Tensor] = []
    for i, layer in enumerate(gpt.layers):
        if i == gpt.config.num_layers:
            last_TD, ahead = x_TD, {"mtp_loss": x_TD.new_zeros(())}
        for name in layer.stream:
            functions, known = layer.functions[name], len(routed.routed)
            if name == "moe" and gpt.router.capacity_bound != "none":
                with torch.no_grad():
                    near.append(wanted_cosines(layer, x_TD, batch))
            if name == "attention" and logits:
                largest.append(largest_logits(layer, x_TD, batch))
            x_TD = functions.forward(x_TD, batch, routed)
            for of in routed.routed[known:]:
                note("activation", f"layers.{i}.logits", of.logits_TE)
                if of.order is not None:
                    note("routing", f"layers.{i}.expert", choices_of(of.order, columns))
                note("activation", f"layers.{i}.weight", widened(of.weight_TK, columns, 0.0))
            note("activation", stream_name(gpt.blocks, i, name), x_TD)
        if ahead:
            own = ahead_by_hand(batch, i - gpt.config.num_layers + 1)
            ahead["mtp_loss"] = ahead["mtp_loss"] + gpt.output.loss_behind(layer.mtp.norm, x_TD, own)
    loss = gpt.output.loss_behind(gpt.final_norm, last_TD if ahead else x_TD, batch)
    return Pass(loss, ahead, routed.routed, seen, near or [[] for _ in routed.routed], largest)


def ahead_by_hand(batch: Batch, depth: int) -> Batch:
    """The labels `depth` places further on, and which of them count: written place by place, as it is an oracle."""
    labels_BS, counts_BS = batch.labels_BS.clone(), torch.zeros_like(batch.loss_mask_BS)
    sequences, length = labels_BS.shape
    for b in range(sequences):
        for t in range(length - depth):
            labels_BS[b, t] = batch.labels_BS[b, t + depth]
            own = batch.document_BS is None or bool(batch.document_BS[b, t] == batch.document_BS[b, t + depth])
            counts_BS[b, t] = own and bool(batch.valid_BS[b, t]) and bool(batch.loss_mask_BS[b, t + depth])
    return replace(batch, labels_BS=labels_BS, loss_mask_BS=counts_BS)


def _counted(batch: Batch) -> dict[str, int]:
    return {"loss_tokens": int(batch.loss_mask_BS.sum()), "valid_tokens": int(batch.valid_BS.sum())}


def _loads(parts: Sequence[Pass]) -> list[Tensor]:
    """Of each MoE layer, over all passes."""
    of_layers = zip(*(p.routed for p in parts), strict=True)
    return [torch.stack([routed.load[: routed.logits_TE.shape[1] + 1] for routed in layer]).sum(0) for layer in of_layers]


def _auxiliary(gpt: GPT, parts: Sequence[Pass]) -> list[dict[str, Tensor]]:
    """The auxiliary losses of each pass; with router.group=global the balance loss from the loads of all of them."""
    loads = _loads(parts)
    return [gpt.auxiliary([r.losses for r in p.routed], loads, p.loss.new_zeros(())) | p.ahead for p in parts]


class _OfOnesOwn:
    """The rule of an optimizer that torch doesn't have, on whole parameters; as torch's optimizers are used here."""

    def __init__(self, optim: OptimConfig, parameters: Sequence[nn.Parameter]):
        self._parameters, self._lr = parameters, optim.lr
        flat = [
            FlatTensor(p.detach().view(-1), torch.zeros_like(p).view(-1), spec_of(p).decay, _matrices(p, optim))
            for p in parameters
        ]
        self._grads, self._optimizer = [t.grad for t in flat], FlatOptimizer(optim, flat)

    def step(self) -> None:
        for grad, p in zip(self._grads, self._parameters, strict=True):
            assert p.grad is not None
            grad.copy_(p.grad.reshape(-1))
        self._optimizer.step(lr=self._lr)

    def zero_grad(self) -> None:
        for p in self._parameters:
            p.grad = None


def _matrices(p: nn.Parameter, optim: OptimConfig) -> Matrices | None:
    """A whole parameter as the matrices that its optimizer takes."""
    return Member(spec_of(p), spec_of(p).shape).matrices(0, gathered=False) if is_hidden(p, optim) else None


def _optimizer(config: PretrainConfig, gpt: GPT) -> torch.optim.Optimizer | _OfOnesOwn | MuonByHand:
    optim = config.optim
    if is_reference(optim.name):
        return _OfOnesOwn(optim, list(gpt.parameters()))
    elementwise = [p for p in gpt.parameters() if not is_hidden(p, optim)]
    optimizer = _of_torch(optim, elementwise)
    hidden = [p for p in gpt.parameters() if is_hidden(p, optim)]
    return MuonByHand(optim, hidden, optimizer) if hidden else optimizer


def _of_torch(optim: OptimConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    decayed = [p for p in parameters if spec_of(p).decay]
    others = [p for p in parameters if not spec_of(p).decay]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def _clip(gpt: GPT, most: float) -> float:
    """The norm of all gradients; they are scaled down to `most` unless it is 0."""
    with_gradient = [p for p in gpt.parameters() if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(with_gradient, most or float("inf")).item()


def _weights(gpt: GPT) -> dict[str, Tensor]:
    return {name: p.detach().reshape(spec_of(p).shape).clone() for name, p in gpt.named_parameters()}


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
