"""Place experts on nodes by a profile of routing: each on the node whose tokens choose it most, as far as there is room.

python tools/place_experts.py RUN/checkpoints/step_00000200/routing.npz --nodes 2 --ranks-per-node 2 --out experts.json
python pretrain_gpt_moe.py ... parallel.ep=4 router.locality_nodes=2 parallel.placement=experts.json

The profile is what a run with profile.record=true saves beside its checkpoints.  --nodes is how many nodes the ranks that share
out the experts (parallel.ep x parallel.tp of them) are on; a sequence is at home on node (number mod nodes).  It prints the share
of choices that stay at home before and after, of each layer; where that share hardly changes there is nothing to be gained.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megalina.arguments import Parser, whole
from megalina.placement.expert_order import ExpertOrders, counts_of, local_share, order_of, write_orders
from megalina.placement.routing_trace import read_trace


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Place experts on nodes by a profile of routing.")
    parser.add_argument("profile", type=Path, help="routing.npz")
    parser.add_argument("--nodes", type=whole(2), required=True, help="that the ranks with the experts are on")
    parser.add_argument("--ranks-per-node", type=whole(1), default=1, help="of those ranks; each holds equally many experts")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, for parallel.placement")
    own = parser.parse_args(argv)
    try:
        trace = read_trace(own.profile)
        count_LNE = counts_of(trace, own.nodes)
        layers = {}
        before, after = [], []
        for layer, count_NE in zip(trace.layers, count_LNE, strict=True):
            layers[layer] = order_of(count_NE, own.ranks_per_node)
            before.append(local_share(count_NE, tuple(range(trace.num_experts))))
            after.append(local_share(count_NE, layers[layer]))
            print(f"layer {layer}: {before[-1]:.1%} of choices at home, {after[-1]:.1%} placed")
        write_orders(own.out, ExpertOrders(trace.num_experts, own.nodes, layers))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"out": str(own.out), "at_home_before": before, "at_home_placed": after}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
