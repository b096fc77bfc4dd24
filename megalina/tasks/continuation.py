"""A continuation: tokens whose likelihood after a context is asked for."""

from dataclasses import dataclass

from megalina.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Continuation:
    context: tuple[int, ...]  # token ids, at least one
    tokens: tuple[int, ...]  # what comes after, at least one

    def read(self, max_positions: int) -> tuple[int, ...]:
        """What a model reads: all but the last token, which is only a label, cut in front where there is no room."""
        return (self.context + self.tokens)[:-1][-max_positions:]

    def cut_tokens(self, max_positions: int) -> int:
        """Tokens in front of the context for which there is no room."""
        return max(0, len(self.context) + len(self.tokens) - 1 - max_positions)


def continuation_of(tokenizer: Tokenizer, context: str, text: str) -> Continuation:
    """`text` after `context`, both as the tokenizer cuts them together; after an empty context, at the start of a document.

    As lm-evaluation-harness does it: spaces at the end of the context go to the text, and a token on the border is the text's.
    """
    begin = context.rstrip()
    text, context = context[len(begin) :] + text, begin
    context_ids = tokenizer.encode(context)
    if not context_ids:
        return Continuation((tokenizer.eod,), tuple(tokenizer.encode(text)))
    tokens = tokenizer.encode(context + text)[len(context_ids) :] or tokenizer.encode(text)  # empty where the border vanished
    return Continuation(tuple(context_ids), tuple(tokens))
