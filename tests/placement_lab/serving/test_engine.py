"""What is simulated against the engine itself: the same routing replayed on gloo ranks, and every count must be the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megalina.blocks.dispatch import ONCE_PER_RANK
from megalina.blocks.model import plain_shape
from megalina.config import InferConfig, RouterConfig
from megalina.perfmodel.sim.network import Network
from megalina.placement.controller import Policy
from megalina.placement.planners.identity import identity
from megalina.placement.routing_trace import RoutingTrace, traced
from megalina.serve.modes import read_mode
from megalina.serve.policies import Served, policy_of
from megalina.timeline.recorder import Recorder
from placement_lab.serving.decisions import Decider, Decision, ServedBatch
from placement_lab.serving.seconds import GivenTimes
from placement_lab.serving.simulator import Serving, program_of
from placement_lab.workloads import own_part
from tests.parallel.ranks import run_on_ranks
from tests.serve.small_engine import EXPERTS, batch_of, small_engine, small_gpt

CONF = Path(__file__).resolve().parents[3] / "conf" / "infer"
LAYERS, BATCHES, SLOTS, LENGTH = 3, 5, 4, 4
MODES = ("static", "window", "lina", "best", "no_estimation", "chunks", "once")


def routing(world: int, top_k: int) -> tuple[RoutingTrace, list[ServedBatch]]:
    """Skewed, with paths, and another expert hot in every batch; ranks have unequal numbers of tokens."""
    random = np.random.default_rng(world)
    tokens_R = LENGTH * (1 + np.arange(world))

    def ids(tokens: int, hot: int) -> np.ndarray[Any, Any]:
        liking_TLE = random.gumbel(size=(tokens, LAYERS, EXPERTS))
        for layer in range(LAYERS):
            liking_TLE[:, layer, (hot + layer) % EXPERTS] += 2.0
        return np.argsort(-liking_TLE, axis=2)[..., :top_k]

    profile = traced(np.concatenate([ids(40, hot) for hot in range(EXPERTS)]), EXPERTS)
    return profile, [ServedBatch(ids(int(tokens_R.sum()), number), tokens_R) for number in range(BATCHES)]


def policy_for(mode: str, world: int, profile: RoutingTrace) -> tuple[Policy, InferConfig]:
    """`lina` plans every layer here, since there are but three."""
    base, *overrides = {
        "no_estimation": ("lina", "infer.predictor=none", "infer.trigger=always", "infer.first_planned=0"),
        "lina": ("lina", "infer.first_planned=1"),
        "chunks": ("best", "infer.combine_chunks=2"),
        "once": ("best", "infer.dispatch=once_per_rank"),
    }.get(mode, (mode,))
    config = replace(read_mode(CONF, base, overrides), slots_per_device=SLOTS, row_us=1.0, replan_ms=2e-3)
    return policy_of(config, Served(EXPERTS, profile.top_k, world), profile), config


def in_the_engine(top_k: int) -> dict[str, list[Any]]:
    """Of each mode, for each batch: loads, placements and what was told and fetched here."""
    rank, world = dist.get_rank(), dist.get_world_size()
    profile, batches = routing(world, top_k)
    gpt = small_gpt(RouterConfig(top_k=top_k))
    found: dict[str, list[Any]] = {}
    for mode in MODES:
        policy, config = policy_for(mode, world, profile)
        resident = identity(np.ones(EXPERTS), world, SLOTS)
        once = config.dispatch == ONCE_PER_RANK
        engine = small_engine(gpt, policy, [resident] * LAYERS, combine_chunks=config.combine_chunks, once_per_rank=once)
        found[mode] = []
        fetched = 0
        for batch in batches:
            own_TLK = batch.ids_TLK[own_part(batch.tokens_R, rank)]

            def as_recorded(number: int, chosen_TK: torch.Tensor, own: np.ndarray[Any, Any] = own_TLK) -> torch.Tensor:
                return torch.from_numpy(own[:, number]).to(chosen_TK)

            fed = batch_of([[0] * LENGTH] * (len(own_TLK) // LENGTH))
            recorder = Recorder()
            outcomes = engine.run(fed, reroute=as_recorded, record=recorder).outcomes
            told, sent = (
                {e.layer: e.num_bytes for e in recorder.events() if e.kind == "send" and e.name == name}
                for name in ("told", "dispatch")
            )
            found[mode].append(
                {
                    "load": [o.load_N.tolist() for o in outcomes],
                    "replanned": [o.replanned for o in outcomes],
                    "slots": [engine.slots.placement(layer).slots for layer in range(LAYERS)],
                    "fetched": engine.slots.done.experts - fetched,
                    "told": [told[layer] for layer in range(LAYERS)],
                    "sent": [sent[layer] for layer in range(LAYERS)],
                    "list": [s.key for s in engine.program],
                }
            )
            fetched = engine.slots.done.experts
        assert engine.slots.done.failed == 0
        engine.close()
    return found


@pytest.fixture(
    scope="module", params=[(2, 1), pytest.param((4, 2), marks=pytest.mark.full)], ids=["2 ranks, top-1", "4 ranks, top-2"]
)
def run(request: pytest.FixtureRequest) -> tuple[int, int, list[Any]]:
    world, top_k = request.param
    return world, top_k, run_on_ranks(world, in_the_engine, top_k)


def bytes_out(decision: Decision, rank: int, *, once: bool) -> int:
    """What leaves a rank to others or comes from them, if that is more."""
    rows_RN = decision.once_RN() if once else decision.rows_RNS.sum(2)
    row_bytes = 32 * 8 + (8 if once else 0)  # a byte for each slot, in whole numbers of the row's type
    sent, received = (int(n.sum() - n[rank]) for n in (rows_RN[rank], rows_RN[:, rank]))
    return max(sent, received) * row_bytes


@pytest.mark.parametrize("mode", MODES)
def test_loads_placements_fetches_and_what_is_told_are_those_of_the_engine(run: tuple[int, int, list[Any]], mode: str) -> None:
    world, top_k, by_rank = run
    profile, batches = routing(world, top_k)
    policy, config = policy_for(mode, world, profile)
    residents = [identity(np.ones(EXPERTS), world, SLOTS)] * LAYERS
    setting = Serving(
        shape=plain_shape((True,) * LAYERS),
        policy=policy,
        residents=residents,
        device=GivenTimes(attention_s=1.0, experts_full_s=1.0, even_tokens=1, even_rows=1),
        network=Network(nic_bytes_per_s=1.0),
        row_bytes=1.0,
        combine_chunks=config.combine_chunks,
        once_per_rank=config.dispatch == ONCE_PER_RANK,
    )
    decider = Decider(policy, residents)
    moved = 0
    for number, batch in enumerate(batches):
        decisions = decider.decide(batch)
        moved += sum(int((d.fetched_N + d.fetched_again_N).sum()) for d in decisions)
        for rank in range(world):
            real = by_rank[rank][mode][number]
            assert [d.load_N.tolist() for d in decisions] == real["load"]
            assert [d.replanned for d in decisions] == real["replanned"]
            assert [d.placement.slots for d in decisions] == real["slots"]
            assert sum(int(d.fetched_N[rank] + d.fetched_again_N[rank]) for d in decisions) == real["fetched"]
            assert [d.told_numbers * 8 for d in decisions] == real["told"]
            assert [bytes_out(d, rank, once=setting.once_per_rank) for d in decisions] == real["sent"]
            assert [s.key for s in program_of(decisions, setting) if s.name != "fetch"] == real["list"]
    assert (moved == 0) == (mode == "static")
