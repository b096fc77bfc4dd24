"""A model that is ready to train on this rank: its shard, its buckets, and the executors of its programs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.blocks.dispatch import ONCE_PER_NODE, ONCE_PER_RANK, Dispatch, dispatch_of
from megalina.blocks.model import step_shape
from megalina.blocks.pipelined import pipelined
from megalina.collective_log import CollectiveLog, agree
from megalina.config import PretrainConfig
from megalina.layout import axis_of_group
from megalina.mesh import Mesh, all_gather_object
from megalina.model.gpt import GPT
from megalina.parallel.buckets import Bucket, lay_out
from megalina.parallel.emulated_device import EmulatedDevice, emulated_device
from megalina.parallel.executor import Executor, Functions, Watch
from megalina.parallel.functions import InstructionFunctions
from megalina.parallel.shard import build_shard, parameter_groups
from megalina.parallel.step_result import CollectivesDiffer, Directions, StepResult, Update
from megalina.parallel.token_bytes import TokenBytes
from megalina.perfmodel.cost.instruction_bytes import InstructionBytes, bucket_specs
from megalina.placement.expert_order import Order, read_orders
from megalina.plan_settings import plan_of
from megalina.step.forward import plain
from megalina.step.pipeline.job import Pipelined, evaluations, training_steps
from megalina.step.plan import Plan
from megalina.step.program import BucketSpec, Op, Program
from megalina.step.strategy import Setting, evaluation, scoring, settling, training_step
from megalina.timeline.recorder import Recorder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
RESULT = "#verdict.-.0"


class Trainable:
    """`step` and `evaluate` run programs; everything else is state that others read.

    `log`: where its collectives are noted; None: one of its own.  `ranks_per_node`: None: all are on one.  `expert_orders`: MoE
    layer -> the expert in each place; None: as parallel.placement says."""

    def __init__(
        self,
        config: PretrainConfig,
        mesh: Mesh,
        *,
        vocab_size: int,
        device: torch.device,
        log: CollectiveLog | None = None,
        wish_to_stop: Callable[[], bool],
        is_spike: Callable[[float], bool] = lambda loss: False,
        explain: Callable[[], str] = lambda: "the ranks did not submit the same collectives in this step",
        ranks_per_node: int | None = None,
        expert_orders: Mapping[int, Order] | None = None,
    ):
        train, parallel = config.train, config.parallel
        dtype = DTYPES[train.dtype]
        self.mesh, self.micro_batch_size = mesh, train.micro_batch_size
        self.log = log or CollectiveLog(mesh.world.rank, alike=mesh.pp == 1)
        self.pipelined = pipelined(config, mesh.world.size, vocab_size=vocab_size) if mesh.pp > 1 else None
        self.gpt: GPT = build_shard(
            config.model,
            config.router,
            mesh,
            vocab_size=vocab_size,
            max_positions=config.model.max_positions or train.seq_len,
            seed=train.seed,
            dtype=dtype,
            device=device,
            sequence=parallel.sequence,
            digests=train.ledger,
            expert_orders=_orders(parallel.placement, mesh) if expert_orders is None else expert_orders,
            held=self.pipelined.held(mesh.pp_rank) if self.pipelined is not None else None,
            dispatch=_dispatch_on(mesh, config),
        )
        shape = step_shape(config)
        main_bytes = 8 if dtype == torch.float64 else 4
        self.plan = plan_of(config.strategy, packing=mesh.packing)
        piece = self.plan.piece_bytes // main_bytes or None
        shared = self.pipelined is not None and len(self.pipelined.words_ranks) > 1
        self.buckets = {
            name: Bucket(
                name,
                members,
                mesh.axis(axis_of_group(name, pipeline=mesh.pp > 1, shared_embedding=shared)),
                sharded=parallel.zero == 1,
                piece=piece,
                optim=config.optim,
                tp=mesh.tp,
            )
            for name, members in parameter_groups(self.gpt, shape).items()
        }
        used = dict.fromkeys(group for instruction in plain(shape) for group in instruction.uses)
        if self.pipelined is None:
            lay_out([self.buckets[group] for group in reversed(used)])  # as backward is done with them
        specs = {name: bucket.spec for name, bucket in self.buckets.items()}
        if self.pipelined is not None:
            specs = _of_all_stages(config, mesh, self.pipelined, vocab_size, self.plan) | specs
        self.micro_batches = train.global_batch_size // (train.micro_batch_size * mesh.readers)
        held = InstructionBytes(config, mesh.world.size, vocab_size=vocab_size, packing=mesh.packing)
        setting = Setting(
            shape,
            specs,
            micro_batches=self.micro_batches,
            recompute_mode=train.recompute,
            element_bytes=main_bytes,
            kept_bytes=held.kept_back,
        )
        self.setting = setting.under(self.plan)
        self.program = self._step_of(self.plan)
        if self.pipelined is not None:  # stages take turns: in the order in which they go on the wire
            sent = dict.fromkeys(b for s in self.program if s.op is Op.GRADS for b in s.buckets)
            lay_out([self.buckets[group] for group in sent])
        self.device = emulated_device(config, specs)
        token_bytes = TokenBytes(ranks_per_node or mesh.world.size)
        self._stream_shape = (0, config.model.d_model)  # until a step or an evaluation says
        self._unsettled = False  # weights that the last step updated have yet to be gathered
        self.instruction_functions = InstructionFunctions(
            self.gpt,
            mesh,
            self.buckets,
            clip_norm=config.optim.clip_norm,
            log=self.log,
            wish_to_stop=wish_to_stop,
            is_spike=is_spike,
            explain=explain,
            ledger=train.ledger,
            token_bytes=token_bytes,
        )
        self.functions: Functions = self.instruction_functions
        self._training = self._executor(self.program, self.device)
        if self.pipelined is None:
            self.evaluation_program = evaluation(shape, specs)
        else:
            self.evaluation_program = evaluations(self.setting, self.pipelined)[mesh.pp_rank]
        self._evaluation = self._executor(self.evaluation_program, None)
        self._scoring: Executor | None = None  # few runs ask for it

    def _step_of(self, plan: Plan) -> Program:
        """This rank's list: all ranks' the same one, but in a pipeline."""
        if self.pipelined is None:
            return training_step(plan.strategy, self.setting)
        return training_steps(self.setting, self.pipelined)[self.mesh.pp_rank]

    def run_with(self, program: Program, functions: Functions) -> None:
        """From now on a training step is this program with these functions: an observer of values, another schedule.

        The caller answers for the program: it must be one that `check` accepts, and the same on every rank."""
        self.settle()
        self.close()
        self.program, self.functions = program, functions
        self._training = self._executor(program, self.device)

    def adopt(self, plan: Plan) -> None:
        """From now on a training step follows this plan, the same on every rank.  Its packing is the mesh's."""
        self.plan, self.setting = plan, self.setting.under(plan)
        self.run_with(self._step_of(plan), self.functions)

    def take_over(self, before: "Trainable") -> None:
        """Go on in the place of another one, which ends: with its plan and its emulated device.  The functions of an observer
        (`run_with`) don't come along."""
        if self.device is not None and before.device is not None:
            before.device.seconds = self.device.seconds  # of this one's matrices
        self.device = before.device
        self.adopt(replace(before.plan, packing=self.mesh.packing))
        before.close()
        before._evaluation.close()
        if before._scoring is not None:
            before._scoring.close()

    def close(self) -> None:
        """End the threads of the step's lanes; `run_with` begins anew."""
        self._training.close()

    def _executor(self, program: Program, device: EmulatedDevice | None) -> Executor:
        training = any(s.phase == "B" for s in program)  # evaluations' tokens are not a step's
        token_bytes = self.instruction_functions.token_bytes if training else None
        return Executor(
            program,
            self.functions,
            self.mesh,
            self.buckets,
            log=self.log,
            device=device,
            token_bytes=token_bytes,
            stream=self.new_stream,
        )

    def new_stream(self) -> Tensor:
        """Memory for what this rank gets of another stage of a pipeline, for a micro-batch of the step or the batch that runs."""
        return next(self.gpt.parameters()).new_empty(self._stream_shape)

    def expect_streams_of(self, own: Batch) -> None:
        """From now on `new_stream` is of such a batch, cut over cp."""
        share = self.gpt.share
        self._stream_shape = (own.tokens_BS.numel() // (share.ranks if share.cut else 1), self.gpt.config.d_model)

    def step(
        self,
        batch: Batch,
        update: Update,
        *,
        directions: Directions | None = None,
        record: Recorder | None = None,
        loss_factors: Mapping[str, float] | None = None,
    ) -> StepResult:
        """One training step on this rank's sequences, which are whole here; `update(bucket, result)` is called for each bucket.

        `directions`: where the program has instructions for whole matrices, the optimizer; `record` gets the step's events;
        `loss_factors`: of losses' weights in this step, by name, alike on all ranks."""
        self.gpt.train()
        self.instruction_functions.update, self.instruction_functions.loss_factors = update, loss_factors or {}
        self.instruction_functions.directions = directions
        parts = self.own_part(batch).split(self.micro_batch_size // self.setting.cut)
        assert len(parts) == self.setting.num_parts
        self.expect_streams_of(parts[0])
        given = {f"#batch.-.{i}": part for i, part in enumerate(parts)}
        result: StepResult = self._training.run(given, keep=(RESULT,), record=record)[RESULT]
        self._unsettled = bool(settling(self.program))
        return result

    def watch(self, watch: Watch | None) -> None:
        """Enter `watch(instruction)` around each instruction of the steps to come, on the host; None: no longer."""
        self._training.watch = watch

    def settle(self) -> None:
        """Gather the weights that the last step left to the next one.  All ranks together, before anybody else reads them."""
        if self._unsettled:
            gathers = self._executor(settling(self.program), None)
            gathers.run({})
            gathers.close()
            self._unsettled = False

    def evaluate(self, batch: Batch) -> Tensor:
        """float64 [2]: sum of losses in nats and number of tokens they are of, over the world."""
        self.settle()
        self.gpt.eval()
        return self._forward(self._evaluation, batch)

    def score(self, batch: Batch) -> Tensor:
        """float64 [readers x B]: the sum of losses in nats of each sequence: B of each rank that reads sequences of its own, in
        turn."""
        self.settle()
        self.gpt.eval()
        if self._scoring is None:
            self._scoring = self._executor(self._scores_of(), None)
        return self._forward(self._scoring, batch)

    def _scores_of(self) -> Program:
        if self.pipelined is None:
            return scoring(self.setting.shape, {name: bucket.spec for name, bucket in self.buckets.items()})
        return evaluations(self.setting, self.pipelined, by_sequence=True)[self.mesh.pp_rank]

    def _forward(self, executor: Executor, batch: Batch) -> Tensor:
        own = self.own_part(batch)
        self.expect_streams_of(own)
        out: Tensor = executor.run({"#batch.-.0": own})["#loss.-.0"]
        return out

    def own_part(self, batch: Batch) -> Batch:
        """Of each sequence what this rank of cp has."""
        return batch.part_of(self.mesh.cp.size, self.mesh.cp.rank)

    def compare_collectives(self) -> None:
        """All ranks together, between two steps.  CollectivesDiffer, on all of them, where they have mixed up what came after
        the last comparison: ZeRO-1's gathers of weights, and evaluations."""
        everywhere = zip(*all_gather_object(self.mesh, self.log.riders()), strict=True)
        if not agree([sum(column) for column in everywhere], self.mesh.world.size):
            raise CollectivesDiffer(self.instruction_functions.explain())


def _of_all_stages(config: PretrainConfig, mesh: Mesh, job: Pipelined, vocab_size: int, plan: Plan) -> dict[str, BucketSpec]:
    """What each pipeline rank has to know of the others' buckets, to check their lists with its own."""
    return bucket_specs(
        config,
        mesh.world.size,
        vocab_size=vocab_size,
        packing=plan.packing,
        piece_bytes=plan.piece_bytes,
        embedding_ranks=len(job.words_ranks),
    )


def _orders(path: str, mesh: Mesh) -> Mapping[int, Order]:
    """Of the file of `parallel.placement`, which is the same for all ranks.  ValueError on all of them where it isn't."""
    if not path:
        return {}
    layers = read_orders(Path(path)).layers
    everywhere = all_gather_object(mesh, layers)
    if different := [rank for rank, other in enumerate(everywhere) if other != everywhere[0]]:
        raise ValueError(f"parallel.placement={path} is another file on rank {different[0]} than on rank 0: copy one of them")
    return layers


def _dispatch_on(mesh: Mesh, config: PretrainConfig) -> Dispatch:
    """By the nodes that there are, in place of those of the configuration's cluster."""
    wanted = dispatch_of(config, mesh.packing)
    if mesh.ep.nodes is not None:
        return Dispatch(ONCE_PER_NODE, len(mesh.ep.nodes.grid))
    return Dispatch(ONCE_PER_RANK) if wanted.kind == ONCE_PER_NODE else wanted
