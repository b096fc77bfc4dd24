"""Own samples: which sequences of a global batch a rank takes.

Normally neighbours.  Where routers keep tokens on the node where their sequence is at home (`router.locality_nodes`), and there
are as many nodes, a rank takes sequences that are at home on its node.  Which ranks compute a sequence changes no number but by
the order of sums.
"""

from dataclasses import dataclass

from megalina.config import PretrainConfig


@dataclass(frozen=True, slots=True)
class OwnSamples:
    """`count` sequences of a step, each `stride` after the one before."""

    count: int
    stride: int  # nodes; 1: homes don't matter
    node: int
    place: int  # among the data-parallel ranks that share out a node's sequences, or all of them

    def first(self, first: int) -> int:
        """The first own one of the global batch that begins with sequence `first`."""
        return first + (self.node - first) % self.stride + self.place * self.count * self.stride


def own_samples(config: PretrainConfig, *, world: int, rank: int, ranks_per_node: int) -> OwnSamples:
    """Of a rank of the world."""
    alike, nodes = config.parallel.tp * config.parallel.cp, config.router.locality_nodes  # ranks that take the same sequences
    stage = world // config.parallel.pp  # ranks of one: those at one place in all of them have the same sequences
    readers, place = stage // alike, rank % stage // alike
    count = config.train.global_batch_size // readers
    if not at_home(config, world=world, ranks_per_node=ranks_per_node):
        return OwnSamples(count, 1, 0, place)
    return OwnSamples(count, nodes, rank // ranks_per_node, place % (readers // nodes))


def at_home(config: PretrainConfig, *, world: int, ranks_per_node: int) -> bool:
    """Whether sequences can be computed where they are at home: as many nodes, whole groups of ranks that take the same ones, and
    equally many sequences on each."""
    nodes = config.router.locality_nodes
    parallel = config.parallel
    whole = (
        nodes > 1 and nodes * ranks_per_node == world and parallel.pp == 1 and ranks_per_node % (parallel.tp * parallel.cp) == 0
    )
    return whole and config.train.global_batch_size % nodes == 0
