"""The engine: prefill and decode of a model whose experts are spread over ranks, through the list of an inference step.

Each rank has its own sequences; experts sit where placements say.  A placement never changes an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.model import shape_of
from megalina.blocks.selection import Selection
from megalina.collective_log import CollectiveLog
from megalina.mesh import Mesh
from megalina.model.attention import KeyValues
from megalina.model.gpt import GPT
from megalina.parallel.emulated_device import ServingDevice
from megalina.parallel.executor import Executor
from megalina.placement.controller import Controller, Outcome, Policy
from megalina.placement.placement import Placement
from megalina.placement.predictors.predictor import Ids
from megalina.serve.expert_memory import num_swap_experts
from megalina.serve.functions import InferenceFunctions, Reroute
from megalina.serve.host_experts import ExpertStream, HostExperts
from megalina.serve.slots import Slots
from megalina.step.inference import BATCH, PAST, REROUTE, inference_step
from megalina.timeline.recorder import Recorder

TILE_ROWS = 16  # of kernels whose result must not depend on the batch


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`slots_per_device` is the placements' own."""

    batch_invariant: bool = False  # a row's result doesn't depend on the other rows of its expert
    swap_bytes: int = 0  # experts on their way take no more, over all layers; 0: two layers' slots
    combine_chunks: int = 1  # a layer's rows go back in so many parts, each once its slots have computed
    once_per_rank: bool = False  # a token's row goes once to each device that has experts of it


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """What a batch gave."""

    hidden_TD: Tensor  # the last norm's output of this rank's tokens, perhaps none
    chosen: tuple[Ids, ...]  # [T, K] of each MoE layer, of this rank's tokens that are no padding; the router's order
    outcomes: tuple[Outcome, ...]  # of each MoE layer, alike on all ranks


class Engine:
    """`gpt`: this rank's copy without experts.  `residents`: where each MoE layer's experts sit at first, the same on all ranks.

    `log`: where collectives are noted; None: one of its own.  `reroute`: what is done instead of what routers choose, in every
    batch.  `selection`: which experts tokens use of a model trained with router=dense; engines of other selections may share
    `gpt`.  `device`: an emulated one.  ValueError for placements of other layers or devices, for more chunks than slots, and for
    bytes on their way that are less than a layer's slots."""

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
        selection: Selection | None = None,
        reroute: Reroute | None = None,
        device: ServingDevice | None = None,
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
        self.gpt, self.mesh, self.settings, self.device = gpt, mesh, settings, device
        gpt.eval()
        where = next(gpt.parameters()).device
        stream = ExpertStream(where) if where.type == "cuda" else None
        self.slots = Slots(host, residents, mesh.ep.rank, spare=spare, stream=stream)
        self.controller = Controller(policy, residents)
        tile = TILE_ROWS if settings.batch_invariant else 0
        once = settings.once_per_rank
        functions = InferenceFunctions(
            gpt=gpt, mesh=mesh, slots=self.slots, controller=self.controller, tile=tile, device=device, once=once
        )
        shape = shape_of(gpt.config, gpt.router, tp=1, sequence=False)
        self.program = inference_step(shape, learns=policy.predictor is not None, chunks=settings.combine_chunks, once=once)
        self._reroute, self._selection = reroute, selection
        self._executor = Executor(self.program, functions, mesh, {}, log=log, device=device)

    def run(
        self,
        batch: Batch,
        past: Sequence[KeyValues] | None = None,
        *,
        reroute: Reroute | None = None,
        record: Recorder | None = None,
        emulate: bool = False,
    ) -> Passed:
        """One batch of this rank; `past` grows.  All ranks call it together.

        `reroute`: for this batch, in place of the engine's.  `record` gets the events.  `emulate`: the emulated device takes its
        time."""
        if self.device is not None:
            self.device.begin(int(batch.valid_BS.sum()) if emulate else None)
        self.gpt.select(self._selection)
        with torch.inference_mode():
            given = {BATCH: batch, PAST: past, REROUTE: reroute or self._reroute}
            out = self._executor.run(given, record=record)
        moe = self.gpt.moe_layers
        return Passed(
            out["#out.-.0"],
            out[f"#seen.{moe[-1]}.0"] if moe else (),
            tuple(out[f"#outcome.{layer}.0"] for layer in moe),
        )

    def hidden(self, batch: Batch, past: Sequence[KeyValues] | None = None, *, record: Recorder | None = None) -> Tensor:
        """The last norm's output [T, D] of this rank's tokens, as `run` gives it."""
        return self.run(batch, past, record=record).hidden_TD

    def logits(self, batch: Batch, past: Sequence[KeyValues] | None = None, *, emulate: bool = False) -> Tensor:
        """[B, V] after each sequence's last token; as `run`."""
        n_TD = self.run(batch, past, emulate=emulate).hidden_TD
        sequences, length = batch.tokens_BS.shape
        with torch.inference_mode():
            return self.gpt.logits(n_TD.view(sequences, length, n_TD.shape[1])[:, -1])[:, : self.gpt.vocab_size]

    def close(self) -> None:
        self._executor.close()
        self.slots.close()
