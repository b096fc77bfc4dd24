"""The reference: the steps on one process, by the model's own functions, autograd, torch's optimizer and clipping.

It knows no program, mesh or bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.config import ParallelConfig, PretrainConfig, StrategyConfig
from megalina.model.gpt import GPT
from megalina.model.init import Cut, initialise, spec_of
from megalina.model.routers import Router
from megalina.verify.recording import INITIAL, SEQUENCES, Entry, Layout, Recording, choices_of, columns_of, order_of, widened
from megalina.verify.start import shake


@dataclass(slots=True)
class Pass:
    """A forward pass over some sequences: what is differentiated, and what was seen, each [sequences, L, ...]."""

    loss: Tensor  # sums over tokens
    balance: Tensor  # 0 with router.group=global, see `probs`
    z: Tensor
    probs: list[Tensor] = field(default_factory=list)  # with router.group=global: per MoE layer the sums of probabilities [E]
    loads: list[Tensor] = field(default_factory=list)
    seen: dict[tuple[str, str], Tensor] = field(default_factory=dict)


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
        parts = [forward(gpt, part) for part in batch.split(config.train.micro_batch_size)]
        tokens, valid = int(batch.loss_mask_BS.sum()), int(batch.valid_BS.sum())
        balances = _balances(gpt, parts)
        whole = sum(
            p.loss / tokens + config.router.balance_loss * b / valid + config.router.z_loss * p.z / valid
            for p, b in zip(parts, balances, strict=True)
        )
        optimizer.zero_grad()
        assert isinstance(whole, Tensor)
        whole.backward()
        found = {key: torch.cat([p.seen[key] for p in parts]) for key in parts[0].seen}
        layers = max(len(gpt.moe_layers), 1)
        sums = {
            "loss": sum(p.loss.item() for p in parts) / tokens,
            "balance_loss": sum(b.item() for b in balances) / valid / layers,
            "z_loss": sum(p.z.item() for p in parts) / valid / layers,
            "loss_tokens": tokens,
            "valid_tokens": valid,
        }
        found |= {("loss", name): _scalar(value) for name, value in sums.items()}
        loads = [torch.stack([p.loads[i] for p in parts]).sum(0) for i in range(len(gpt.moe_layers))]
        for layer, load in zip(gpt.moe_layers, loads, strict=True):
            found["routing", f"layers.{layer}.load"] = load
        for name, p in parameters.items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found["gradient", name] = gradient.reshape(spec_of(p).shape).clone()
        norm = _clip(gpt, optim.clip_norm)
        scale = min(1.0, optim.clip_norm / (norm + 1e-6)) if optim.clip_norm > 0 else 1.0
        found |= {("norm", "grad_norm"): _scalar(norm), ("norm", "grad_scale"): _scalar(scale)}
        optimizer.step()
        for layer, load in zip(gpt.moe_layers, loads, strict=True):
            follow_load(gpt.layers[layer].router, load)
        found |= {("weight", name): value for name, value in _weights(gpt).items()}
        moe = [layer.is_moe for layer in gpt.layers]
        entries += [Entry(step, kind, name, found[kind, name]) for kind, name in order_of(moe, list(parameters))]
    return Recording(None, config, list(batches), entries)


def follow_load(router: Router, load: Tensor) -> None:
    """What a step's load [E + 1] does to the selection bias, if there is one: by the rate, an expert that fewer tokens chose than
    the mean becomes easier to choose, one that more chose becomes harder.  Done by hand, as it is an oracle."""
    if router.bias_E is None:
        return
    chosen = load[:-1].tolist()
    mean = sum(chosen) / len(chosen)
    for expert, count in enumerate(chosen):
        router.bias_E[expert] += router.bias_update_rate * ((count < mean) - (count > mean))


def detail(recording: Recording, layout: Layout) -> None:
    """Fill a reference's `unit_gradients` for a layout's micro-batches."""
    config, batch = recording.config, recording.batches[0]
    gpt = model_of(config)
    parameters = dict(gpt.named_parameters())
    units = [forward(gpt, part) for part in batch.split(layout.micro_batch)]
    tokens, valid = int(batch.loss_mask_BS.sum()), int(batch.valid_BS.sum())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for unit, balance in zip(units, _balances(gpt, units), strict=True):
        terms = (
            unit.loss / tokens,
            config.router.balance_loss * balance / valid,
            config.router.z_loss * unit.z / valid,
        )
        for i, term in enumerate(terms):
            wanted: Sequence[Tensor | None] = [None] * len(parameters)
            if term.requires_grad:
                wanted = torch.autograd.grad(term, list(parameters.values()), retain_graph=i < 2, allow_unused=True)
            for (name, p), gradient in zip(parameters.items(), wanted, strict=True):
                value = torch.zeros_like(p) if gradient is None else gradient
                found[name].append(value.detach().reshape(spec_of(p).shape))
    recording.unit_gradients = {name: torch.stack(values).view(len(units), 3, *values[0].shape) for name, values in found.items()}


def model_of(config: PretrainConfig) -> GPT:
    """The model at the start, whole."""
    train, model = config.train, config.model
    gpt = GPT(
        model, config.router, vocab_size=model.vocab_size, max_positions=model.max_positions or train.seq_len, seed=train.seed
    )
    initialise(gpt, seed=train.seed, dtype=torch.float64)
    shake(gpt, train.seed, Cut())
    return gpt.train()


def forward(gpt: GPT, batch: Batch) -> Pass:
    """What `GPT.forward` computes, with everything that is compared noted on the way."""
    sequences, length = batch.tokens_BS.shape
    seen: dict[tuple[str, str], Tensor] = {}

    def note(kind: str, name: str, value_TA: Tensor) -> None:
        seen[kind, name] = value_TA.detach().view(sequences, length, -1)

    columns = columns_of(gpt.config, gpt.router)
    x_TD = gpt.place(gpt.embed(batch), batch)
    note("activation", "embedded", x_TD)
    zero = x_TD.new_zeros(())
    out = Pass(zero, zero, zero, seen=seen)
    for i, layer in enumerate(gpt.layers):
        h_TD = layer.attend(x_TD, batch)
        note("activation", f"layers.{i}.attention", h_TD)
        if layer.is_moe:
            n_TD, logits_TE = layer.score(h_TD)
            note("activation", f"layers.{i}.logits", logits_TE)
            rows_ND, weight_TK, balance, z, order, load = layer.select(n_TD, logits_TE, logits_TE.detach(), batch)
            note("routing", f"layers.{i}.expert", choices_of(order, columns))
            note("activation", f"layers.{i}.weight", widened(weight_TK, columns, 0.0))
            back_ND = layer.experts(rows_ND, order.count_E.tolist())
            shared_TD = layer.share(n_TD) if layer.shared is not None else None
            x_TD = layer.mix(h_TD, back_ND, weight_TK, shared_TD, order, batch)
            if gpt.router.group == "global":
                out.probs.append(balance)
            else:
                out.balance = out.balance + balance
            out.z = out.z + z
            out.loads.append(load[: gpt.config.num_experts + 1])
        else:
            x_TD = layer.feed(h_TD, batch)
        note("activation", f"layers.{i}", x_TD)
    out.loss = gpt.loss(gpt.stat(gpt.final_norm(x_TD), batch).unsqueeze(0), batch)
    return out


def _balances(gpt: GPT, parts: Sequence[Pass]) -> list[Tensor]:
    """The balance loss of each pass; with router.group=global from the loads of all of them."""
    if gpt.router.group != "global" or not gpt.moe_layers:
        return [p.balance for p in parts]
    loads = torch.stack([torch.stack(p.loads) for p in parts]).sum(0)
    return [gpt.balance_of_all(p.probs, loads) for p in parts]


def _optimizer(config: PretrainConfig, gpt: GPT) -> torch.optim.Optimizer:
    optim = config.optim
    decayed = [p for p in gpt.parameters() if spec_of(p).decay]
    others = [p for p in gpt.parameters() if not spec_of(p).decay]
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
