"""A mixture of experts whose tokens travel once to each node that has experts of theirs (`parallel.dispatch=once_per_node`).

A row goes to the rank at the sender's place on that node, with the token's weights for all experts of the node.  That rank sends
it on to those of the node's ranks that have experts of it, as `once_per_rank` does, and sums what they give before it goes back.
So links between nodes carry a token once; DeepEP's dispatch does the same (DeepSeek-V3, arXiv:2412.19437, section 3.2.2)."""

from collections.abc import Mapping

from megalina.blocks.once_moe import OnceMoE
from megalina.blocks.sizes import INT_BYTES, At


class NodeMoE(OnceMoE):
    functions = "megalina.model.node_moe:NodeMoE"

    # sizes
    def places_of_a_token(self, at: At) -> float:
        return self._visited(at, self.whole.dispatch.nodes)

    def _weights_sent(self, at: At) -> int:
        return self.model.num_experts // self.whole.dispatch.nodes

    # memory
    def value_bytes(self, at: At) -> Mapping[str, int]:
        """The order, too, in which a node's ranks got what was sent on: places and experts of rows."""
        sent_on = 2 * INT_BYTES * self.unpacked(at)
        return {**super().value_bytes(at), "#sizes": sent_on}
