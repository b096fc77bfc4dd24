"""A harness model: an engine as lm-evaluation-harness knows models.  Needs the extra `lm-eval`.

To the harness there is one process: every rank runs it alike, with the same requests, and the engine shares them out.  Importing
this module makes the harness know the model `megalina`, in this process.
"""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalina.blocks.counts import count_parameters
from megalina.checkpoint.files import newest_checkpoint
from megalina.config import InferConfig
from megalina.data.indexed import tokenizer_sha256
from megalina.data.tokenizer import Tokenizer, open_tokenizer
from megalina.evaluate.likelihood import check_tokenizer, log_likelihoods
from megalina.generate import Sampling
from megalina.mesh import all_gather_object, build_mesh
from megalina.serve.decoding import write_on
from megalina.serve.engine import Engine
from megalina.serve.load_engine import open_checkpoint
from megalina.tasks.continuation import Continuation, continuation_of

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'megalina[lm-eval]'") from error

MOST_TOKENS = 256  # written where a task doesn't say, and at most half of what the model reads
KNOWN_SETTINGS = ("until", "max_gen_toks", "temperature", "do_sample", "top_p")
BATCH_SIZE = 8  # where nobody says
MODEL_ARGUMENTS = ("checkpoint", "pretrained", "batch_size", "max_length", "seed")


@register_model("megalina")
class HarnessModel(LM):
    """`lm_eval.simple_evaluate(model=HarnessModel(...), ...)` on all ranks together; results are the same on each.

    `batch_size`: texts of a rank at a time; `tokenizer_name`: what cached requests go by; `info`: for the results' `config`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        max_positions: int,
        seed: int = 0,
        tokenizer_name: str = "",
        info: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        check_tokenizer(engine, tokenizer)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: choose 1 or more")
        self.engine, self.own_tokenizer, self.seed = engine, tokenizer, seed
        self.batch_size, self.max_positions = batch_size, max_positions
        self._tokenizer_name, self._info = tokenizer_name, dict(info or {})

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """Of `--model_args checkpoint=PATH` (or pretrained=PATH, after which the harness names its results), a run or a
        checkpoint; batch_size, max_length and seed may be given, too.  Under torchrun the ranks share it.

        Checkpoints are served on the CPU, whatever `--device` is: the harness says cuda:0 where nobody has said anything."""
        given = {**arg_dict, **{key: value for key, value in (additional_config or {}).items() if value is not None}}
        for name in ("device", "max_batch_size"):
            given.pop(name, None)
        if unknown := [key for key in given if key not in MODEL_ARGUMENTS]:
            raise ValueError(f"--model_args {unknown[0]}=...: only {', '.join(MODEL_ARGUMENTS)} are known")
        paths = [str(given[key]) for key in ("checkpoint", "pretrained") if key in given]
        if len(paths) != 1:
            raise ValueError("--model_args: give checkpoint=PATH of a run or a checkpoint, once")
        join_group()
        size = str(given.get("batch_size", "auto"))
        return open_harness_model(
            Path(paths[0]),
            batch_size=BATCH_SIZE if size.startswith("auto") else int(size),
            max_positions=int(given.get("max_length", 0)),
            seed=int(given.get("seed", 0)),
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> "HarnessModel":
        """As `create_from_arg_obj`, of "checkpoint=PATH,max_length=512"."""
        pairs = [word.partition("=") for word in arg_string.split(",") if word]
        return cls.create_from_arg_obj({key: value for key, _, value in pairs}, additional_config)

    @property
    def max_length(self) -> int:
        return self.max_positions

    @property
    def eot_token_id(self) -> int:
        return self.own_tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer_name

    def get_model_info(self) -> dict[str, Any]:
        """For the results' `config`."""
        return self._info

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Nats of each request's (context, continuation), and whether greedy decoding writes it; of an empty one 0 and True."""
        pairs = [request.args for request in requests]
        given = [continuation_of(self.own_tokenizer, context, text) for context, text in pairs]
        scores = iter(self._scores([c for c in given if c.tokens]))
        found = [next(scores) if c.tokens else (0.0, True) for c in given]
        for pair, score in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, score)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Nats of each request's whole (text,), in windows; the last one has a whole context."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            ids = self.own_tokenizer.encode(request.args[0])
            for read, tokens in get_rolling_token_windows(ids, self.own_tokenizer.eod, self.max_positions, 1):
                windows.append(Continuation(tuple(read[: len(read) - len(tokens) + 1]), tuple(tokens)))
                owner.append(i)
        sums = [0.0] * len(requests)
        for i, (nats, _) in zip(owner, self._scores(windows), strict=True):
            sums[i] += nats
        for request, nats in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What comes after each request's (context, settings), up to the first of the texts in `until`.

        Settings: until, max_gen_toks, temperature, do_sample, top_p.  ValueError for others, and for a context without room."""
        texts: dict[int, str] = {}
        groups: dict[tuple[int, float, float], list[int]] = {}
        for i, request in enumerate(requests):
            most = min(MOST_TOKENS, self.max_positions // 2)
            groups.setdefault(_sampling_of(request.args[1], most), []).append(i)
        size, rank = self.engine.mesh.world.size, self.engine.mesh.world.rank
        for sampling, members in groups.items():  # ranks write on together with equal settings
            members = sorted(members, key=lambda i: (-len(requests[i].args[0]), i))
            for first in range(0, len(members), size * self.batch_size):
                own = members[first : first + size * self.batch_size][rank::size]
                written = self._written([requests[i].args[0] for i in own], own, *sampling)
                for of_rank in all_gather_object(self.engine.mesh, dict(zip(own, written, strict=True))):
                    texts.update(of_rank)
        out = [_cut(texts[i], request.args[1].get("until")) for i, request in enumerate(requests)]
        for request, text in zip(requests, out, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def _scores(self, continuations: Sequence[Continuation]) -> list[tuple[float, bool]]:
        found = log_likelihoods(
            self.engine,
            continuations,
            batch_size=self.batch_size,
            max_positions=self.max_positions,
            num_ids=self.own_tokenizer.vocab_size,
        )
        return [(likelihood.log_likelihood, likelihood.greedy) for likelihood in found]

    def _written(
        self, contexts: Sequence[str], numbers: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[str]:
        if max_tokens >= self.max_positions:
            raise ValueError(
                f"max_gen_toks is {max_tokens}, but the model reads at most {self.max_positions} tokens (max_positions), the "
                "context among them: lower it"
            )
        tokenizer, room = self.own_tokenizer, self.max_positions - max_tokens
        prompts = [(tokenizer.encode(context) or [tokenizer.eod])[-room:] for context in contexts]
        sampling = Sampling(
            max_tokens=max_tokens,
            max_positions=self.max_positions,
            temperature=temperature,
            top_p=top_p,
            stop_token=tokenizer.eod,
            num_ids=tokenizer.vocab_size,
        )
        written = write_on(self.engine, prompts, sampling, seeds=[self.seed + number for number in numbers])
        return [tokenizer.decode([token for token in tokens if token != tokenizer.eod]) for tokens in written]


def open_harness_model(
    path: Path, *, batch_size: int = BATCH_SIZE, max_positions: int = 0, seed: int = 0, infer: InferConfig | None = None
) -> HarnessModel:
    """Of a checkpoint, or a run's newest one, over the ranks that there are.  `max_positions`: read at most, 0: all that it can.

    ValueError where there is none, it has no tokenizer, or the model can't read so much."""
    checkpoint = newest_checkpoint(path / "checkpoints") if (path / "checkpoints").is_dir() else path
    if checkpoint is None:
        raise ValueError(f"{path} has no checkpoint yet")
    mesh = build_mesh(ep=dist.get_world_size() if dist.is_initialized() else 1)
    config = infer or InferConfig()
    opened = open_checkpoint(checkpoint, mesh, infer=config)
    loaded = opened.loaded
    if not loaded.tokenizer_path:
        raise ValueError(f"{checkpoint} was trained on token ids without a tokenizer, and the harness asks in text")
    if max_positions > loaded.max_positions:
        raise ValueError(f"max_length is {max_positions}, and the model reads at most {loaded.max_positions} tokens: lower it")
    gpt = loaded.gpt
    counts = count_parameters(gpt.config, gpt.router, vocab_size=gpt.vocab_size, seq_len=loaded.max_positions)
    return HarnessModel(
        opened.engine(config, opened.policy(config, None)),
        open_tokenizer(loaded.tokenizer_path),
        batch_size=batch_size,
        max_positions=max_positions or loaded.max_positions,
        seed=seed,
        tokenizer_name=tokenizer_sha256(loaded.tokenizer_path)[:16],
        info={
            "model_num_parameters": counts.total,
            "model_dtype": "float32",
            "model_revision": checkpoint.name,
            "training_step": loaded.step,
            "ranks": mesh.world.size,
        },
    )


def join_group() -> None:
    """The process group of torchrun's variables, unless there is one or this is the only process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=world, timeout=timedelta(seconds=600))


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _sampling_of(settings: Mapping[str, Any], most: int) -> tuple[int, float, float]:
    """Tokens to write (`most` where nothing is said), temperature, top_p."""
    if unknown := [name for name in settings if name not in KNOWN_SETTINGS]:
        raise ValueError(f"generation with {unknown[0]}={settings[unknown[0]]!r}: only {', '.join(KNOWN_SETTINGS)} are known")
    temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
    if settings.get("do_sample") is False:
        temperature = 0.0
    top_p = float(settings.get("top_p", 1.0)) if temperature else 1.0  # of the likeliest token it says nothing
    return int(settings.get("max_gen_toks", most)), temperature, top_p


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    ends = [until] if isinstance(until, str) else until or []
    places = [text.find(end) for end in ends if end and end in text]
    return text[: min(places)] if places else text
