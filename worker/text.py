"""Token ids to text, one at a time: never half a character, never a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_CONTEXT = 5
"""Ids of the prompt that the first piece is decoded after: whether it begins with a space."""
_UNFINISHED = "\ufffd"
"""What decoders put for bytes that are not (yet) a character."""
_LONGEST_CHARACTER = 8
"""Ids after which an unfinished character is given out as it is: no UTF-8 sequence is longer."""


class Vocabulary:
    """A tokenizer, and which of its ids never have a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.tokenizer = tokenizer
        self.special = frozenset(i for i, token in added.items() if token.special)


class Detokenizer:
    """The text of a growing sequence of ids.

    Decoding an id alone loses spaces and splits characters, so each piece is the difference of two
    decodings that start a few ids back. Source: prefix and read offsets as in vLLM and TGI.

    Args:
        vocabulary: of the model.
        prompt: ids before the first one.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._special = vocabulary.special
        self._ids = [i for i in prompt[-_CONTEXT:] if i not in self._special]
        self._prefix = 0
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this id completes, "" while a character is unfinished."""
        if token_id in self._special:
            # Decoders that strip the first space would take what follows for the beginning.
            return ""
        self._ids.append(token_id)
        text = self._piece()
        if text.endswith(_UNFINISHED) and len(self._ids) - self._read < _LONGEST_CHARACTER:
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        """What is left when no id will follow."""
        text = self._piece()
        self._advance()
        return text

    def _piece(self) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _advance(self) -> None:
        self._prefix, self._read = self._read, len(self._ids)
        if self._prefix > 256:
            # Only the ids from the prefix on are ever decoded again.
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0


class StopStrings:
    """Watches for stop strings, which may begin in one piece of text and end in a later one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown now: none of a stop string, nor what may become one."""
        if not self._stops:
            return text
        text = self._held + text
        cut = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.found = True
            self._held = ""
            return text[:cut]
        keep = self._suffix_that_may_grow(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once it is certain that no stop string follows."""
        held, self._held = self._held, ""
        return held

    def _suffix_that_may_grow(self, text: str) -> int:
        for size in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


class TextStream:
    """Detokenizing and stop strings together: ids in, text to show out."""

    def __init__(
        self, vocabulary: Vocabulary, stops: Sequence[str], prompt: Sequence[int] = ()
    ) -> None:
        self._detokenizer = Detokenizer(vocabulary, prompt)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing after it is shown."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """Text that can be shown after this id."""
        return self._stops.push(self._detokenizer.push(token_id))

    def finish(self, token_id: int | None = None, *, shown: bool = True) -> str:
        """Text to show after the last id, which ends the text but is not in it unless `shown`."""
        text = ""
        if token_id is not None and shown:
            text = self.push(token_id)
        if not self.stopped:
            text += self._stops.push(self._detokenizer.flush())
        if not self.stopped:
            text += self._stops.flush()
        return text
