"""Routed experts: routing as vLLM returns it with --enable-return-routed-experts, and back.

    arrays        routed_experts [B, S, L, K] integers, tokens [B, S], and lengths [B] or attention_mask [B, S] where sequences
                  are padded, behind or in front; one sequence may come without B
    JSON lines    a completion each: {"prompt_token_ids": [...], "token_ids": [...], "routed_experts": ...}, or an answer of
                  vLLM's server with "choices" of that kind.  routed_experts is a list [n, L, K], or an .npy file in base64, of
                  all tokens; where there is "prompt_routed_experts", as in vLLM 0.21, it is of the generated tokens alone.
                  "logprobs" is a list, or has "token_logprobs": of the generated tokens

A server never reads the last token that it has sampled, so n may be one less than the tokens: then that token is left out.  L is
either the model's MoE layers or all of its layers, those without experts holding anything.  Rows of -1 stand for routes that are
missing.  Ids are logical: where a server has moved or copied experts, vLLM records before it maps them to places.

Sources: vLLM's `CompletionOutput.routed_experts`, docs/training/routed_experts_replay.md (0.21), docs/training/routed_experts and
the tests of --enable-return-routed-experts (2026).

Shapes: B sequences of up to S tokens, n of one, L layers, K experts a token, T tokens in all.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.routing_trace import RoutingTrace, traced
from megalina.placement.traced_text import TracedText

Array = NDArray[Any]
NOBODY = -1  # a route that is missing


@dataclass(frozen=True, slots=True)
class Routed:
    """The model whose routing it is."""

    num_experts: int
    layers: tuple[int, ...]  # those with experts
    num_layers: int  # all


@dataclass(frozen=True, slots=True, eq=False)
class SentSequence:
    """One sequence, as somebody has sent it."""

    where: str
    tokens: Array  # [n]
    routed: Array  # [n or n - 1, L, K]
    logprobs: Array | None = None  # float32 [n], of the token behind each; NaN: not known


def from_arrays(
    routed_BSLK: Array,
    tokens_BS: Array,
    model: Routed,
    *,
    holes: bool = False,
    lengths_B: Array | None = None,
    mask_BS: Array | None = None,
    name: str = "",
) -> RoutingTrace:
    """`holes`: tokens without a route may be anywhere; the trace then says which they are, and has placeholders.

    ValueError, naming sequence and token, for what doesn't fit."""
    if routed_BSLK.ndim == 3:
        routed_BSLK = routed_BSLK[None]
    if tokens_BS.ndim == 1:
        tokens_BS = tokens_BS[None]
    if routed_BSLK.ndim != 4 or not np.issubdtype(routed_BSLK.dtype, np.integer):
        raise ValueError(f"routed_experts must be integers [B, S, L, K], not {_kind(routed_BSLK)}")
    if tokens_BS.ndim != 2 or not np.issubdtype(tokens_BS.dtype, np.integer) or len(tokens_BS) != len(routed_BSLK):
        raise ValueError(
            f"tokens must be integers [{len(routed_BSLK)}, S] beside routed_experts {list(routed_BSLK.shape)}, not "
            f"{_kind(tokens_BS)}"
        )
    sequences, length = tokens_BS.shape
    if routed_BSLK.shape[1] not in (length, length - 1):
        raise ValueError(
            f"routed_experts are of {routed_BSLK.shape[1]} tokens a sequence, and tokens has {length}: they must be as many, or "
            "one less"
        )
    if lengths_B is not None and mask_BS is not None:
        raise ValueError("lengths and attention_mask: give one of them")
    valid_BS = np.ones(tokens_BS.shape, bool)
    if lengths_B is not None:
        if lengths_B.shape != (sequences,) or int(lengths_B.min()) < 1 or int(lengths_B.max()) > length:
            raise ValueError(f"lengths must be {sequences} numbers from 1 to {length}, not {lengths_B.tolist()[:8]}")
        valid_BS = np.arange(length) < lengths_B[:, None]
    if mask_BS is not None:
        if mask_BS.shape != tokens_BS.shape or not mask_BS.any(axis=1).all():
            raise ValueError(
                f"attention_mask must be {list(tokens_BS.shape)} and leave each sequence a token, not {list(mask_BS.shape)}"
            )
        valid_BS = mask_BS.astype(bool)
    missing_BLK = np.full((sequences, length - routed_BSLK.shape[1], *routed_BSLK.shape[2:]), NOBODY)
    whole_BSLK = np.concatenate([routed_BSLK, missing_BLK], axis=1)
    found = [SentSequence(f"sequence {b}", tokens_BS[b][valid_BS[b]], whole_BSLK[b][valid_BS[b]]) for b in range(sequences)]
    return _traced(found, model, name, holes)


def from_json_lines(path: Path, model: Routed, *, holes: bool = False) -> RoutingTrace:
    """`holes`: as of `from_arrays`.  ValueError, naming file and line, for what isn't that."""
    return _traced(list(_completions(path)), model, path.stem, holes)


def to_arrays(trace: RoutingTrace) -> dict[str, Array]:
    """routed_experts int16 or int32 [B, S, L, K], -1 behind the end of a sequence; tokens int64 [B, S], 0 there; lengths [B].

    ValueError where the trace has no tokens."""
    if trace.text is None:
        raise ValueError(f"trace {trace.name} has no tokens: record it with tools/record_routing.py")
    lengths_B = trace.sample_lengths_S.astype(np.int64)
    valid_BS = np.arange(int(lengths_B.max())) < lengths_B[:, None]
    dtype = np.int16 if trace.num_experts <= 1 << 15 else np.int32
    routed_BSLK = np.full((*valid_BS.shape, trace.num_layers, trace.top_k), NOBODY, dtype)
    known_T = trace.text.known_T
    ids_TLK = trace.expert_ids_TLK.astype(dtype)
    routed_BSLK[valid_BS] = ids_TLK if known_T is None else np.where(known_T[:, None, None], ids_TLK, NOBODY)
    tokens_BS = np.zeros(valid_BS.shape, np.int64)
    tokens_BS[valid_BS] = trace.text.tokens_T
    return {"routed_experts": routed_BSLK, "tokens": tokens_BS, "lengths": lengths_B}


def of_layers(routed_nLK: Array, model: Routed, where: str) -> Array:
    """Those of the layers with experts.  ValueError where L is neither their number nor that of all layers."""
    columns = routed_nLK.shape[1]
    if columns == len(model.layers):
        return routed_nLK
    if columns == model.num_layers:
        return routed_nLK[:, list(model.layers)]
    raise ValueError(
        f"{where} is of {columns} layers, and the model has {len(model.layers)} with experts and {model.num_layers} in all"
    )


def _traced(sequences: Sequence[SentSequence], model: Routed, name: str, holes: bool) -> RoutingTrace:
    ids, tokens, logprobs, known = list[Array](), list[Array](), list[Array](), list[Array]()
    for of in sequences:
        routed_nLK = of_layers(of.routed, model, of.where)
        there_n = (routed_nLK != NOBODY).any(axis=(1, 2))
        rows = int(there_n.nonzero()[0].max(initial=-1)) + 1
        if rows == 0:
            raise ValueError(f"{of.where} has no route: leave it out")
        if not holes and not there_n[:rows].all():
            raise ValueError(
                f"{of.where} lacks the routes of token {int(np.argmin(there_n[:rows]))}, but has later ones, as of a prompt "
                "that was cached: leave it out"
            )
        if not holes and rows < len(of.tokens) - 1:
            raise ValueError(
                f"{of.where} has routes of {rows} of {len(of.tokens)} tokens; only the last may lack them: leave it out, or give "
                "lengths or attention_mask where sequences are padded"
            )
        if holes:
            rows = len(routed_nLK)
            routed_nLK = np.where(there_n[:, None, None], routed_nLK, np.arange(routed_nLK.shape[2]))
        _check(routed_nLK[:rows], model, of.where)
        if ids and routed_nLK.shape[2] != ids[0].shape[2]:
            raise ValueError(f"{of.where} has {routed_nLK.shape[2]} experts a token, those before {ids[0].shape[2]}")
        ids.append(routed_nLK[:rows])
        tokens.append(of.tokens[:rows])
        known.append(there_n[:rows])
        logprobs.append(np.full(rows, np.nan, np.float32) if of.logprobs is None else of.logprobs[:rows])
    if not ids:
        raise ValueError(f"{name} holds no sequence")
    told = any(of.logprobs is not None for of in sequences)
    token_T, known_T = np.concatenate(tokens), np.concatenate(known)
    return traced(
        np.concatenate(ids).astype(np.min_scalar_type(model.num_experts - 1)),
        model.num_experts,
        sample_lengths_S=np.array([len(of) for of in tokens]),
        layers=model.layers,
        name=name,
        text=TracedText(
            token_T.astype(np.int64),
            logprobs_T=np.concatenate(logprobs) if told else None,
            known_T=None if known_T.all() else known_T,
        ),
    )


def _check(routed_nLK: Array, model: Routed, where: str) -> None:
    """ValueError for ids that aren't experts, or one expert twice."""
    bad_nLK = (routed_nLK < 0) | (routed_nLK >= model.num_experts)
    if bad_nLK.any():
        token, layer, k = (int(i) for i in np.argwhere(bad_nLK)[0])
        raise ValueError(
            f"{where}: token {token} goes to expert {int(routed_nLK[token, layer, k])} in layer {model.layers[layer]}, and there "
            f"are experts 0 to {model.num_experts - 1}: places of a server's copies must be mapped to experts before"
        )
    ordered = np.sort(routed_nLK, axis=2)
    if (twice_nL := (ordered[..., 1:] == ordered[..., :-1]).any(axis=2)).any():
        token, layer = (int(i) for i in np.argwhere(twice_nL)[0])
        raise ValueError(
            f"{where}: token {token} goes to an expert twice in layer {model.layers[layer]}: {routed_nLK[token, layer].tolist()}"
        )


def _completions(path: Path) -> Iterator[SentSequence]:
    with path.open(encoding="utf-8", errors="replace") as file:  # what is no text is no JSON either
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is no JSON, or cut off: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} is no object")
            choices = record.get("choices", [record])
            if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
                raise ValueError(f"{where}: choices must be a list of objects")
            for choice in choices:
                yield _completion(where, record | choice)


def _completion(where: str, record: dict[str, Any]) -> SentSequence:
    prompt, made = (_numbers(where, key, record.get(key), 1) for key in ("prompt_token_ids", "token_ids"))
    routed_nLK = _numbers(where, "routed_experts", record.get("routed_experts"), 3)
    if record.get("prompt_routed_experts") is not None:
        of_prompt = _numbers(where, "prompt_routed_experts", record["prompt_routed_experts"], 3)
        if len(of_prompt) != len(prompt) or of_prompt.shape[1:] != routed_nLK.shape[1:]:
            raise ValueError(
                f"{where}: prompt_routed_experts is {list(of_prompt.shape)} beside {len(prompt)} tokens of the prompt and "
                f"routed_experts {list(routed_nLK.shape)}"
            )
        routed_nLK = np.concatenate([of_prompt, routed_nLK])
    tokens = np.concatenate([prompt, made])
    if len(routed_nLK) not in (len(tokens), len(tokens) - 1):
        raise ValueError(
            f"{where}: routed_experts has {len(routed_nLK)} rows for {len(prompt)} tokens of the prompt and {len(made)} after: "
            "there must be as many, or one less"
        )
    logprobs = record.get("logprobs")
    if isinstance(logprobs, dict):
        logprobs = logprobs.get("token_logprobs")
    if logprobs is None:
        return SentSequence(where, tokens, routed_nLK)
    if not isinstance(logprobs, list) or len(logprobs) != len(made) or not all(isinstance(p, int | float) for p in logprobs):
        raise ValueError(f"{where}: logprobs must be a number for each of {len(made)} generated tokens")
    behind = np.full(len(tokens), np.nan, np.float32)
    if len(prompt):
        behind[len(prompt) - 1 : len(tokens) - 1] = logprobs
    else:
        behind[: len(tokens) - 1] = logprobs[1:]
    return SentSequence(where, tokens, routed_nLK, behind)


def _numbers(where: str, key: str, value: Any, ndim: int) -> Array:
    """Integers: a list, or an .npy file in base64."""
    try:
        if isinstance(value, str):
            found = np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
        else:
            found = np.array(value if value is not None else [])
    except (ValueError, EOFError, OSError, binascii.Error) as error:
        raise ValueError(f"{where}: {key} is no list of equal rows, and no .npy file in base64: {error}") from error
    if found.size == 0 and ndim == 1:
        return np.zeros(0, np.int64)
    if found.ndim != ndim or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{where}: {key} must be integers of {ndim} dimensions, not {found.dtype} {list(found.shape)}")
    return found


def _kind(array: Array) -> str:
    """For errors."""
    return f"{array.dtype} {list(array.shape)}"
