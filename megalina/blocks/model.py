"""A model as its blocks, from which everything else follows that can be known without torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from megalina.blocks.attention import Attention
from megalina.blocks.block import Block, Loss, Whole
from megalina.blocks.dense_moe import DenseMoE
from megalina.blocks.dispatch import ALL_ROWS, ONCE_PER_NODE, ONCE_PER_RANK, ROWS, Dispatch, dispatch_of
from megalina.blocks.embedding import Embedding
from megalina.blocks.gqa import GroupedQueryAttention
from megalina.blocks.head import Balance, Head
from megalina.blocks.heads import model_of_layer
from megalina.blocks.mla import LatentAttention
from megalina.blocks.mlp import DenseMlp
from megalina.blocks.moe import MoE
from megalina.blocks.mtp import Mtp, MtpHead
from megalina.blocks.node_moe import NodeMoE
from megalina.blocks.once_moe import OnceMoE
from megalina.blocks.optimizers import optimizer_of
from megalina.blocks.parameter import Parameter
from megalina.blocks.parts import Parts
from megalina.blocks.routers import has_state, kind_of, takes_whole_micro_batch
from megalina.config import ModelConfig, ParallelConfig, PretrainConfig, RouterConfig, is_moe_layer
from megalina.reference import is_reference, load
from megalina.step.forward import Shape
from megalina.step.program import Instruction

ATTENTION, FFN = "attention", "ffn"  # of `model.layer`; the second is a dense MLP or a mixture of experts, layer by layer

DISPATCHES: Mapping[str, type[MoE]] = {ROWS: MoE, ONCE_PER_RANK: OnceMoE, ONCE_PER_NODE: NodeMoE}
CONTEXTS = ("", "all_gather", "all_to_all")  # of `Shape.context`


@dataclass(frozen=True)
class Blocks:
    """Of one model."""

    whole: Whole
    embedding: Embedding
    layers: tuple[tuple[Block, ...], ...]
    last: tuple[Block, ...]  # the balance of all layers, what cuts a range into parts, the head
    mtp_layers: int = 0  # so many of `layers`, the last ones, are of multi-token prediction
    mtp_head: MtpHead | None = None  # of each of them

    @property
    def moe(self) -> tuple[bool, ...]:
        """Of each layer: MoE or dense."""
        return tuple(any(isinstance(block, MoE) for block in blocks) for blocks in self.layers)

    def all(self) -> Iterator[tuple[int, Block]]:
        """Each block with its layer, -1 outside of the layers, in the order of the model's parameters."""
        yield -1, self.embedding
        for layer, blocks in enumerate(self.layers):
            for block in (*blocks, *self.ends(layer)):
                yield layer, block
        for block in self.last:
            yield -1, block

    def ends(self, layer: int) -> tuple[Block, ...]:
        """What reads a layer's output and writes to no stream."""
        return (self.mtp_head,) if self.mtp_head is not None and layer >= len(self.layers) - self.mtp_layers else ()

    def parameters(self) -> Iterator[tuple[int, Parameter]]:
        """Each parameter with its layer, in the model's order."""
        for layer, block in self.all():
            for parameter in block.parameters():
                yield layer, parameter

    @cached_property
    def losses(self) -> Sequence[Loss]:
        """Each of them once, that of the head first; `layers`: how many layers have it."""
        found: dict[str, Loss] = {}
        for _, block in reversed(list(self.all())):
            for loss in block.losses:
                layers = found[loss.name].layers + 1 if loss.name in found else 1
                found[loss.name] = Loss(loss.name, loss.values, loss.weight, loss.divisor, layers)
        return list(found.values())

    @cached_property
    def _owner(self) -> dict[tuple[int, str], Block]:
        """Which block an instruction is of, in every layout."""
        out: dict[tuple[int, str], Block] = {}
        cut = [(tp, sequence, context) for tp, sequence in ((1, True), (2, True), (2, False)) for context in CONTEXTS]
        for layout in (self.shape(tp=tp, sequence=sequence, context=context) for tp, sequence, context in cut):
            for layer, lines, reads, writes in layout.placed():
                assert isinstance(lines, Block)
                for instruction in lines.lines(layout, layer, reads, writes):
                    other = out.setdefault((layer, instruction.name), lines)
                    if other is not lines:
                        raise ValueError(
                            f"blocks {other.name} and {lines.name} of layer {layer} both have an instruction {instruction.name}"
                        )
                made = ("cut", "join") if isinstance(lines, MoE) else lines.cheap  # by passes
                out |= {(layer, name): lines for name in made}
        return out

    @cached_property
    def _named(self) -> dict[str, Block]:
        """By the name of an instruction alone."""
        out = {name: block for (_, name), block in self._owner.items()}
        for moe in (True, False):  # also of layers that this model happens not to have
            other = Blocks(self.whole, self.embedding, ((ffn_of(self.whole.router, moe, self.whole.dispatch)(self.whole),),), ())
            out = {name: block for (_, name), block in other._owner.items()} | out
        return out

    def block_of(self, instruction: Instruction) -> Block:
        """That of its layer; of its name alone where that has none (what would such a layer cost?).  KeyError for an instruction
        that no block has: those that open and close a step."""
        return self._owner.get((instruction.layer, instruction.name)) or self._named[instruction.name]

    def is_own(self, layer: int, name: str) -> bool:
        """Whether this instruction is of a block that the user has written."""
        return not isinstance(self._owner.get((layer, name), self.embedding), Embedding | Attention | DenseMlp | MoE | Mtp | Head)

    @property
    def clipped_groups(self) -> int:
        """Groups of heads whose largest logits are known in each layer; 0: attention tells none."""
        declared = (p.shape[0] // sum(rows for rows, _ in p.clip) for _, p in self.parameters() if p.clip)
        return next(declared, 0)

    def shape(self, *, tp: int, sequence: bool, context: str = "", head_logits: bool = False, pp: int = 1) -> Shape:
        """What a program must know of the model in a layout; `context`: as in `Shape`."""
        return Shape(
            first=self.embedding,
            layers=self.layers,
            last=self.last,
            moe=self.moe,
            mtp_layers=self.mtp_layers,
            mtp_head=self.mtp_head,
            tp=tp > 1,
            sequence=sequence,
            context=context,
            shared_experts=self.whole.model.shared_d_ff > 0,
            micro_batch_groups=self.whole.router.group == "micro_batch",
            whole_routers=takes_whole_micro_batch(self.whole.router, tp=tp),
            router_state=has_state(self.whole.router) and any(self.moe),
            head_logits=head_logits,
            pipeline=pp > 1,
        )


def attention_of(model: ModelConfig) -> type[Attention]:
    """The block that `attention` is in every layer."""
    return LatentAttention if model.attention == "mla" else GroupedQueryAttention


def ffn_of(router: RouterConfig, is_moe: bool, dispatch: Dispatch = ALL_ROWS) -> type[Block]:
    """The block that `ffn` is in a layer; `dispatch`: of the `Whole`."""
    if not is_moe:
        return DenseMlp
    return DenseMoE if kind_of(router).is_dense else DISPATCHES[dispatch.kind]


def blocks_of(
    model: ModelConfig,
    router: RouterConfig,
    *,
    vocab_size: int = 0,
    padded_vocab: int = 0,
    max_positions: int = 0,
    moe: Sequence[bool] | None = None,
    dispatch: Dispatch = ALL_ROWS,
) -> Blocks:
    """`vocab_size`: words, 0: the configuration's; `padded_vocab`: rows of the embedding, 0: as many; `max_positions`: 0: the
    configuration's; `moe`: of each layer before those of multi-token prediction, None: as the configuration says; `dispatch`:
    as of `Whole`.

    ValueError for a list of blocks that makes no layer, and for references that lead nowhere."""
    words = vocab_size or model.vocab_size
    moe = tuple(is_moe_layer(model, i) for i in range(model.num_layers)) if moe is None else tuple(moe)
    positions = max_positions or model.max_positions
    asked = _Asked(f"{model} {router}", words, padded_vocab or words, positions, moe, dispatch, model, router)
    return _made(asked) if any(map(is_reference, (*model.layer, router.kind, *router.losses))) else _known(asked)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What blocks are of.  Configurations are compared as text, since they may change."""

    text: str
    words: int
    padded: int
    max_positions: int
    moe: tuple[bool, ...]
    dispatch: Dispatch
    model: ModelConfig = field(compare=False)
    router: RouterConfig = field(compare=False)


@lru_cache(maxsize=64)
def _known(asked: _Asked) -> Blocks:
    """Searches ask for the blocks of one model again and again."""
    return _made(replace(asked, model=replace(asked.model), router=replace(asked.router)))


def _made(asked: _Asked) -> Blocks:
    model, router, moe = asked.model, asked.router, asked.moe
    whole = Whole(model, router, asked.words, asked.padded, asked.max_positions, asked.dispatch)
    mtp, head = (Mtp(whole), MtpHead(whole)) if model.mtp_layers else (None, None)
    check_layer(model.layer)
    kinds = {name: load(name) if is_reference(name) else None for name in model.layer}
    layers = []
    made: dict[tuple[str, bool, int], Block] = {}  # layers that are alike may share them
    for layer, is_moe in enumerate((*moe, *[moe[-1]] * model.mtp_layers)):
        blocks: list[Block] = [] if mtp is None or layer < len(moe) else [mtp]
        for name in model.layer:
            own = model_of_layer(model, layer) if name == ATTENTION else model
            key = name, is_moe and name == FFN, own.window
            if key not in made:
                kind = kinds[name] or (attention_of(model) if name == ATTENTION else ffn_of(router, is_moe, asked.dispatch))
                if not (isinstance(kind, type) and issubclass(kind, Block)):
                    raise ValueError(f"model.layer: {name} is no block: derive it from megalina.blocks.block.Block")
                made[key] = kind(whole if own is model else replace(whole, model=own))
            blocks.append(made[key])
        layers.append(tuple(blocks))
    last = Balance(whole), Parts(whole), Head(whole)
    return Blocks(whole, Embedding(whole), tuple(layers), last, model.mtp_layers, head)


def context_of(parallel: ParallelConfig) -> str:
    """As in `Shape`."""
    return parallel.cp_kind if parallel.cp > 1 else ""


def shape_of(model: ModelConfig, router: RouterConfig, *, tp: int, sequence: bool, context: str = "") -> Shape:
    """What a program must know of the model and the layout."""
    return blocks_of(model, router).shape(tp=tp, sequence=sequence, context=context)


def step_shape(config: PretrainConfig) -> Shape:
    """What the program of a training step must know of the model and the layout."""
    parallel = config.parallel
    blocks = blocks_of(config.model, config.router, dispatch=dispatch_of(config))
    return blocks.shape(
        tp=parallel.tp,
        sequence=parallel.sequence,
        context=context_of(parallel),
        head_logits=optimizer_of(config.optim).clips_heads,
        pp=parallel.pp,
    )


def plain_shape(
    moe: Sequence[bool],
    *,
    tp: bool = False,
    sequence: bool = True,
    tied: bool = True,
    shared_experts: bool = False,
    global_balance: bool = False,
    micro_batch_groups: bool = False,
    experts_choose: bool = False,
    router_state: bool = False,
    all_experts: bool = False,
    mtp_layers: int = 0,
) -> Shape:
    """The shape of a model of which only this matters: for lists alone."""
    group = "global" if global_balance else "micro_batch" if micro_batch_groups else "sequence"
    model = ModelConfig(num_layers=len(moe), shared_d_ff=8 * shared_experts, tie_embeddings=tied, mtp_layers=mtp_layers)
    kind = "expert_choice" if experts_choose else "sigmoid" if router_state else "dense" if all_experts else "topk"
    router = RouterConfig(kind=kind, group=group, bias_update_rate=0.01 if router_state else 0.0)
    return blocks_of(model, router, moe=moe).shape(tp=1 + tp, sequence=sequence)


def check_layer(names: Sequence[str]) -> None:
    """ValueError unless `model.layer` makes a layer."""
    names = [str(name) for name in names]  # numbers, say, that come from a command line
    own = [name for name in names if name not in (ATTENTION, FFN)]
    if [name for name in names if name not in own] != [ATTENTION, FFN]:
        raise ValueError(
            f"model.layer is [{', '.join(names)}]: it must have attention once and ffn once, in this order; blocks of your own, "
            "as folder/file.py:Name, may stand before, between and after them"
        )
    if bad := [name for name in own if not is_reference(name)]:
        raise ValueError(f"model.layer has {bad[0]}: choose attention, ffn, or a block of your own as folder/file.py:Name")
    if len(set(own)) != len(own):
        raise ValueError(f"model.layer is [{', '.join(names)}]: a layer has each block once")


def check_own(blocks: Blocks) -> None:
    """ValueError where code of your own declares losses outside of a router, or what two blocks must not have in common."""
    for _, block in blocks.all():
        own = not isinstance(block, Embedding | Attention | DenseMlp | MoE | Mtp | Balance | Parts | Head)
        if own and block.losses:
            raise ValueError(
                f"block {block.name} declares losses ({', '.join(loss.name for loss in block.losses)}): auxiliary losses are of "
                "routers alone; name yours in router.losses"
            )
    _ = blocks.losses, blocks._owner  # asked for, they raise ValueError for losses that are none and instructions of one name
