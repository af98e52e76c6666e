"""Detokenizing and stop strings, against decoding the whole at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from worker.engine.echo_tokenizer import END_ID, tokenizer_json
from worker.text import Detokenizer, StopStrings, TextStream, Vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json())


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    stream = Detokenizer(Vocabulary(tokenizer))
    out = [stream.push(i) for i in tokenizer.encode(text, add_special_tokens=False).ids]
    return [*out, stream.flush()]


@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_pieces_join_to_the_text_and_hold_no_half_character(
    tokenizer: Tokenizer, text: str
) -> None:
    parts = pieces(tokenizer, text)
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "a😀b") == ["a", "", "", "", "😀", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(Vocabulary(tokenizer))
    half = tokenizer.encode("😀", add_special_tokens=False).ids[:2]
    assert [stream.push(i) for i in half] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_invalid_bytes_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(Vocabulary(tokenizer))
    continuation = tokenizer.encode("😀", add_special_tokens=False).ids[1]
    shown = "".join(stream.push(continuation) for _ in range(64))
    assert len(shown) >= 48


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(Vocabulary(tokenizer))
    assert stream.push(END_ID) == ""
    assert stream.flush() == ""


def test_a_long_stream_stays_exact(tokenizer: Tokenizer) -> None:
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 40
    assert "".join(pieces(tokenizer, text)) == text


def shown_of(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    watcher = StopStrings(stops)
    out = ""
    for part in parts:
        out += watcher.push(part)
        if watcher.found:
            return out, True
    return out + watcher.flush(), False


@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(
    parts: list[str], stops: list[str]
) -> None:
    shown, found = shown_of(stops, parts)
    text = "".join(parts)
    first = None
    for size in range(len(text) + 1):
        ends = [text[:size].rfind(s) for s in stops if text[:size].endswith(s)]
        if ends:
            first = size
            break
    assert found == (first is not None)
    assert not any(stop in shown for stop in stops) or not found
    if not found:
        assert shown == text
    else:
        assert text.startswith(shown)


def test_a_stop_over_several_pieces_is_cut_out() -> None:
    assert shown_of(["END"], ["foo E", "N", "D bar"]) == ("foo ", True)
    assert shown_of(["END"], ["foo E", "N", "X bar"]) == ("foo ENX bar", False)


def test_what_may_become_a_stop_is_held_back() -> None:
    watcher = StopStrings(["\n\n"])
    assert watcher.push("one\n") == "one"
    assert watcher.push("two") == "\ntwo"


def test_the_ending_id_has_no_text_but_what_was_held_is_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(Vocabulary(tokenizer), ["zz"])
    ids = tokenizer.encode("az", add_special_tokens=False).ids
    assert [stream.push(i) for i in ids] == ["a", ""]
    assert stream.finish(ids[0], shown=False) == "z"
    assert not stream.stopped


def test_a_last_id_that_completes_a_stop_stops(tokenizer: Tokenizer) -> None:
    stream = TextStream(Vocabulary(tokenizer), ["bc"])
    a, b, c = tokenizer.encode("abc", add_special_tokens=False).ids
    assert stream.push(a) + stream.push(b) + stream.finish(c) == "a"
    assert stream.stopped


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """As of Llama 2: words begin with a space, which the decoder strips from the first one."""
    words = ["<unk>", "▁France", "▁is", "▁Paris", "▁a", "<0xE2>", "<0x82>", "<0xAC>", "<sp>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<sp>"])
    return tokenizer


def texts(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    stream = Detokenizer(Vocabulary(tokenizer), prompt)
    return [*(stream.push(i) for i in ids), stream.flush()]


def test_the_first_word_after_a_prompt_keeps_its_space(sentencepiece: Tokenizer) -> None:
    assert texts(sentencepiece, [1, 2], [3, 2]) == [" Paris", " is", ""]
    assert texts(sentencepiece, [], [3, 2]) == ["Paris", " is", ""]


def test_a_special_id_in_the_middle_takes_no_space(sentencepiece: Tokenizer) -> None:
    ids = [3, 8, 2, 8, 8, 4]
    assert "".join(texts(sentencepiece, [], ids)) == sentencepiece.decode(ids) == "Paris is a"


def test_bytes_of_a_fallback_are_one_character(sentencepiece: Tokenizer) -> None:
    assert texts(sentencepiece, [1], [5, 6, 7, 2]) == ["", "", "€", " is", ""]
