"""A small model and its engine, for tests on ranks; everything from seeds, alike on all ranks."""

from typing import Any

import numpy as np
import torch

from megalina.batch import Batch
from megalina.config import ModelConfig, RouterConfig
from megalina.mesh import Mesh, build_mesh
from megalina.model.gpt import GPT
from megalina.model.init import initialize
from megalina.parallel.emulated_device import ServingDevice
from megalina.placement.controller import Policy
from megalina.placement.placement import Placement
from megalina.serve.engine import Engine, EngineSettings
from megalina.serve.host_experts import HostExperts, experts_of, share_experts

WORDS, POSITIONS, EXPERTS = 97, 48, 6


def small_gpt(router: RouterConfig | None = None, dtype: torch.dtype = torch.float64, **model: Any) -> GPT:
    settings = {"num_layers": 3, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_experts": EXPERTS, "d_ff": 24}
    config = ModelConfig(**{**settings, "init_std": 0.3, **model})
    gpt = GPT(config, router or RouterConfig(), vocab_size=WORDS, max_positions=POSITIONS, seed=1)
    initialize(gpt, seed=1, dtype=dtype)
    gpt.eval()
    return gpt


def shared(gpt: GPT, mesh: Mesh) -> HostExperts:
    layers = [dict(gpt.layers[i].experts.named_parameters()) for i in gpt.moe_layers]
    shape, number = experts_of(layers)
    with torch.no_grad():
        return share_experts(shape, len(layers), number, lambda i: layers[i], mesh)


def small_engine(
    gpt: GPT,
    policy: Policy,
    residents: list[Placement],
    device: ServingDevice | None = None,
    **settings: Any,
) -> Engine:
    mesh = build_mesh(ep=torch.distributed.get_world_size())
    return Engine(gpt, shared(gpt, mesh), mesh, policy, residents, EngineSettings(**settings), device=device)


def layer_bytes(gpt: GPT, slots: int) -> int:
    """Of a device's slots in one layer: the smallest that experts on their way may take."""
    experts = gpt.layers[gpt.moe_layers[0]].experts
    return slots * sum(p.nbytes for p in experts.parameters()) // EXPERTS


def batch_of(tokens: list[list[int]]) -> Batch:
    token_BS = torch.tensor(tokens)
    everything = torch.ones_like(token_BS, dtype=torch.bool)
    position_BS = torch.arange(token_BS.shape[1]).expand_as(token_BS)
    return Batch(token_BS, token_BS, everything, everything, position_BS, None, torch.zeros(len(tokens), dtype=torch.int64))


def tokens_of(rank: int, sequences: int = 3, length: int = 16) -> list[list[int]]:
    return np.random.default_rng(rank).integers(0, WORDS, (sequences, length)).tolist()


def random_placement(random: np.random.Generator, devices: int, slots: int, experts: int = EXPERTS) -> Placement:
    """Every expert somewhere, the other slots empty or with copies, also two of one expert on one device."""
    places = np.full(devices * slots, -1)
    places[random.permutation(devices * slots)[:experts]] = random.permutation(experts)
    empty = np.flatnonzero(places == -1)
    places[empty] = random.integers(-1, experts, len(empty))
    return Placement(experts, tuple(map(tuple, places.reshape(devices, slots).tolist())))
