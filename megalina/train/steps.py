"""The steps of a run: everything that one training step needs and changes, and the step itself."""

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalina.batch import Batch
from megalina.comm.objects import everybodys
from megalina.comm.urgency import other_threads_are_urgent
from megalina.config import PretrainConfig
from megalina.data.source import TokenData
from megalina.mesh import Mesh, build_meshes
from megalina.parallel.functions import Verdict
from megalina.parallel.plans import questions
from megalina.parallel.trainable import Trainable
from megalina.plan_settings import AUTO
from megalina.step.plan import Plan
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.doctor import Doctor
from megalina.train.ledger import Ledger, Line, RandomState, line_of
from megalina.train.load_watch import LoadWatch
from megalina.train.packing import allowed_packings, worth_trying
from megalina.train.run_profile import RunProfile
from megalina.train.run_state import RunState
from megalina.train.sample_windows import after
from megalina.train.schedule import learning_rate
from megalina.train.spike_guard import SpikeGuard
from megalina.train.stop import StopWish
from megalina.train.trials import Rules, Trials
from megalina.train.tuning import Tuner
from megalina.train.windows import Windows

RULES_OF_ALL = Rules(window=3, finalists=2)  # among all strategies


class Steps:
    """Data, program, optimizer, guard and state.  It logs nothing and saves nothing."""

    batch: Batch  # this rank's part of the last step

    def __init__(
        self, config: PretrainConfig, data: TokenData, *, device: torch.device, meshes: Mapping[int, Mesh] | None = None
    ):
        """`meshes`: those of other steps of the same layout, at least of this configuration's packings; they take turns."""
        self.config, self.data, self.device = config, data, device
        world = dist.get_world_size() if dist.is_initialized() else 1
        packings = allowed_packings(config, world)
        made = meshes or build_meshes(
            tp=config.parallel.tp, ep=config.parallel.ep, packings=packings, timeout_s=config.cluster.timeout_s
        )
        self.meshes = {packing: made[packing] for packing in packings}
        self.mesh = self.meshes[packings[0]]
        self.is_first = self.mesh.world.rank == 0
        self._wish = StopWish(max_minutes=config.train.max_minutes if self.is_first else 0.0)  # one clock decides
        self._guard = SpikeGuard(config.guard)
        self.doctor = Doctor(
            self.mesh.log,
            world=self.mesh.world.size,
            rank=self.mesh.world.rank,
            timeout_s=config.hang.timeout_s,
            folder=Path(config.run.dir) / "logs",
        )
        self.trainable = self._trainable_on(self.mesh)
        if self.trainable.device is not None:
            other_threads_are_urgent()
        self.optimizer = BucketOptimizer(config.optim, self.trainable.buckets)
        self.watch = LoadWatch(len(self.trainable.gpt.moe_layers), config.model.num_experts)
        self.profile = RunProfile(config.profile, ranks=world)
        self.state = RunState(
            *(config, self.mesh, self.trainable, self.optimizer, self.watch, self._guard, Ledger(), self.profile),
            tokenizer_path=data.tokenizer_path,
        )
        self._ranks_per_node = everybodys(self.mesh, int(os.environ.get("LOCAL_WORLD_SIZE", world)))[0]
        self.tuner = self._tuner(searches=0)
        self.windows = Windows(self.mesh, self.adopt) if config.strategy.windows == AUTO else None
        own = config.train.global_batch_size // self.mesh.dp.size  # this rank's sequences of a step
        self.first_sample, self.own_samples = self.mesh.dp.rank * own, own

    @property
    def searching(self) -> bool:
        """Whether steps are being measured to choose by."""
        return self.tuner.trials.searching

    @property
    def adapts(self) -> bool:
        """Whether measurements decide what plan this run follows."""
        return bool(self.tuner.trials.questions) or self.windows is not None

    def adapt(self, step_s: float) -> None:
        """Between two steps, of which the last took this rank so long: where `strategy` says auto, another plan may be adopted.
        All ranks call it alike; nobody else repacks meanwhile."""
        self.tuner.after(self.state.step, step_s)
        self.state.searches = self.tuner.trials.searches
        if self.windows is not None and not self.searching:
            self.windows.after(self.state.step, self.trainable.recorder.events, self.trainable.plan)

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
        position = self.mesh.log.position
        position.enter(f"repack {self.mesh.packing} to {packing}", False)
        self.trainable.settle()
        mesh = self.meshes[packing]
        trainable = self._trainable_on(mesh)
        optimizer = BucketOptimizer(self.config.optim, trainable.buckets)
        sent_bytes = self.state.move_to(mesh, trainable, optimizer)
        trainable.take_over(self.trainable)
        self.mesh, self.trainable, self.optimizer = mesh, trainable, optimizer
        self.follow_mesh()
        gc.collect()  # what has moved is in cycles, and large
        position.leave()
        return sent_bytes

    def follow_mesh(self) -> None:
        """There is another mesh and another trainable: for those that hold them."""

    def keep_plan(self, saved: Mapping[str, Any]) -> None:
        """Where `strategy` says auto: go on as a checkpoint with these values did, if layout and strategy are the same.  What was
        found out need not be found out again."""
        there = saved.get("plan")
        if not there or not self.adapts:
            return
        plan, now = Plan.from_json(there["now"]), self.state.arithmetic()
        if plan.packing in self.meshes and all(saved["arithmetic"][key] == now[key] for key in ("mesh", "parallel", "strategy")):
            self.adopt(plan)
            self.tuner = self._tuner(searches=min(there["searches"], 1))

    def _tuner(self, *, searches: int) -> Tuner:
        config, world, packings = self.config, self.mesh.world.size, tuple(self.meshes)
        worth = worth_trying(config, world, packings, ranks_per_node=self._ranks_per_node)
        left_out = ", ".join(str(k) for k in packings if k not in worth)
        trials = Trials(
            questions(config, world, packings=worth),
            present=self.trainable.plan,
            rules=RULES_OF_ALL if config.strategy.name == AUTO else Rules(),
            searches=searches,
            cost_of=lambda plan: plan.packing,
        )
        note = f"; not tried, as it would put too many bytes on the wire: packing {left_out}" if left_out else ""
        return Tuner(trials, self.mesh, self.adopt, note=note)

    def _trainable_on(self, mesh: Mesh) -> Trainable:
        config = self.config
        return Trainable(
            config,
            mesh,
            vocab_size=config.model.vocab_size or self.data.vocab_size,  # the model may have more than the tokenizer
            device=self.device,
            wish_to_stop=self._wish,
            is_spike=self._guard.is_spike,
            explain=self.doctor.explain,
        )

    def compute(self, step: int) -> tuple[Verdict, Line]:
        """One step, with its entry in the ledger; nothing is logged or saved."""
        train, state = self.config.train, self.state
        self.mesh.log.position.step = step
        self.optimizer.lr = learning_rate(
            self.config.schedule,
            peak=self.config.optim.lr,
            step=step,
            total_steps=train.steps,
            tokens_per_step=train.global_batch_size * train.seq_len,
        )
        first = after(state.consumed_samples, train.global_batch_size, state.windows)
        self.batch = self.data.train.batch(first + self.first_sample, self.own_samples).to(self.device)
        random = RandomState()
        recorder, recorded = self.trainable.recorder, self.trainable.recorder.on
        recorder.on = recorded or (self.windows is not None and self.windows.measuring and not self.searching)
        with self.profile.watching(self.trainable.gpt):
            verdict = self.trainable.step(self.batch, self.optimizer.update)
        self.profile.add(step, verdict)
        recorder.on = recorded
        state.step, state.tokens = step, state.tokens + verdict.loss_tokens
        state.consumed_samples = first + train.global_batch_size
        if verdict.updates:
            state.guard.accept(verdict.loss)
            if self.config.guard.spike == "skip":
                state.spikes = 0
            for layer, load in zip(self.trainable.gpt.moe_layers, verdict.loads, strict=True):
                router = self.trainable.gpt.layers[layer].router
                if router.bias_E is not None:
                    router.update_bias(load[:-1].to(self.device))
        else:
            state.skipped_steps += 1
        digest = random.digest(seed=train.seed, first_sample=first)
        count, plan = train.global_batch_size, self.trainable.plan
        line = line_of(verdict, step=step, first_sample=first, count=count, random=digest, plan=plan)
        if train.ledger:
            state.ledger.add(line)
        return verdict, line
