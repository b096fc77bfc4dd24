"""What the built-in blocks declare is what their functions do; a declaration that is wrong is found."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from megalina.blocks.counts import training_flops_per_token
from megalina.blocks.memory import Inside
from megalina.blocks.mlp import DenseMlp
from megalina.blocks.model import blocks_of
from megalina.blocks.routers import KINDS
from megalina.blocks.sizes import At
from megalina.blocks.work import Piece
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_work import forward_flops
from megalina.verify.declared import declared_and_counted
from megalina.verify.proof import COUNTED_LENGTH, differs
from megalina.verify.shrink import shrink

LATENT = (
    *("model.attention=mla", "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4"),
    "model.v_head_dim=6",
)
OVERRIDES: dict[str, Sequence[str]] = {
    **{kind: (f"router={kind}", "router.top_k=1", "router.capacity_factor=0") for kind in KINDS},  # nobody is dropped
    "two of each": (),
    "shared": ("model.shared_d_ff=32",),
    "bias": ("model.bias=true",),
    "gelu": ("model.activation=gelu",),
    "learned positions": ("model.positions=learned",),
    "own output matrix": ("model.tie_embeddings=false",),
    "capacity": ("router.capacity_factor=1.25",),
    "balanced over ranks": ("router.group=global",),
    "z-loss": ("router.z_loss=0.1",),
    "kept at home": ("router.locality_loss=0.1", "router.locality_nodes=2"),
    "mutual information": ("router.mutual_information_loss=0.1",),
    "dense, shared, bias": ("router=dense", "model.shared_d_ff=32", "model.bias=true", "router.z_loss=0.1"),
    "dense, relu": ("router=dense", "model.activation=relu", "router.mutual_information_loss=0"),
    "attention experts": ("model.attention_experts=2", "model.qk_norm=head"),
    "normed together": ("model.qk_norm=projection",),
    "sinks, windows": (
        *("model.attention_sinks=true", "model.window=24", "model.full_attention_every=2", "model.attention_bias=qkv"),
    ),
    "part of a head turns": ("model.rotary_fraction=0.5", "model.rope_scaling=linear", "model.rope_factor=2"),
    "latent": LATENT,
    "latent, queries too": (*LATENT, "model.q_lora_rank=24"),
    "latent, values as wide as keys": (*LATENT, "model.v_head_dim=12"),
    "dense layers": ("model.moe_every=2",),
    "clamped, gated, biases": (
        *("model.activation=swiglu_clamped", "model.shared_d_ff=32", "model.shared_gate=true", "model.bias=true"),
        *("router.bias=true", "model.moe_every=2"),
    ),
    "ahead": ("model.mtp_layers=2", "model.tie_embeddings=false"),
    "QK-clip": ("optim=muon_clip",),
    "QK-clip, latent, ahead": (*LATENT, "model.mtp_layers=1", "optim=muon_clip"),
}


def _config(overrides: Sequence[str]) -> PretrainConfig:
    base = shrink(compose(["model=tiny", *overrides]), 1)
    train = replace(base.train, dtype="float32", seq_len=COUNTED_LENGTH, global_batch_size=2, micro_batch_size=2)
    return replace(base, train=train, model=replace(base.model, max_positions=COUNTED_LENGTH))


def _wrong(overrides: Sequence[str]) -> list[str]:
    config = _config(overrides)
    rows = declared_and_counted(config)
    assert len({row.instruction for row in rows}) == len(rows) >= 8
    return [wrong for row in rows if (wrong := differs(row, 2 * COUNTED_LENGTH))]


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", OVERRIDES)
def test_flops_and_kept_bytes_are_those_of_the_functions(name: str) -> None:
    assert _wrong(OVERRIDES[name]) == []


def test_checkpoints_of_dense_and_sparse_training_are_interchangeable() -> None:
    """The same parameters at the same names, of the same shapes, in the same buckets."""
    dense, sparse = (compose(["model=tiny", f"router={name}", "model.bias=true"]) for name in ("dense", "topk"))
    found = [list(blocks_of(config.model, config.router).parameters()) for config in (dense, sparse)]
    assert found[0] == found[1]


def test_dense_training_costs_as_much_as_routing_to_all_experts() -> None:
    """But for what sorting and weighing rows takes, which are no products."""
    sizes = {"vocab_size": 512, "seq_len": 64}
    dense, every, sparse = (
        compose(["model=tiny", f"router={name}", f"router.top_k={k}"]) for name, k in (("dense", 1), ("topk", 4), ("topk", 1))
    )
    flops = [training_flops_per_token(config.model, config.router, **sizes) for config in (dense, every, sparse)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-9) and flops[0] > 1.5 * flops[2]
    experts = [forward_flops(config)["experts"] for config in (dense, every, sparse)]
    assert experts[0] == pytest.approx(experts[1], rel=1e-9) == pytest.approx(4 * experts[2], rel=1e-9)


def test_a_product_that_is_not_declared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    true = DenseMlp.work

    def one_product_less(block: DenseMlp, at: At) -> Piece:
        piece = true(block, at)
        return replace(piece, forward=replace(piece.forward, products=piece.forward.products[1:]))

    monkeypatch.setattr(DenseMlp, "work", one_product_less)
    wrong = _wrong(OVERRIDES["dense layers"])
    assert wrong and all("of mlp: " in line and "FLOPs are declared" in line for line in wrong), wrong


def test_bytes_that_are_not_declared_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    true = DenseMlp.memory

    def nothing_kept(block: DenseMlp, at: At) -> Inside:
        return replace(true(block, at), kept=0)

    monkeypatch.setattr(DenseMlp, "memory", nothing_kept)
    wrong = _wrong(OVERRIDES["dense layers"])
    assert wrong and all("of mlp: 0 kept bytes are declared" in line for line in wrong), wrong
