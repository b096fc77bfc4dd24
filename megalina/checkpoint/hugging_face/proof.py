"""The proof of an import: logits, loss, the gradient of every weight and every router choice against transformers on the same
folder, then back to a folder whose tensors are the same bytes."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.checkpoint.hugging_face.exporting import export_checkpoint
from megalina.checkpoint.hugging_face.importing import import_folder, left_out, same_bytes
from megalina.checkpoint.hugging_face.linked import Linked, settings_of
from megalina.checkpoint.hugging_face.peer import Answers, ask_transformers, check_installed
from megalina.checkpoint.hugging_face.source import Source
from megalina.checkpoint.hugging_face.streams import first_apart, our_streams
from megalina.checkpoint.hugging_face.views import theirs_from
from megalina.checkpoint.loaded_model import load_model
from megalina.checkpoint.stored import Stored
from megalina.families.table import family_named
from megalina.model.gpt import GPT
from megalina.model.init import spec_of
from megalina.model.routing_recorder import RoutingRecorder

LOGIT_BAR, GRADIENT_BAR = 2e-6, 1e-5  # float32; see docs/hugging-face.md
SEQUENCES, LENGTH = 2, 64  # tokens that are asked


@dataclass(frozen=True, slots=True)
class Proof:
    family: str
    max_logit_difference: float
    max_logit: float  # above 1, differences are held to so many times the bar: float32 has no finer steps there
    loss_difference: float
    max_gradient_difference: float  # of a tensor: of its largest number, or of a hundredth of the largest of all
    worst_gradient: str  # which tensor's that is
    router_choices: int
    router_choices_equal: bool
    tensors: int
    bytes_equal: bool
    differing_keys: list[str]  # of bytes
    experts: int
    differing_experts: list[str]  # whose SHA-256 is another one when they go out
    first_apart: str  # the block behind which the two models differ first by more than rounding; "": none

    @property
    def logit_bar(self) -> float:
        return LOGIT_BAR * max(1.0, self.max_logit)

    @property
    def holds(self) -> bool:
        return all(good for *_, good in self._rows())

    def table(self) -> str:
        lines = [f"{'':<40}{'found':>12}{'bar':>14}"]
        for name, found, bar, good in self._rows():
            lines.append(f"{name:<40}{found:>12}{bar:>14}  {'ok' if good else 'FAILS'}")
        if not self.max_gradient_difference <= GRADIENT_BAR:
            lines.append(f"the gradient of {self.worst_gradient} differs most")
        if self.differing_keys:
            lines.append("other bytes: " + ", ".join(self.differing_keys[:3]))
        if self.differing_experts:
            lines.append("other experts: " + ", ".join(self.differing_experts[:3]))
        if self.first_apart:
            lines.append(f"the two models part in {self.first_apart}")
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str, bool]]:
        """What, found, its bar, whether it holds."""
        logits, loss, gradients = self.max_logit_difference, self.loss_difference, self.max_gradient_difference
        bar = self.logit_bar
        return [
            ("logits, largest difference", f"{logits:.1e}", f"{bar:.1e}", logits <= bar),
            ("loss, difference", f"{loss:.1e}", f"{bar:.1e}", loss <= bar),
            ("gradients, largest relative difference", f"{gradients:.1e}", f"{GRADIENT_BAR:.1e}", gradients <= GRADIENT_BAR),
            ("router choices", f"{self.router_choices:,}", "equal", self.router_choices_equal),
            ("tensors back in Hugging Face's format", f"{self.tensors:,}", "equal bytes", self.bytes_equal),
            ("experts' SHA-256, in and out", f"{self.experts:,}", "equal", not self.differing_experts),
        ]


def prove(folder: Path, *, scratch: Path | None = None, seed: int = 0) -> Proof:
    """Needs transformers, room for both forms in `scratch` (None: the system's folder for such things) and memory for two models
    in float32 with gradients.  ValueError as `import_folder`, and where transformers isn't there."""
    check_installed()
    with tempfile.TemporaryDirectory(dir=scratch, prefix="megalina-prove-") as made:
        place = Path(made)
        came_in = import_folder(folder, place / "checkpoint").experts
        went_out = export_checkpoint(place / "checkpoint", place / "back").experts
        loaded = load_model(place / "checkpoint")
        vocab, length = loaded.gpt.vocab_size, min(LENGTH, loaded.max_positions)
        token_BS = torch.randint(vocab, (SEQUENCES, length), generator=torch.Generator().manual_seed(seed))
        came = Stored(place / "checkpoint").values
        linked = Linked(family_named(came["hugging_face"]["family"]), settings_of(came["config"], vocab))
        differing, tensors = _differing(folder, place / "back", linked)
        ours = ask_gpt(loaded.gpt, token_BS, linked)
        streams = our_streams(loaded.gpt, Batch.whole(token_BS))
        del loaded
        theirs = ask_transformers(folder, token_BS, place / "gradients")
        gradient, worst = gradient_difference(ours.gradients, theirs.gradients)
        return Proof(
            family=linked.family.name,
            max_logit_difference=float((ours.logits_BSV - theirs.logits_BSV).abs().max()),
            max_logit=float(theirs.logits_BSV.abs().max()),
            loss_difference=abs(ours.loss - theirs.loss),
            max_gradient_difference=gradient,
            worst_gradient=worst,
            router_choices=sum(choice.numel() for choice in ours.choice_LTK),
            router_choices_equal=len(ours.choice_LTK) == len(theirs.choice_LTK)
            and all(torch.equal(a, b) for a, b in zip(ours.choice_LTK, theirs.choice_LTK, strict=True)),
            tensors=tensors,
            bytes_equal=not differing,
            differing_keys=differing,
            experts=len(came_in),
            differing_experts=[name for name in came_in | went_out if came_in.get(name) != went_out.get(name)],
            first_apart=first_apart(streams, theirs.streams),
        )


def ask_gpt(gpt: GPT, token_BS: Tensor, linked: Linked) -> Answers:
    """What our model gives, in its own type, gradients by Hugging Face key."""
    batch = Batch.whole(token_BS)
    choices: list[Tensor] = []
    if gpt.moe_layers:
        recorder = RoutingRecorder(token_BS.numel())
        with recorder.watching(gpt), torch.no_grad():
            logits_TV = gpt.logits(gpt.hidden(batch)[0])
        ids_TLK = torch.from_numpy(recorder.decisions().expert_ids_TLK).long()
        choices = [ids_TK.sort(dim=1).values for ids_TK in ids_TLK.unbind(1)]
    else:
        with torch.no_grad():
            logits_TV = gpt.logits(gpt.hidden(batch)[0])
    loss = gpt(batch).loss / batch.loss_mask_BS.sum()
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in gpt.named_parameters()}
    whole = {name: grad.reshape(spec_of(gpt.get_parameter(name)).shape) for name, grad in found.items()}
    gradients = {
        key: theirs_from(links, gpt.embedding.dtype, lambda name: whole[name])
        for key, links in linked.theirs.items()
        if all(link.ours.name in whole for link in links)  # a selection bias has none
    }
    logits_BSV = logits_TV[:, : gpt.vocab_size].view(*token_BS.shape, -1)
    return Answers(logits_BSV, float(loss.detach()), gradients, choices)


def gradient_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest number of its tensor, and its key; but at least to a hundredth of the
    largest of all: float32 leaves as much rounding in what nearly cancels, on both sides alike.  A tensor that one of the two
    lacks is infinitely far away."""
    largest = max((float(grad.abs().max()) for grad in theirs.values()), default=0.0)
    worst, where = 0.0, ""
    for key, grad in ours.items():
        if key not in theirs:
            return math.inf, key
        scale = max(float(theirs[key].abs().max()), 1e-2 * largest, 1e-30)
        difference = float((grad - theirs[key]).abs().max()) / scale
        if math.isnan(difference):
            return math.inf, key
        if difference > worst:
            worst, where = difference, key
    return worst, where


def _differing(folder: Path, back: Path, linked: Linked) -> tuple[list[str], int]:
    """Keys whose bytes, types or shapes differ in two Hugging Face folders, and how many keys the first has."""
    source, other = Source(folder), Source(back)
    left = {*left_out(source, linked)}
    keys = [key for key in source.listing if key not in left]
    missing = [key for key in (*keys, *other.listing) if (key in source.listing) != (key in other.listing)]
    there = [key for key in keys if key in other.listing]
    return missing + [key for key in there if not same_bytes(source.tensor(key), other.tensor(key))], len(keys)
