"""A block of your own: a gate on the residual stream after attention, x + sigmoid(n G) * (n W), with n the normalized x.

Declared once, without torch (`Gate`), with its torch functions (`GateFunctions`).  No other file knows of it:

    python pretrain_gpt_moe.py 'model.layer=[attention,"docs/examples/own_layer.py:Gate",ffn]'

Run this file to prove it: python docs/examples/own_layer.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks import memory
from megalina.blocks.block import Block, norm_parameters, output_std
from megalina.blocks.memory import Inside
from megalina.blocks.parameter import Parameter
from megalina.blocks.sizes import At
from megalina.blocks.work import Piece, linear, moved, norm
from megalina.compose import compose
from megalina.model.block_functions import BlockFunctions
from megalina.model.linear import linears
from megalina.model.norm import Norm

HERE = str(Path(__file__).resolve())


class Gate(Block):
    name = "gate"
    functions = f"{HERE}:GateFunctions"

    def parameters(self) -> Sequence[Parameter]:
        width = self.model.d_model
        return [
            *norm_parameters("gate_norm", self.model),
            Parameter("gate.weight", (width, width), self.model.init_std),
            Parameter("gate.out", (width, width), output_std(self.model)),
        ]

    def work(self, at: At) -> Piece:
        rank, tokens = at.rank, at.held
        products = linear(rank, tokens, rank.width, rank.width) + linear(rank, tokens, rank.width, rank.width)
        return norm(rank, tokens) + products + moved(rank, 7 * tokens, 10 * tokens, 3, 5)

    def memory(self, at: At) -> Inside:
        before, tokens = memory.norm(at.rank, int(at.held)), int(at.held)
        x = tokens * at.rank.width * at.rank.element  # the normalized tokens, both products, the gate
        return Inside(before.kept + 3 * x, before.kept + 5 * x, 5 * x + memory.outer(at.rank, at.rank.width, at.rank.width))


class GateFunctions(BlockFunctions):
    def __init__(self, block: Block, layer: Any):
        layer.gate_norm = Norm(block.model.norm_eps)
        super().__init__(block, layer)

    def gate(self, x_TD: Tensor, batch: Batch) -> Tensor:
        weights = (self.weight("gate.weight"), self.weight("gate.out"))
        gate_TD, out_TD = linears(self.holder.gate_norm(x_TD), weights, (None, None))
        return x_TD + torch.sigmoid(gate_TD) * out_TD


if __name__ == "__main__":
    from megalina.verify.proof import prove

    model = ["model=tiny", "model.shared_d_ff=32", "router.z_loss=0.001"]
    found = prove(compose([*model, f'model.layer=[attention,"{HERE}:Gate",ffn]']), without=compose(model))
    width, layers = compose(model).model.d_model, compose(model).model.num_layers
    assert found["added"]["parameters"] == layers * (2 * width * width + width)
    assert found["added"]["flops_per_token"] == layers * 3 * 2 * 2 * width * width
    print(json.dumps(found))
