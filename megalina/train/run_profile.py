"""The profile of a run: a bounded sample of the routing of its newest steps, once the balance loss is stable (Lina, section 5).

Nothing that a step computes depends on it.  All that decides when something is recorded is known to all ranks alike.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megalina.config import ProfileConfig
from megalina.mesh import Mesh, all_gather_object
from megalina.model.gpt import GPT
from megalina.model.routing_recorder import Decisions, RoutingRecorder, over_stages, trace_of
from megalina.parallel.step_result import StepResult
from megalina.placement.routing_trace import RoutingTrace


class RunProfile:
    """Watches steps.  With `profile.record=false` it does nothing at all."""

    def __init__(self, config: ProfileConfig, *, ranks: int):
        """`ranks`: in a pipeline those of one stage, which have all tokens."""
        self.config = config
        self.stable = False  # once it is, it stays so
        self.step_tokens = -(-config.tokens // (config.last_steps * ranks))  # of this rank
        self._balance_losses: deque[float] = deque(maxlen=2 * config.window)
        self._decisions: deque[tuple[int, Decisions | None]] = deque(
            maxlen=config.last_steps
        )  # None: this stage has no MoE layer
        self._recorder: RoutingRecorder | None = None
        self._watched = False

    def watching(self, gpt: GPT) -> AbstractContextManager[None]:
        """For the time of a training step; `add` comes after it."""
        if not (self.config.record and self.stable):
            return nullcontext()
        self._watched = True
        if gpt.served_moe_layers and not any(layer in gpt.layers for layer in gpt.served_moe_layers):
            return nullcontext()  # they are in other stages
        self._recorder = RoutingRecorder(self.step_tokens)
        return self._recorder.watching(gpt)

    def add(self, step: int, result: StepResult) -> None:
        """The step that was watched; one that was refused doesn't count, and a run that went back forgets what came later."""
        recorder, self._recorder = self._recorder, None
        watched, self._watched = self._watched, False
        if not self.config.record or not result.updates:
            return
        if self._decisions and self._decisions[-1][0] >= step:
            self._decisions.clear()
        if watched:
            self._decisions.append((step, recorder.decisions() if recorder is not None else None))
        self._balance_losses.append(result.balance_loss)
        self.stable = self.stable or is_stable(self._balance_losses, self.config.window, self.config.stable_change)

    def trace(self, mesh: Mesh, gpt: GPT, *, model_name: str) -> RoutingTrace | None:
        """Of all ranks, which call it together and get the same; None where nothing was recorded."""
        if not self._decisions:
            return None
        found = all_gather_object(mesh, [decisions for _, decisions in self._decisions])
        ranks = mesh.world.size // mesh.pp
        alike = [found[place::ranks] for place in range(ranks)]  # of the same tokens
        steps = [over_stages([of for of in step if of is not None]) for of_ranks in alike for step in zip(*of_ranks, strict=True)]
        first, last = self._decisions[0][0], self._decisions[-1][0]
        name = f"{model_name}, training steps {first} to {last}"
        return trace_of(steps, gpt, max_tokens=self.config.tokens, name=name)

    def missing(self, run_dir: str) -> str:
        """A warning where a profile was asked for and there is none to save; else nothing."""
        if not self.config.record or self._decisions:
            return ""
        return (
            f"no routing profile was saved: the balance loss was not stable before the last step (profile.window="
            f"{self.config.window}, profile.stable_change={self.config.stable_change:g}, {len(self._balance_losses)} of the "
            f"{2 * self.config.window} steps that it takes are known): record one with tools/record_routing.py {run_dir}"
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a run that goes on from it is as far.  What was recorded is not in it."""
        return {"stable": self.stable, "balance_losses": list(self._balance_losses)}

    def load(self, state: dict[str, Any]) -> None:
        self.stable = state["stable"]
        self._balance_losses = deque(state["balance_losses"], maxlen=2 * self.config.window)


def is_stable(balance_losses: Sequence[float], window: int, change: float) -> bool:
    """Whether the mean of the last `window` losses differs from the mean of as many before by at most `change` of that one."""
    if len(balance_losses) < 2 * window:
        return False
    losses = list(balance_losses)
    before, now = sum(losses[-2 * window : -window]) / window, sum(losses[-window:]) / window
    return abs(now - before) <= change * abs(before)
