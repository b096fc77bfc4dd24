"""The engine: prefill and decode of a model whose experts are spread over ranks, through the list of an inference step.

Each rank has its own sequences; experts sit where placements say.  A placement never changes an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.collective_log import CollectiveLog
from megalina.infer.expert_memory import num_swap_experts
from megalina.infer.expert_stream import ExpertStream
from megalina.infer.functions import InferenceFunctions
from megalina.infer.host_experts import HostExperts
from megalina.infer.slots import Slots
from megalina.mesh import Mesh
from megalina.model.gpt import GPT
from megalina.model.layers import KeyValues
from megalina.parallel.emulated_device import EmulatedDevice
from megalina.parallel.executor import Executor
from megalina.parallel.shard import shape_of
from megalina.placement.controller import Controller, Policy
from megalina.placement.placement import Placement
from megalina.step.inference import inference_step
from megalina.timeline.recorder import Recorder

TILE_ROWS = 16  # of kernels whose result must not depend on the batch


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`slots_per_device` is the placements' own."""

    batch_invariant: bool = False  # a row's result doesn't depend on the other rows of its expert
    swap_bytes: int = 0  # experts on their way take no more, over all layers; 0: two layers' slots
    combine_chunks: int = 1  # a layer's rows go back in so many parts, each once its slots have computed


class Engine:
    """`gpt`: this rank's copy without experts.  `residents`: where each MoE layer's experts sit at first, the same on all ranks.

    `log`: where collectives are noted; None: one of its own.  `device`: makes an emulated one, given the functions that know how
    many rows were here.  ValueError for placements of other layers or devices, for more chunks than slots, and for bytes on their
    way that are less than a layer's slots."""

    def __init__(
        self,
        gpt: GPT,
        host: HostExperts,
        mesh: Mesh,
        policy: Policy,
        residents: Sequence[Placement],
        settings: EngineSettings = EngineSettings(),
        *,
        log: CollectiveLog | None = None,
        device: Callable[[InferenceFunctions], EmulatedDevice] | None = None,
    ):
        if mesh.ep.size != mesh.world.size:
            raise ValueError(
                f"{mesh.world.size} ranks, {mesh.ep.size} of them along ep: all ranks of an engine share the experts"
            )
        if len(residents) != len(gpt.moe_layers):
            raise ValueError(f"{len(residents)} placements for {len(gpt.moe_layers)} MoE layers")
        for number, placement in enumerate(residents):
            if placement.num_devices != mesh.ep.size:
                raise ValueError(
                    f"MoE layer {number} is placed on {placement.num_devices} devices, there are {mesh.ep.size} ranks"
                )
        slots = [placement.slots_per_device for placement in residents]
        if slots and settings.combine_chunks > min(slots):
            raise ValueError(f"{settings.combine_chunks} chunks of {min(slots)} slots: choose {min(slots)} or fewer")
        spare = num_swap_experts(settings.swap_bytes, max(slots, default=0), host.shape.num_bytes)
        self.gpt, self.mesh, self.settings = gpt, mesh, settings
        gpt.eval()
        where = next(gpt.parameters()).device
        stream = ExpertStream(where) if where.type == "cuda" else None
        self.slots = Slots(host, residents, mesh.ep.rank, spare=spare, stream=stream)
        self.controller = Controller(policy, residents)
        tile = TILE_ROWS if settings.batch_invariant else 0
        self.functions = InferenceFunctions(gpt, mesh, self.slots, self.controller, tile=tile)
        shape = shape_of(gpt.config, gpt.router, tp=1, sequence=False)
        self.program = inference_step(shape, learns=policy.predictor is not None, chunks=settings.combine_chunks)
        self.device = device(self.functions) if device is not None else None
        self._executor = Executor(self.program, self.functions, mesh, {}, log=log, device=self.device)

    def hidden(self, batch: Batch, past: Sequence[KeyValues] | None = None, *, record: Recorder | None = None) -> Tensor:
        """The last norm's output [T, D] of this rank's tokens, perhaps none; `past` grows.  All ranks call it together.

        `record` gets the events of the step."""
        self.functions.past = past
        with torch.inference_mode():
            out: Tensor = self._executor.run({"#batch.-.0": batch}, record=record)["#out.-.0"]
        return out

    def logits(self, batch: Batch, past: Sequence[KeyValues] | None = None) -> Tensor:
        """[B, V] after each sequence's last token."""
        n_TD = self.hidden(batch, past)
        sequences, length = batch.tokens_BS.shape
        with torch.inference_mode():
            return self.gpt.logits(n_TD.view(sequences, length, n_TD.shape[1])[:, -1])[:, : self.gpt.vocab_size]

    def close(self) -> None:
        self._executor.close()
        self.slots.close()
