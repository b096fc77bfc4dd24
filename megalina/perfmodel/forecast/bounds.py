"""The bounds of a forecast: what it can walk in a minute, said before anything is built."""

from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import WALKED

MOST_RANKS = 16_384 * 8  # links and flows of all of them are worked out once, before alike ones become one
MOST_LAYERS = 3_000  # over all micro-batches that are walked: some ten instructions each, and as many backward


def check_work(config: PretrainConfig, world: int) -> None:
    """ValueError, one line, for more ranks or a longer list of instructions than a forecast walks."""
    if world > MOST_RANKS:
        raise ValueError(
            f"cluster.nodes ({config.cluster.nodes}) x cluster.ranks_per_node ({config.cluster.ranks_per_node}) = {world} ranks: "
            f"a forecast takes at most {MOST_RANKS}: lower cluster.nodes"
        )
    dp = max(1, world // config.parallel.tp)
    micro_batches = max(1, config.train.global_batch_size // (config.train.micro_batch_size * dp))
    walked = min(WALKED, micro_batches) * config.strategy.parts
    if config.model.num_layers * walked > MOST_LAYERS:
        raise ValueError(
            f"model.num_layers ({config.model.num_layers}) x {walked} micro-batches or parts that are walked is a list of more "
            f"instructions than a forecast takes: at most {MOST_LAYERS // walked} layers; lower model.num_layers"
        )
