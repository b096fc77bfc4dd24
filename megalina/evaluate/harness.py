"""A harness model: an engine as lm-evaluation-harness knows models.  Needs the extra `eval`.

To the harness there is one process: every rank runs it alike, with the same requests, and the engine shares them out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megalina.data.tokenizer import Tokenizer
from megalina.evaluate.likelihood import check_tokenizer, log_likelihoods
from megalina.generate import Sampling
from megalina.mesh import all_gather_object
from megalina.serve.decoding import write_on
from megalina.serve.engine import Engine
from megalina.tasks.continuation import Continuation, continuation_of

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'lm-eval>=0.4.8', the extra eval") from error

MOST_TOKENS = 256  # written where a task doesn't say
KNOWN_SETTINGS = ("until", "max_gen_toks", "temperature", "do_sample", "top_p")


class HarnessModel(LM):
    """`lm_eval.simple_evaluate(model=HarnessModel(...), ...)` on all ranks together; results are the same on each.

    `batch_size`: texts of a rank at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, batch_size: int, max_positions: int, seed: int = 0):
        super().__init__()
        check_tokenizer(engine, tokenizer)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: choose 1 or more")
        self.engine, self.own_tokenizer, self.seed = engine, tokenizer, seed
        self.batch_size, self.max_positions = batch_size, max_positions

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Nats of each request's (context, continuation), and whether greedy decoding writes it."""
        pairs = [request.args for request in requests]
        found = self._scores([continuation_of(self.own_tokenizer, context, text) for context, text in pairs])
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
            groups.setdefault(_sampling_of(request.args[1]), []).append(i)
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


def _sampling_of(settings: Mapping[str, Any]) -> tuple[int, float, float]:
    """Tokens to write, temperature, top_p."""
    if unknown := [name for name in settings if name not in KNOWN_SETTINGS]:
        raise ValueError(f"generation with {unknown[0]}={settings[unknown[0]]!r}: only {', '.join(KNOWN_SETTINGS)} are known")
    temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
    if settings.get("do_sample") is False:
        temperature = 0.0
    top_p = float(settings.get("top_p", 1.0)) if temperature else 1.0  # of the likeliest token it says nothing
    return int(settings.get("max_gen_toks", MOST_TOKENS)), temperature, top_p


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    ends = [until] if isinstance(until, str) else until or []
    places = [text.find(end) for end in ends if end and end in text]
    return text[: min(places)] if places else text
