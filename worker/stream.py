"""One request while this worker owns it: what it generated, and how much of it Redis has."""

from __future__ import annotations

import time

from shared import messages
from shared.store import Emission, Taken
from worker.engine.interface import EngineRequest, SamplingParams, StepOutput
from worker.text import TextStream, Vocabulary


def name_of(rid: str, epoch: int) -> str:
    """What one ownership of a request is called."""
    return f"{rid}:{epoch}"


class Stream:
    """Tokens of one request from the epoch on in which this worker took it.

    Args:
        taken: what Redis handed over. request: its body. earlier: tokens that earlier owners wrote.
        vocabulary: of the model.

    Attributes:
        name: of this ownership in the engine: the step under way when a request was lost must not
            write into the stream of the same request taken again.
        suspect: earlier owners died of it, or beside it, and nobody made progress since.
        proven: Redis knows of progress beyond what earlier owners made.
    """

    def __init__(
        self,
        taken: Taken,
        request: messages.Request,
        earlier: list[messages.Token],
        vocabulary: Vocabulary,
    ) -> None:
        self.rid = taken.rid
        self.epoch = taken.epoch
        self.name = name_of(taken.rid, taken.epoch)
        self.request = request
        self.suspect = taken.deaths > 0
        self.proven = False
        self._mark = taken.progress
        self._cls = taken.cls
        self._waited_ms = taken.waited_ms
        self._earlier = len(earlier)
        # All of them: a failover may have lost tokens of earlier owners, too.
        self._tokens = list(earlier)
        self._acknowledged = self._earlier
        self._progress = 0
        self._end: messages.End | None = None
        self._text = TextStream(vocabulary, request.sampling.stop, request.prompt)
        for token in earlier:
            # Stop strings and characters may straddle the change of owner.
            self._text.push(token.id)
        self._taken_at = time.monotonic()
        self._first_at = 0.0
        if self._text.stopped:
            # Its end was lost, and its last tokens were not.
            self.end("stop")

    @property
    def ended(self) -> bool:
        """Whether no token will follow."""
        return self._end is not None

    def engine_request(self) -> EngineRequest:
        """The request as the engine knows it, to go on after the earlier tokens."""
        sampling = self.request.sampling
        return EngineRequest(
            rid=self.name,
            prompt=self.request.prompt,
            sampling=SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                stop_ids=frozenset(sampling.stop_ids),
                ignore_eos=sampling.ignore_eos,
                min_p=sampling.min_p,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                repetition_penalty=sampling.repetition_penalty,
            ),
            generated=[token.id for token in self._tokens[: self._earlier]],
            priority=self._cls,
        )

    def advance(self, output: StepOutput) -> bool:
        """Adds what a step did; True when a stop string ended it, which the engine cannot know."""
        self._progress = output.prefilled
        for i, token_id in enumerate(output.tokens):
            last = output.finish is not None and i == len(output.tokens) - 1
            if last:
                # The id that ended it is counted, but is not part of the text.
                text = self._text.finish(token_id, shown=output.finish != "stop")
            else:
                text = self._text.push(token_id)
            if not self._first_at:
                self._first_at = time.monotonic()
            self._tokens.append(messages.Token(0, token_id, text))
            if self._text.stopped:
                self.end("stop")
                return output.finish is None
        if output.finish == "error":
            self.end("error", code="engine_error", message=output.error)
        elif output.finish is not None:
            self.end(output.finish)
        return False

    def end(self, reason: str, *, code: str = "", message: str = "") -> None:
        """Says how it ended; goes out with its last tokens."""
        now = time.monotonic()
        first = self._first_at or now
        timings = {
            "queue": float(self._waited_ms),
            "prefill": (first - self._taken_at) * 1000,
            "decode": (now - first) * 1000,
        }
        self._end = messages.End(messages.VERSION, reason, code, message, timings)

    def emission(self) -> Emission:
        """Everything that Redis has not acknowledged."""
        first = self._acknowledged + 1
        fresh = self._tokens[self._acknowledged :]
        tokens = b""
        if fresh:
            tokens = messages.encode(messages.Tokens(messages.VERSION, first, fresh))
        last = self._acknowledged + len(fresh)
        if self._end is None:
            return Emission(self.rid, self.epoch, first, last, tokens, self._progress)
        end = messages.encode(self._end)
        return Emission(
            self.rid, self.epoch, first, last, tokens, self._progress, self._end.reason, end
        )

    def acknowledge(self, emission: Emission) -> None:
        """Redis has what this emission said."""
        self._acknowledged = emission.last
        # As take sees it: rows of the prompt that nobody had computed, or a token.
        rows = min(emission.progress, len(self.request.prompt))
        if rows > self._mark or emission.last > self._earlier:
            self.proven = True

    def rewind(self, seq: int) -> None:
        """Redis has the tokens up to number `seq` alone: a failover may lose some."""
        self._acknowledged = min(seq, len(self._tokens))
