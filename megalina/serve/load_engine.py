"""Loads an engine for the checkpoint of any layout.  Each rank reads what is dense; each node reads the experts once."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megalina.blocks.dispatch import ONCE_PER_RANK
from megalina.blocks.selection import Selection, selection_of, served_top_k
from megalina.checkpoint.loaded_model import LoadedModel, load_model, read_experts
from megalina.collective_log import CollectiveLog
from megalina.config import InferConfig
from megalina.mesh import Mesh
from megalina.parallel.emulated_device import ServingDevice
from megalina.placement.controller import Policy
from megalina.placement.planners.identity import identity
from megalina.placement.routing_trace import RoutingTrace
from megalina.serve.engine import Engine, EngineSettings
from megalina.serve.even_routing import EvenRouting
from megalina.serve.expert_memory import num_swap_bytes
from megalina.serve.host_experts import HostExperts, experts_of, share_experts
from megalina.serve.policies import Served, policy_of, slots_of


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint, ready for engines of several modes: they share its weights."""

    loaded: LoadedModel
    host: HostExperts
    mesh: Mesh
    served: Served
    log: CollectiveLog  # of the collectives of all engines
    selection: Selection | None = None  # of a model trained with router=dense: which experts tokens use in all engines

    def policy(self, config: InferConfig, profile: RoutingTrace | None) -> Policy:
        """ValueError as `policy_of`."""
        return policy_of(config, self.served, profile)

    @property
    def to_profile(self) -> "Opened":
        """The same with as many experts of each token, which a profile needs: what is above a threshold is not counted on."""
        fixed = self.selection is None or self.selection.rule == "top_k"
        return self if fixed else replace(self, selection=Selection("top_k", self.served.top_k))

    def engine(self, config: InferConfig, policy: Policy, *, device: ServingDevice | None = None) -> Engine:
        """`policy`: the configuration's.  ValueError as `Engine`."""
        served, gpt = self.served, self.loaded.gpt
        slots = slots_of(config, served)
        resident = identity(torch.ones(served.num_experts).double().numpy(), served.num_devices, slots)
        settings = EngineSettings(
            batch_invariant=config.batch_invariant,
            swap_bytes=num_swap_bytes(config),
            combine_chunks=config.combine_chunks,
            once_per_rank=config.dispatch == ONCE_PER_RANK,
        )
        even = EvenRouting(served.num_experts, served.num_devices, self.mesh.ep.rank) if config.even_routing else None
        residents = [resident] * len(gpt.moe_layers)
        return Engine(
            gpt,
            self.host,
            self.mesh,
            policy,
            residents,
            settings,
            log=self.log,
            selection=self.selection,
            reroute=even,
            device=device,
        )


def open_checkpoint(
    path: Path,
    mesh: Mesh,
    *,
    log: CollectiveLog | None = None,
    dtype: torch.dtype = torch.float32,
    devices_per_node: int = 0,
    infer: InferConfig | None = None,
) -> Opened:
    """All ranks call it together.  `infer`: which experts tokens use, its `select` settings; all else is each engine's own.

    ValueError for a folder without a checkpoint, a damaged file, a model without experts, or of which none can be selected."""
    loaded = load_model(path, dtype=dtype, experts=False)
    gpt = loaded.gpt
    if not gpt.moe_layers:
        raise ValueError(f"{path} is of a model without MoE layers: tools/generate.py and one process are for it")

    def read_layer(number: int) -> dict[str, torch.Tensor]:
        return {name: t.to(dtype) for name, t in read_experts(path, gpt, gpt.moe_layers[number]).items()}

    shape, num_experts = experts_of([read_layer(0)])
    on_cuda = next(gpt.parameters()).is_cuda
    host = share_experts(shape, len(gpt.moe_layers), num_experts, read_layer, mesh, page_locked=on_cuda)
    selection = selection_of(infer or InferConfig(), gpt.router, num_experts)
    served = Served(num_experts, served_top_k(selection, gpt.router, num_experts), mesh.world.size, devices_per_node)
    return Opened(loaded, host, mesh, served, log or CollectiveLog(mesh.world.rank), selection)
