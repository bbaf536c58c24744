"""Tokenizer and Detokenizer over tokenizers built here: byte-level, Metaspace, byte-fallback and others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from mamba_deploy.errors import BundleError, InputError, MissingDependencyError
from mamba_deploy.runtime.tokenizer import Detokenizer, Tokenizer


def character_of_byte() -> dict[int, str]:
    """What the library's own pre-tokenizer makes of each byte that UTF-8 text can hold, and GPT-2's rest."""
    table = {}
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in range(0x80):
        ((mapped, _),) = pre_tokenizer.pre_tokenize_str(chr(code))
        table[code] = mapped
    for first in range(0xC2, 0xE0):
        for second in range(0x80, 0xC0):
            ((mapped, _),) = pre_tokenizer.pre_tokenize_str(bytes([first, second]).decode())
            table[first], table[second] = mapped
    left = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(table.values()), key=ord)
    # 0xAD is among the continuation bytes, so the bytes left stand in the order of their characters
    return table | dict(zip([b for b in range(256) if b not in table], left, strict=True))


def byte_level() -> tokenizers.Tokenizer:
    """All bytes, and tokens that cut characters in every way: at both ends, in the middle, invalid."""
    table = character_of_byte()
    pieces = [bytes([b]) for b in range(256)]
    pieces += [b" the", "é".encode(), "日本".encode(), "😀".encode(), "\ufffd".encode()]
    pieces += [b"\xf0\x9f", b"\x98\x80", b"\x80\xf0\x9f\x98", b"a\xe6\x97", b"\xa5b", b"\xa5\xe6", b"\xff\xff\xff\xff"]
    pieces += [b"\xed\xa0\x80", b"\xf4\x90", b"\xc0\x80", b"\xe2\x82\xac\xe2"]
    vocab = {"".join(table[b] for b in piece): i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("日本 語", normalized=False)])
    return tokenizer


WORDS = "<unk> ▁ ▁▁ ▁the the é ▁日本 語 \ufffd x▁y . ##ing </w> ab</w> a b".split()


def plain(decoder: decoders.Decoder | None) -> tokenizers.Tokenizer:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama and Codestral Mamba have it."""
    vocab = {word: i for i, word in enumerate(WORDS + [f"<0x{b:02X}>" for b in range(256)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def ids_of(library: tokenizers.Tokenizer) -> st.SearchStrategy[list[int]]:
    """Also an id that is no token."""
    return st.lists(st.integers(0, library.get_vocab_size()), max_size=40)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([detokenizer.push(i) for i in ids] + [detokenizer.flush()])


BYTE_LEVEL = byte_level()
FUSED_BYTE_LEVEL = byte_level()
FUSED_BYTE_LEVEL.decoder = decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])
BYTE_FALLBACK = byte_fallback()
PLAIN = {
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "bpe": decoders.BPEDecoder(),
    "fuse": decoders.Fuse(),
    "none": None,
}


@given(ids_of(BYTE_LEVEL))
def test_byte_level_is_the_decoded_whole(ids: list[int]) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL)
    assert streamed(tokenizer, ids) == BYTE_LEVEL.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@given(st.lists(st.integers(0x80, 0xFF), max_size=12))
def test_byte_level_with_broken_bytes_only(ids: list[int]) -> None:
    assert streamed(Tokenizer(BYTE_LEVEL), ids) == BYTE_LEVEL.decode(ids)


@given(ids_of(FUSED_BYTE_LEVEL))
def test_byte_level_in_a_sequence_is_the_decoded_whole(ids: list[int]) -> None:
    # Fuse before ByteLevel makes one token of all: characters outside the table then spoil the whole
    ids = [i for i in ids if FUSED_BYTE_LEVEL.id_to_token(i) != "日本 語"]
    assert streamed(Tokenizer(FUSED_BYTE_LEVEL), ids) == FUSED_BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize("name", PLAIN)
@given(data=st.data())
def test_other_decoders_give_the_decoded_whole(name: str, data: st.DataObject) -> None:
    library = plain(PLAIN[name])
    ids = data.draw(ids_of(library))
    assert streamed(Tokenizer(library), ids) == library.decode(ids, skip_special_tokens=True)


def byte_ids(data: bytes) -> list[int]:
    return [len(WORDS) + b for b in data]


@given(st.lists(st.one_of(st.sampled_from([*WORDS, "<s>", "</s>"]), st.text(max_size=4).map(str.encode)), max_size=20))
def test_byte_fallback_is_the_decoded_whole(parts: list[str | bytes]) -> None:
    """Tokens, and runs of byte tokens that are valid UTF-8."""
    ids: list[int] = []
    for part in parts:
        ids += byte_ids(part) if isinstance(part, bytes) else [BYTE_FALLBACK.token_to_id(part)]
    assert streamed(Tokenizer(BYTE_FALLBACK), ids) == BYTE_FALLBACK.decode(ids, skip_special_tokens=True)


@given(st.lists(st.one_of(st.integers(0, len(WORDS) - 1), st.binary(min_size=1, max_size=6)), max_size=12))
def test_broken_runs_of_byte_fallback_are_replaced_as_python_does(parts: list[int | bytes]) -> None:
    """The one exception that Detokenizer documents. A word between any two runs."""
    ids, expected = [WORDS.index("a")], "a"
    for part in parts:
        if isinstance(part, bytes):
            ids += [*byte_ids(part), WORDS.index("b")]
            expected += part.decode("utf-8", errors="replace") + "b"
        else:
            ids.append(part)
            expected += WORDS[part].replace("▁", " ")
    assert streamed(Tokenizer(BYTE_FALLBACK), ids) == expected


def test_a_broken_run_keeps_the_characters_before_it() -> None:
    ids = [WORDS.index("a"), *byte_ids("€".encode() + b"\xff")]
    assert BYTE_FALLBACK.decode(ids) == "a\ufffd\ufffd\ufffd\ufffd"
    assert streamed(Tokenizer(BYTE_FALLBACK), ids) == "a€\ufffd"


def test_a_character_comes_with_its_last_byte() -> None:
    for library, ids in [(BYTE_LEVEL, list("a😀".encode())), (BYTE_FALLBACK, byte_ids("a😀".encode()))]:
        detokenizer = Detokenizer(Tokenizer(library))
        assert [detokenizer.push(i) for i in ids] == ["a", "", "", "", "😀"]
        assert detokenizer.flush() == ""


@pytest.mark.parametrize(("library", "offset"), [(BYTE_LEVEL, 0), (BYTE_FALLBACK, len(WORDS))])
@pytest.mark.parametrize("byte", [0x80, 0xE2, 0xFF])
def test_broken_bytes_never_stall(library: tokenizers.Tokenizer, offset: int, byte: int) -> None:
    detokenizer = Detokenizer(Tokenizer(library))
    text = [detokenizer.push(offset + byte) for _ in range(10)]
    assert len("".join(text)) >= 9
    assert len("".join([*text, detokenizer.flush()])) == 10


@pytest.mark.parametrize("data", [b" a", b"  ", b"a ", " é".encode()])
def test_a_leading_space_in_byte_tokens_is_stripped_as_in_the_whole(data: bytes) -> None:
    ids = byte_ids(data)
    assert streamed(Tokenizer(BYTE_FALLBACK), ids) == BYTE_FALLBACK.decode(ids) == data.decode().removeprefix(" ")


def test_added_tokens_of_a_byte_level_tokenizer_stand_for_themselves() -> None:
    ids = [ord("a"), *(BYTE_LEVEL.token_to_id(token) for token in ("日本 語", "<|endoftext|>", "<tool>"))]
    assert streamed(Tokenizer(BYTE_LEVEL), ids) == BYTE_LEVEL.decode(ids) == "a日本 語<tool>"


def test_flush_leaves_nothing_behind() -> None:
    detokenizer = Detokenizer(Tokenizer(BYTE_LEVEL))
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.push(ord("a")) == "a"


def test_leading_spaces_between_tokens_are_kept_and_specials_do_not_count_as_tokens() -> None:
    library = plain(decoders.Metaspace())
    detokenizer = Detokenizer(Tokenizer(library))
    ids = [library.token_to_id(t) for t in ["<s>", "▁the", "</s>", "▁the", "▁", "the"]]
    assert [detokenizer.push(i) for i in ids] == ["", "the", "", " the", " ", "the"]


def test_text_is_not_lost_under_a_decoder_that_joins_tokens() -> None:
    library = plain(decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")]))
    a, b = WORDS.index("a"), WORDS.index("b")
    assert streamed(Tokenizer(library), [a, b]) == "ab"  # the whole would be X, but "a" was returned already


class Watched(Tokenizer):
    """Remembers the most ids that were decoded at once."""

    most = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.most = max(self.most, len(ids))
        return super().decode(ids)


@pytest.mark.parametrize("library", [BYTE_LEVEL, BYTE_FALLBACK, plain(None)], ids=["level", "fallback", "none"])
def test_cost_of_a_token_does_not_grow(library: tokenizers.Tokenizer) -> None:
    tokenizer = Watched(library)
    detokenizer = Detokenizer(tokenizer)
    for i in range(1000):
        assert len(detokenizer.push(i % library.get_vocab_size())) < 20
    assert tokenizer.most <= 2


@given(st.text(max_size=30))
def test_text_survives_there_and_back(text: str) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL)
    ids = tokenizer.encode(text)
    assert "<|endoftext|>" in text or streamed(tokenizer, ids) == tokenizer.decode(ids) == text


def test_load(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer is not None
    assert tokenizer.encode("a b c") == [ord(c) for c in "a b c"]  # neither cut nor padded
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.token_id("<|endoftext|>") == library.token_to_id("<|endoftext|>")
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.decode([97, tokenizer.token_id("<|endoftext|>") or 0, 98]) == "ab"


def test_special_tokens_of_the_post_processor_are_added(tmp_path: Path) -> None:
    library = plain(decoders.Metaspace())
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", library.token_to_id("<s>"))])
    tokenizer = Tokenizer(library)
    assert tokenizer.encode("a") == [library.token_to_id("<s>"), WORDS.index("a")]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(f"{path} cannot be read as a tokenizer: ")
    assert caught.value.hint.startswith("copy tokenizer.json from the checkpoint again")


def test_text_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        Tokenizer(BYTE_LEVEL).encode("ab\udcff")
    assert str(caught.value) == r"the text cannot be written as UTF-8: character 2 is '\udcff'"
    assert "errors='replace'" in caught.value.hint


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="'tokenizers' is needed to turn text into token ids"):
        Tokenizer.load(tmp_path)
