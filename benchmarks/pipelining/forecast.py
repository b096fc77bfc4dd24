"""What the simulator says of those who compete: a step in virtual time, of devices and links alone, or of their hosts, too."""

from benchmarks.validation.emulated import HostConstants, simulate_emulated
from megalina.compare.ladder import Setting
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import forecast
from megalina.step.plan import Plan


def forecast_s(config: PretrainConfig, plan: Plan, world: int) -> float:
    """A step on the cluster that `config` says, in slow motion where that is."""
    return forecast(config, world, vocab_size=config.model.vocab_size, plan=plan).step_s


def with_hosts_s(config: PretrainConfig, plan: Plan, setting: Setting, *, link_mbit: float, host: HostConstants) -> float:
    """The same with hosts and sockets that take what was fitted on other steps of this machine
    (`benchmarks/validate_simulator.py`).  `link_mbit`: in slow motion, too."""
    timeline = simulate_emulated(
        config,
        plan,
        nodes=setting.nodes,
        ranks_per_node=setting.ranks_per_node,
        link_mbit=link_mbit,
        vocab_size=config.model.vocab_size,
        host=host,
    )
    return timeline.step_s
