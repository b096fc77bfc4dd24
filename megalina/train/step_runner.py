"""The step runner: everything that one training step needs and changes, and the step itself."""

import gc
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megalina.batch import Batch
from megalina.collective_log import CollectiveLog
from megalina.comm.urgency import other_threads_are_urgent
from megalina.config import PretrainConfig
from megalina.data.prefetch import Prefetch
from megalina.data.replayed import replayed
from megalina.data.source import TokenData
from megalina.mesh import Mesh, all_gather_object
from megalina.parallel.meshes import meshes_of
from megalina.parallel.plan_file import questions
from megalina.parallel.step_result import StepResult
from megalina.parallel.trainable import Trainable
from megalina.placement.expert_order import Order
from megalina.plan_settings import AUTO, SEARCH
from megalina.step.plan import Plan
from megalina.timeline.recorder import Recorder
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.built import Built
from megalina.train.doctor import Doctor
from megalina.train.garbage import Garbage
from megalina.train.guard import SpikeGuard
from megalina.train.kept_memory import keep_memory
from megalina.train.known_sequences import check_known
from megalina.train.ledger import Line, RandomState, line_of
from megalina.train.list_search import ListSearch
from megalina.train.own_samples import own_samples
from megalina.train.packing import allowed_packings, worth_trying
from megalina.train.rebalancing import Moved
from megalina.train.run_state import RunState
from megalina.train.sample_windows import after
from megalina.train.schedule import learning_rate, mtp_factor
from megalina.train.times import Times
from megalina.train.trials import Rules, Trials, Tuner, evidence
from megalina.train.windows import Windows

RULES_OF_ALL = Rules(window=3, finalists=2)  # among all strategies


class StopWish:
    """True once SIGTERM or SIGINT came, or after `max_minutes` (0: never).

    The first signal lets the step finish and the run be saved; a second one ends the process at once.
    """

    def __init__(self, *, max_minutes: float):
        self._signalled = False
        self._deadline_s = time.monotonic() + max_minutes * 60 if max_minutes > 0 else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def __call__(self) -> bool:
        return self._signalled or (self._deadline_s is not None and time.monotonic() > self._deadline_s)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = True


class StepRunner:
    """Data, program, optimizer, guard and state.  It logs nothing and saves nothing."""

    batch: Batch  # this rank's part of the last step
    moved: Moved | None = None  # what experts did before the last step, if they may change ranks then

    def __init__(
        self,
        config: PretrainConfig,
        data: TokenData,
        *,
        device: torch.device,
        meshes: Mapping[int, Mesh] | None = None,
        log: CollectiveLog | None = None,
    ):
        """`meshes`, `log`: those of other runners of the same layout, at least of this configuration's packings; they take
        turns."""
        self.config, self.data, self.device = config, replayed(data, config), device
        world = dist.get_world_size() if dist.is_initialized() else 1
        packings = allowed_packings(config, world)
        vocab_size = config.model.vocab_size or data.vocab_size
        made = meshes or meshes_of(config, world, packings=packings, vocab_size=vocab_size)
        self.meshes = {packing: made[packing] for packing in packings}
        mesh = self.meshes[packings[0]]
        self.log = log or CollectiveLog(mesh.world.rank, alike=mesh.pp == 1)
        self.is_first = mesh.world.rank == 0
        self._garbage = Garbage(interval=config.train.gc_interval)
        self._to_keep_memory = config.train.keep_memory and device.type == "cpu"
        self._wish = StopWish(max_minutes=config.train.max_minutes if self.is_first else 0.0)  # one clock decides
        self._guard = SpikeGuard(config.guard)
        self.doctor = Doctor(
            self.log,
            world=mesh.world.size,
            rank=mesh.world.rank,
            timeout_s=config.hang.timeout_s,
            folder=Path(config.run.dir) / "logs",
        )
        self._ranks_per_node = all_gather_object(mesh, int(os.environ.get("LOCAL_WORLD_SIZE", world)))[0]
        trainable = self._trainable_on(mesh)
        if trainable.device is not None:
            other_threads_are_urgent()
        self.built = Built(mesh, trainable, BucketOptimizer(config.optim, trainable.buckets))
        self.state = RunState(config, self.built, self._guard, tokenizer_path=data.tokenizer_path)
        self.tuner = self._tuner(searches=0)
        self.measurements = self._measurements(done=False)
        self._recorder: Recorder | None = None  # of the last step
        self.own_samples = own_samples(config, world=world, rank=mesh.world.rank, ranks_per_node=self._ranks_per_node)
        self._batches = Prefetch(lambda first, count: self.data.train.batch(first, count, self.own_samples.stride), device)

    @property
    def mesh(self) -> Mesh:
        return self.built.mesh

    @property
    def trainable(self) -> Trainable:
        return self.built.trainable

    @property
    def searching(self) -> bool:
        """Whether steps are being measured to choose by."""
        return self.tuner.trials.searching

    @property
    def adapts(self) -> bool:
        """Whether measurements decide what plan this run follows."""
        return bool(self.tuner.trials.questions or self.measurements)

    @property
    def undecided(self) -> bool:
        """Whether it searches, or has yet to measure what its plan goes by."""
        return self.searching or not all(m.decided(self.trainable.plan) for m in self.measurements)

    def adapt(self, step_s: float) -> None:
        """Between two steps, of which the last took this rank so long: where `strategy` says auto, another plan may be adopted.
        All ranks call it alike; nobody else repacks meanwhile."""
        searched = self.searching
        self.tuner.after(self.state.step, step_s)
        if self.searching and not searched:  # again: the list was found for another plan
            for search in self._list_searches:
                search.begin()
        recorder = self._recorder
        for measurement in self.measurements if not self.searching else ():
            measurement.after(self.state.step, recorder.events if recorder is not None else list, self.trainable.plan)
            if not measurement.decided(self.trainable.plan):
                break  # a list is searched with all else decided
        self.state.searches = self._ended_searches

    @property
    def evidence(self) -> str:
        """What the last searches have found, in one line."""
        found = [evidence(self.tuner.trials, self.state.step)] if self.tuner.trials.tried else []
        return "; ".join([*found, *(search.evidence for search in self._list_searches if search.evidence)])

    @property
    def _list_searches(self) -> list[ListSearch]:
        return [m for m in self.measurements if isinstance(m, ListSearch)]

    @property
    def _ended_searches(self) -> int:
        """0 while a list is searched: a run that is resumed then begins anew."""
        if not all(search.done for search in self._list_searches):
            return 0
        return self.tuner.trials.searches + sum(search.searches for search in self._list_searches)

    def adopt(self, plan: Plan) -> None:
        """From the next step on follow this plan.  All ranks call it between the same two steps."""
        self.repack(plan.packing)
        if plan != self.trainable.plan:
            self.trainable.adopt(plan)

    def repack(self, packing: int) -> int:
        """Hold `packing` times as many experts on each rank as parallel.ep says; returns the bytes that this rank has sent.

        All ranks call it between the same two steps.  Weights and optimizer move with all their bits; old and new ones are
        both in memory meanwhile.  ValueError for a packing that no groups were made for."""
        if packing not in self.meshes:
            made = ", ".join(map(str, self.meshes))
            raise ValueError(f"there are groups for packing {made}, not for {packing}: set strategy.packing=auto or {packing}")
        if packing == self.mesh.packing:
            return 0
        position, before = self.log.position, self.trainable
        position.enter(f"repack {self.mesh.packing} to {packing}", False)
        before.settle()
        mesh = self.meshes[packing]
        trainable = self._trainable_on(mesh, expert_orders=before.gpt.expert_orders)
        sent_bytes = self.state.move_to(mesh, trainable, BucketOptimizer(self.config.optim, trainable.buckets))
        trainable.take_over(before)
        del before
        gc.collect()  # what has moved is in cycles, and large
        position.leave()
        return sent_bytes

    def keep_plan(self, saved: Mapping[str, Any]) -> None:
        """Where `strategy` says auto: go on as a checkpoint with these values did, if layout and strategy are the same.  What was
        found out need not be found out again."""
        there = saved.get("plan")
        if not there or not self.adapts:
            return
        plan, now = Plan.from_json(there["now"]), self.state.arithmetic()
        searched = there["searches"] > 0
        if not searched and not self.config.strategy.order:  # a list that was still being measured
            plan = replace(plan, order=())
        if plan.packing in self.meshes and all(saved["arithmetic"][key] == now[key] for key in ("mesh", "parallel", "strategy")):
            self.adopt(plan)
            self.tuner = self._tuner(searches=int(searched))
            self.measurements = self._measurements(done=searched)
            self.state.searches = self._ended_searches

    def _measurements(self, *, done: bool) -> list[Windows | Times | ListSearch]:
        """`done`: a list was found before."""
        strategy, found = self.config.strategy, list[Windows | Times | ListSearch]()
        if strategy.windows == AUTO:
            found.append(Windows(self.mesh, self.adopt))
        placed = strategy.deferred_weights != "none" and not strategy.order and strategy.name != SEARCH
        if (strategy.name == AUTO or placed) and not self.config.train.deterministic:
            found.append(Times(self.mesh, self.adopt, lambda: self.trainable.program))
        by_list = strategy.name == SEARCH and not strategy.order
        several = self.mesh.world.size > 1 and self.mesh.pp == 1  # ranks of one list
        by_list |= strategy.name == AUTO and strategy.search_evaluations > 0 and several
        if by_list:
            vocab_size = self.config.model.vocab_size or self.data.vocab_size
            search = ListSearch(
                self.config,
                self.mesh,
                self.adopt,
                lambda: self.trainable,
                vocab_size=vocab_size,
                ranks_per_node=self._ranks_per_node,
                others=lambda: self.tuner.of_other_packings,
                done=done,
            )
            found.append(search)
        return found

    def _tuner(self, *, searches: int) -> Tuner:
        config, world, packings = self.config, self.mesh.world.size, tuple(self.meshes)
        worth = worth_trying(config, world, packings, ranks_per_node=self._ranks_per_node)
        left_out = ", ".join(str(k) for k in packings if k not in worth)
        trials = Trials(
            questions(config, world, packings=worth),
            present=replace(self.trainable.plan, order=()),  # of alternatives each would need an order of its own
            rules=RULES_OF_ALL if config.strategy.name == AUTO else Rules(),
            searches=searches,
            cost_of=lambda plan: plan.packing,
        )
        note = f"; not tried, as it would put too many bytes on the wire: packing {left_out}" if left_out else ""
        return Tuner(trials, self.mesh, self.adopt, note=note)

    def _trainable_on(self, mesh: Mesh, *, expert_orders: Mapping[int, Order] | None = None) -> Trainable:
        config = self.config
        return Trainable(
            config,
            mesh,
            vocab_size=config.model.vocab_size or self.data.vocab_size,  # the model may have more than the tokenizer
            device=self.device,
            log=self.log,
            wish_to_stop=self._wish,
            is_spike=self._guard.is_spike,
            explain=self.doctor.explain,
            ranks_per_node=self._ranks_per_node,
            expert_orders=expert_orders,
        )

    def compute(self, step: int, *, record: Recorder | None = None) -> tuple[StepResult, Line]:
        """One step, with its entry in the ledger; nothing is logged or saved.  `record` gets the step's events."""
        train, state, trainable, optimizer = self.config.train, self.state, self.built.trainable, self.built.optimizer
        self.log.position.step = step
        self._garbage.after(step - 1)
        if self._to_keep_memory:  # only now: what building and loading have freed is given back
            self._to_keep_memory = False
            keep_memory()
        rebalances = state.rebalancing.due(step) and not self.undecided  # steps that are measured should be alike
        self.moved = state.rebalancing.rebalance() if rebalances else None
        optimizer.lr = learning_rate(
            self.config.schedule,
            peak=self.config.optim.lr,
            step=step,
            total_steps=train.steps,
            tokens_per_step=train.global_batch_size * train.seq_len,
        )
        first = after(state.consumed_samples, train.global_batch_size, state.windows)
        self.batch = self._batch(first, is_last=step >= train.steps).to(self.device)
        random = RandomState()
        wanted = not self.searching and any(m.measuring(trainable.plan) for m in self.measurements)
        if record is None and wanted:
            record = Recorder()
        self._recorder = record
        with state.profile.watching(trainable.gpt):
            factors = {"mtp_loss": mtp_factor(self.config.schedule, step=step, total_steps=train.steps)}
            result = trainable.step(self.batch, optimizer.update, directions=optimizer, record=record, loss_factors=factors)
        state.profile.add(step, result)
        state.rebalancing.count(result.loads)
        state.step, state.tokens = step, state.tokens + result.loss_tokens
        state.consumed_samples = first + train.global_batch_size
        if result.updates:
            state.guard.accept(result.loss)
            if self.config.guard.spike == "skip":
                state.spikes = 0
        else:
            state.skipped_steps += 1
        digest = random.digest(seed=train.seed, first_sample=first)
        count, plan = train.global_batch_size, trainable.plan
        line = line_of(result, step=step, first_sample=first, count=count, random=digest, plan=plan)
        if train.ledger:
            state.ledger.add(line)
        return result, line

    def check_known(self, *, last_step: int) -> None:
        """ValueError, on all ranks alike, where a step up to the last one has a sequence whose routing is to be replayed and
        isn't known."""
        if self.config.router.replay:
            check_known(
                self.data.train,
                first=self.state.consumed_samples,
                count=self.config.train.global_batch_size,
                steps=last_step - self.state.step,
                windows=self.state.windows,
            )

    def close(self) -> None:
        """End all threads; nothing more is computed."""
        self._garbage.close()
        self._batches.close()
        self.built.trainable.close()

    def _batch(self, first: int, *, is_last: bool) -> Batch:
        """This rank's part of the global batch from sequence `first` on.  The next one is made meanwhile, as far as is known."""
        count, own = self.config.train.global_batch_size, self.own_samples
        following = None if is_last else own.first(after(first + count, count, self.state.windows))
        return self._batches.take(own.first(first), own.count, following=following)
