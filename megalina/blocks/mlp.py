"""A dense MLP behind a norm and beside a residual."""

from collections.abc import Mapping, Sequence

from megalina.blocks import memory
from megalina.blocks.activation import activation_of
from megalina.blocks.block import Block, between, norm_parameters, output_std
from megalina.blocks.memory import Deferred, Inside
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import At
from megalina.blocks.work import Piece, mlp, norm, residual
from megalina.config import ModelConfig
from megalina.step.forward import Shape, compute
from megalina.step.program import Instruction


def mlp_parameters(name: str, model: ModelConfig, d_ff: int, *, cut: bool) -> list[Parameter]:
    """Two matrices of hidden width `d_ff`, gate and up in one where the activation is gated; tp cuts them where `cut` says so."""
    inputs = activation_of(model).inputs
    sharded = {"tp": 1} if cut else {}
    out = [
        Parameter(f"{name}.w1", (inputs, d_ff, model.d_model), model.init_std, sharded, dims=2),
        Parameter(f"{name}.w2", (model.d_model, d_ff), output_std(model), sharded),
    ]
    if model.bias:
        out.append(Parameter(f"{name}.b1", (inputs, d_ff), 0.0, sharded, decay=False, dims=1))
        out.append(Parameter(f"{name}.b2", (model.d_model,), 0.0))
    return out


class DenseMlp(Block):
    name = "mlp"
    functions = "megalina.model.mlp:DenseMlp"
    heavy = ("mlp", "mlp_hidden")

    @property
    def deferrable(self) -> Sequence[str]:
        return self.heavy

    @property
    def d_ff(self) -> int:
        return self.model.dense_d_ff or self.router.top_k * self.model.d_ff

    def parameters(self) -> Sequence[Parameter]:
        return [*norm_parameters("mlp_norm", self.model), *mlp_parameters("mlp", self.model, self.d_ff, cut=True)]

    def lines(self, shape: Shape, layer: int, reads: str, writes: str) -> list[Instruction]:
        if not shape.tp:
            return [compute("mlp", layer, f"{reads} #batch", writes, shape.dense(layer))]
        return [
            *between(shape, layer, "mlp", "hidden", reads, "m", "o", (shape.dense(layer),)),
            compute("mlp_residual", layer, f"{reads} o #batch", writes, shape.copied(layer)),
        ]

    def work(self, at: At) -> Piece:
        hidden = self.d_ff / at.rank.tp
        match at.name:
            case "mlp_norm":
                return norm(at.rank, at.held)
            case "mlp_residual":
                return residual(at.rank, at.held)
            case "mlp_hidden":
                return mlp(at.rank, at.tokens, hidden)
        return norm(at.rank, at.tokens) + mlp(at.rank, at.tokens, hidden) + residual(at.rank, at.tokens)

    def memory(self, at: At) -> Inside:
        match at.name:
            case "mlp_norm":
                return memory.norm(at.rank, int(at.held))
            case "mlp_residual":
                return memory.residual(at.rank, int(at.held))
        return memory.mlp(at.rank, int(at.tokens), self.d_ff // at.rank.tp, whole=at.rank.tp == 1)

    def deferred(self, at: At) -> Deferred:
        return memory.deferred_mlp(at.rank, int(at.tokens), self.d_ff // at.rank.tp, whole=at.rank.tp == 1)

    def value_bytes(self, at: At) -> Mapping[str, int]:
        number = at.rank.width * at.rank.element
        held, tokens = int(at.held) * number, int(at.tokens) * number
        return {"m": held, "m_all": tokens, "o_part": tokens, "o": held}
