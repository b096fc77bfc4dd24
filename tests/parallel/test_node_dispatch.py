"""Tokens once per node: which meshes have it, and what is refused."""

import os
from dataclasses import replace

from megalina.blocks.dispatch import ONCE_PER_NODE
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.parallel.meshes import meshes_of
from tests.parallel.ranks import run_on_ranks


def config_of(*words: str) -> PretrainConfig:
    return compose(["model=tiny", "model.num_experts=8", "parallel.ep=4", f"parallel.dispatch={ONCE_PER_NODE}", *words])


def _meshes(per_node: int, dispatch: str) -> dict[int, list[int]]:
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    config = config_of()
    config = replace(config, parallel=replace(config.parallel, dispatch=dispatch))
    meshes = meshes_of(config, 4, packings=(1, 2))
    return {k: [] if mesh.ep.nodes is None else list(mesh.counts.ranks) for k, mesh in meshes.items()}


def _refused(per_node: int, ep: int) -> str:
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    try:
        meshes_of(config_of(f"parallel.ep={ep}"), 4)
    except ValueError as error:
        return str(error)
    return ""


REFUSED = {  # ranks on a node, ranks of ep
    (4, 4): "parallel.dispatch=once_per_node with 4 ranks, on nodes of 4: it needs several nodes",
    (1, 4): "parallel.dispatch=once_per_node with 4 ranks, on nodes of 1: it needs several nodes",
    (2, 2): "the 2 ranks of parallel.ep are on one node",
}


def _everything() -> tuple[dict[int, list[int]], dict[int, list[int]], list[str]]:
    """On one pool: starting ranks takes longer than all of it."""
    return _meshes(2, ONCE_PER_NODE), _meshes(2, "auto"), [_refused(*case) for case in REFUSED]


def test_meshes_have_what_was_asked_for_or_refuse_it() -> None:
    """Rows are counted among ranks at one place; packed twice, the ranks of ep are on one node; auto goes by the cluster's nodes,
    which nobody has described here."""
    found = run_on_ranks(4, _everything)
    assert [wanted for wanted, *_ in found] == [{1: place, 2: []} for place in ([0, 2], [1, 3], [0, 2], [1, 3])]
    assert all(auto == {1: [], 2: []} for _, auto, _ in found)
    for *_, said in found:
        assert all(want in line for want, line in zip(REFUSED.values(), said, strict=True)), said
