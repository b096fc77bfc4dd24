"""What the simulator says of those who compete: a step in virtual time, of devices and links alone."""

from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.forecast import forecast
from megalina.step.plan import Plan


def forecast_s(config: PretrainConfig, plan: Plan, world: int) -> float:
    """A step on the cluster that `config` says, in slow motion where that is."""
    return forecast(config, world, vocab_size=config.model.vocab_size, plan=plan).step_s
