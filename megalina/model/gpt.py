"""A GPT with mixture-of-experts layers, for one device: it knows no process group.

`GPT.forward` composes its blocks as anybody would on one device; each block composes the very functions of which a program's
instructions are made.  It is used for generation and is the oracle against which every layout is tested.

Shapes: B sequences, S tokens a sequence, T = B x S tokens, D width, V words, L layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.block import Block
from megalina.blocks.dispatch import ALL_ROWS, Dispatch
from megalina.blocks.head import Head as HeadBlock
from megalina.blocks.heads import rotary_width
from megalina.blocks.model import blocks_of
from megalina.blocks.selection import Selection
from megalina.blocks.sizes import LIMBS, NEARNESS_BINS
from megalina.config import ModelConfig, RouterConfig
from megalina.model.attention import KeyValues
from megalina.model.block_functions import BlockFunctions, Seen, no_parameters
from megalina.model.dense_moe import Dense
from megalina.model.embedding import Embedding
from megalina.model.head import Balance, Head
from megalina.model.mlp import Mlp
from megalina.model.moe import Experts, MoE
from megalina.model.mtp import Mtp, MtpHead, Weights
from megalina.model.noise import dropout
from megalina.model.norm import Norm
from megalina.model.rope import Rotary, attention_factor, frequencies, rope_table
from megalina.model.routers import Router
from megalina.model.tokens import WHOLE, TokenShare, places
from megalina.reference import load
from megalina.step.pipeline.job import Held
from megalina.step.program import Instruction


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the tokens of a batch; the caller divides by the number of tokens."""

    loss: Tensor  # cross entropy in nats, over positions whose label counts
    auxiliary: dict[str, Tensor]  # by the name of the loss, summed over layers; that of multi-token prediction among them
    loads: list[Tensor]  # per MoE layer int64 [E + 1]: tokens that chose each expert, choices lost to capacity; then cosines


class Layer(nn.Module):
    """The parameters of a layer's blocks, and their functions."""

    attention_norm: Norm
    attention: Any  # `Heads` or `LatentHeads`
    mlp_norm: Norm
    mlp: Mlp  # of a dense layer; the others of a MoE layer
    router: Router
    experts: Experts
    shared: Mlp | None
    mtp: Weights  # of a layer of multi-token prediction

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        index: int,
        seed: int,
        rotary: Rotary | None,
        share: TokenShare,
        first_expert: int,
        digests: bool,
        expert_order: tuple[int, ...] = (),
    ):
        """`expert_order`: which expert is in each place; (): expert i in place i."""
        super().__init__()
        self.expert_order, self.first_expert = expert_order, first_expert
        self.index, self.seed, self.share, self.digests = index, seed, share, digests
        self.rate = blocks[0].model.dropout
        self.num_experts = blocks[0].model.num_experts
        self.rotary = [rotary]  # in a list: shared, not a part of each layer
        self.functions = {block.name: functions_of(block, self) for block in blocks}
        self.stream = [block.name for block in blocks if not isinstance(block, HeadBlock)]  # those that write to it, in order

    @property
    def is_moe(self) -> bool:
        return "moe" in self.functions

    @property
    def moe(self) -> MoE:
        found = self.functions["moe"]
        assert isinstance(found, MoE)
        return found

    def through(self, x_TD: Tensor, batch: Batch, seen: Seen, past: KeyValues | None = None) -> Tensor:
        """All blocks that write to the stream, on one device."""
        for name in self.stream:
            x_TD = self.functions[name].forward(x_TD, batch, seen, past)
        return x_TD

    def attend(self, x_TD: Tensor, batch: Batch, past: KeyValues | None = None) -> Tensor:
        """The attention block, on one device."""
        return self.functions["attention"].forward(x_TD, batch, Seen(), past)

    def feed(self, h_TD: Tensor, batch: Batch) -> Tensor:
        """The dense MLP's block, on one device."""
        return self.functions["mlp"].forward(h_TD, batch, Seen())

    def residual(self, x_TD: Tensor, added_TD: Tensor, bias_D: Tensor | None, site: str, batch: Batch, own: slice) -> Tensor:
        """The stream with what a block adds: with its bias, after dropout."""
        if bias_D is not None:
            added_TD = added_TD + bias_D
        if self.rate and self.training:
            sample_T, position_T = places(batch, own)
            added_TD = dropout(added_TD, self.rate, self.seed, self.index, site, sample_T, position_T)
        return x_TD + added_TD


class Layers(nn.Module):
    """A model's layers by number: those that are on this rank."""

    def __init__(self, layers: Mapping[int, Layer]):
        super().__init__()
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __getitem__(self, number: int) -> Layer:
        found = self._modules[str(number)]
        assert isinstance(found, Layer)
        return found

    def __contains__(self, number: int) -> bool:
        return str(number) in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Layer]:
        yield from self._modules.values()  # type: ignore[misc]


class GPT(nn.Module):
    """Parameters are on the meta device until `megalina.model.init.initialize` (or a checkpoint) fills them."""

    layers: "Layers"  # those of multi-token prediction come last
    embedding: nn.Parameter
    head: nn.Parameter | None
    positions: nn.Parameter | None
    final_norm: Norm

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig,
        *,
        vocab_size: int,
        max_positions: int,
        seed: int,
        padded_vocab: int = 0,
        share: TokenShare = WHOLE,
        first_expert: int = 0,
        digests: bool = False,
        expert_orders: Mapping[int, tuple[int, ...]] | None = None,
        held: Held | None = None,
        dispatch: Dispatch = ALL_ROWS,
    ):
        """`share`: this rank's part of the tokens; `first_expert`: of those here; `digests`: of routing, for the ledger;
        `expert_orders`: layer -> the expert in each place, where it isn't expert i in place i; `held`: the parts that are on this
        rank of a pipeline, which can't go forward by itself; None: all; `dispatch`: as of `Whole`."""
        super().__init__()
        blocks = blocks_of(
            config, router, vocab_size=vocab_size, padded_vocab=padded_vocab, max_positions=max_positions, dispatch=dispatch
        )
        self.blocks, self.config, self.router, whole = blocks, config, router, blocks.whole
        self.seed, self.vocab_size, self.share = seed, whole.vocab_size, share
        no_parameters(self, "embedding", "head", "positions")
        embedder = functions_of(blocks.embedding, self)
        table = None
        if whole.model.positions == "rope":
            frequency_i = frequencies(whole.model, rotary_width(whole.model))
            table = Rotary(*rope_table(whole.max_positions, frequency_i, attention_factor(whole.model)))
        self.rotary = table
        in_turn = tuple(range(config.num_experts))
        self._expert_orders = {i: (expert_orders or {}).get(i, in_turn) for i in self.moe_layers}
        orders = expert_orders or {}
        numbers = range(len(blocks.layers)) if held is None else held.layers
        layers = {
            i: Layer(
                (*blocks.layers[i], *blocks.ends(i)),
                index=i,
                seed=seed,
                rotary=table,
                share=share,
                first_expert=first_expert,
                digests=digests,
                expert_order=orders.get(i, ()),
            )
            for i in numbers
        }
        self.layers = Layers(layers)
        balancer, parts, output = (functions_of(block, self) for block in blocks.last)
        assert isinstance(embedder, Embedding) and isinstance(balancer, Balance) and isinstance(output, Head)
        self.embedder, self.balancer, self.output = embedder, balancer, output
        self.functions: dict[str, BlockFunctions] = {f.block.name: f for f in (embedder, balancer, parts, output)}
        before = self.final_norm
        for layer in self.mtp_layers:
            entry, end = layer.functions["mtp"], layer.functions["mtp_head"]
            assert isinstance(entry, Mtp) and isinstance(end, MtpHead)
            entry.attach(embedder, before)
            end.attach(output)
            before = layer.mtp.norm
        if held is not None:
            for parameter in [p for layer, p in blocks.parameters() if layer < 0 and not held.has(p.name.partition(".")[0])]:
                where, _, last = parameter.name.rpartition(".")
                self.get_submodule(where).register_parameter(last, None)

    @property
    def mtp_layers(self) -> Sequence[Layer]:
        """Those of multi-token prediction."""
        return [layer for layer in self.layers if layer.index >= self.config.num_layers]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def moe_layers(self) -> list[int]:
        """Of the whole model."""
        return [i for i, is_moe in enumerate(self.blocks.moe) if is_moe]

    @property
    def expert_orders(self) -> dict[int, tuple[int, ...]]:
        """Of each MoE layer of the whole model, which expert is in each place."""
        return dict(self._expert_orders)

    def lay_experts(self, orders: Mapping[int, tuple[int, ...]]) -> None:
        """From now on the experts of these MoE layers are in these places.  Moves no weights: see
        `megalina/train/rebalancing.py`."""
        self._expert_orders |= orders
        for i in orders:
            if i in self.layers:
                self.layers[i].moe.lay(orders[i])

    @property
    def load_width(self) -> int:
        """Numbers in a MoE layer's load: of each expert, of lost choices, of cosines, of a digest."""
        bins = NEARNESS_BINS * (self.router.capacity_bound != "none")
        return self.config.num_experts + 1 + bins + LIMBS

    @property
    def served_moe_layers(self) -> list[int]:
        """Those that there are where the model writes text, too."""
        return [i for i in self.moe_layers if i < self.config.num_layers]

    def router_state(self) -> dict[str, Tensor]:
        """What routers keep besides weights, by name: state that steps move, alike on all ranks."""
        layers = ((i, self.layers[i].router) for i in self.moe_layers if i in self.layers)
        return {f"layers.{i}.router.{name}": value for i, router in layers for name, value in router.named_buffers()}

    def functions_of(self, instruction: Instruction) -> BlockFunctions:
        """Of the block that has this instruction.  KeyError where none has."""
        name = self.blocks.block_of(instruction).name
        return self.functions[name] if name in self.functions else self.layers[instruction.layer].functions[name]

    def select(self, selection: Selection | None) -> None:
        """From now on, in evaluation, tokens use these experts of a model of router=dense; None: all, as in training."""
        for layer in self.moe_layers:
            router = self.layers[layer].router
            if isinstance(router, Dense):
                router.selection = selection
            elif selection is not None:
                raise ValueError(f"router={self.router.kind} selects by itself: only a model of router=dense may be told")

    def key_values(self, capacity: int = 0) -> list[KeyValues]:
        """For each layer what generation keeps of a text, of which there is nothing yet.  `capacity`: tokens that it may have, 0:
        unknown."""
        return [KeyValues(capacity, layer.functions["attention"].block.model.window) for layer in self.layers]

    def logits(self, n_TD: Tensor) -> Tensor:
        """[T, V] of the words that are here, padding included."""
        return self.output.all_logits(n_TD)

    def hidden(self, batch: Batch, past: Sequence[KeyValues] | None = None) -> tuple[Tensor, Seen]:
        """The last layer's output after the final norm, [T, D], and what the routers did."""
        seen = Seen()
        return self.output.head_norm(self._stream(batch, seen, past)), seen

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch, on one device."""
        seen = Seen()
        x_TD = self._stream(batch, seen)
        loss = self.output.loss(x_TD, batch)
        ahead = loss.new_zeros(())
        for layer in self.mtp_layers:
            x_TD = layer.through(x_TD, batch, seen)
            ahead = ahead + layer.functions["mtp_head"].mtp_loss(x_TD, batch)  # type: ignore[attr-defined]
        loads = [routed.load for routed in seen.routed]
        auxiliary = self.auxiliary([routed.losses for routed in seen.routed], loads, loss.new_zeros(()))
        return Losses(loss, auxiliary | ({"mtp_loss": ahead} if self.mtp_layers else {}), loads)

    def _stream(self, batch: Batch, seen: Seen, past: Sequence[KeyValues] | None = None) -> Tensor:
        """The last layer's output."""
        x_TD = self.embedder.placed(self.embedder.looked_up(batch), batch)
        for i in range(self.config.num_layers):
            x_TD = self.layers[i].through(x_TD, batch, seen, past[i] if past else None)
        return x_TD

    def auxiliary(self, losses_L: Sequence[Sequence[Tensor]], loads: Sequence[Tensor], zero: Tensor) -> dict[str, Tensor]:
        """Each auxiliary loss over all MoE layers, from each layer's losses and loads."""
        if not losses_L:
            return {}
        names = [loss.name for loss in self.layers[self.moe_layers[0]].moe.block.losses]
        out = {name: sum((losses[i] for losses in losses_L), zero) for i, name in enumerate(names)}
        if self.router.group == "global":
            out[names[0]] = self.balancer.of_all([losses[0] for losses in losses_L], torch.stack(list(loads)))
        return out


def functions_of(block: Block, holder: Any) -> BlockFunctions:
    """The torch functions that a block points to, with its parameters hung on `holder`."""
    made = load(block.functions)(block, holder)
    assert isinstance(made, BlockFunctions), f"{block.functions} is no BlockFunctions"
    return made
