"""Text to token ids and back, over the ``tokenizers`` library; and back one token at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_deploy.errors import BundleError, InputError, require

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Detokenizer", "Tokenizer"]


class Tokenizer:
    """A ``tokenizer.json`` of Hugging Face.

    Args:
        library_tokenizer: A ``tokenizers.Tokenizer``; :meth:`load` reads one from a directory.
    """

    def __init__(self, library_tokenizer: tokenizers.Tokenizer) -> None:
        self._library = library_tokenizer
        added = library_tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer | None:
        """Read ``tokenizer.json``; None where the directory has none.

        Truncation and padding that the file may ask for are switched off: a prompt is never cut in silence.

        Raises:
            BundleError: The file is damaged.
            MissingDependencyError: The package ``tokenizers`` is not installed.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            return None
        library = require("tokenizers", extra="cpu", why="turn text into token ids")
        try:
            tokenizer: tokenizers.Tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more particular
            raise BundleError(
                f"{path} cannot be read as a tokenizer: {error}",
                hint="copy tokenizer.json from the checkpoint again, or export again; if it is undamaged, "
                "its format may need a newer package: pip install -U tokenizers",
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's vocabulary may be larger."""
        return self._library.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer's own post-processor adds and no others.

        Raises:
            InputError: The text holds lone surrogates, which no UTF-8 text does.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text cannot be written as UTF-8: character {error.start} is {text[error.start]!r}",
                hint="it was probably decoded from bytes in another encoding; decode it with errors='replace'",
            ) from error
        return self._library.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens and ids that are no token are left out."""
        return self._library.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary writes it, ``<|endoftext|>`` say; None where it has none."""
        return self._library.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """As the vocabulary writes it; None for a special token and for an id that is no token."""
        return None if token_id in self._special_ids else self._library.id_to_token(token_id)

    def decoder_types(self) -> frozenset[str]:
        """Names of the decoders that make text of tokens, ``ByteLevel`` say, without those that only join."""
        decoder = self._library.decoder
        return frozenset() if decoder is None else frozenset(_types(json.loads(decoder.__getstate__()))) - {"Fuse"}


class Detokenizer:
    """Text of token ids that come one at a time, at a cost that does not grow with their number.

    What :meth:`push` returns, joined, and :meth:`flush` last, is ``tokenizer.decode`` of all ids. It holds for

    * byte-level tokenizers: always;
    * decoders under which a token's text depends on the token before it and on nothing else (Metaspace, WordPiece,
      BPEDecoder, none at all; Replace, Fuse and the Strip of one leading space as SentencePiece models have them);
    * byte-fallback tokens such as ``<0xE2>`` among these, as long as each run of them is valid UTF-8. Of a broken run
      the library replaces every byte, the characters before the broken byte too; here these have been returned
      already, so a broken run gives what Python's ``bytes.decode("utf-8", errors="replace")`` makes of it.

    No more than 3 bytes are ever held back: the beginning of one UTF-8 character.
    """

    # Not tokenizers.decoders.DecodeStream: as of 0.23 it returns nothing, at growing cost, while the text ends in
    # broken bytes, raises "Invalid prefix" on broken byte-fallback runs, and cannot be flushed.

    def __init__(self, tokenizer: Tokenizer) -> None:
        types = tokenizer.decoder_types()
        self._tokenizer = tokenizer
        self._byte_level = types == {"ByteLevel"}
        self._byte_fallback = "ByteFallback" in types
        self._previous: int | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" if it completes none, or is special or no token."""
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        text = self._utf8.decode(self._bytes(token_id, token))
        self._previous = token_id
        return text

    def flush(self) -> str:
        """What is left: U+FFFD for a character that was never completed, else ""."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int, token: str) -> bytes:
        """The UTF-8 bytes, complete or not, that this token adds."""
        if self._byte_level:
            return _byte_level_bytes(token)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            byte = int(token[3:5], 16)
            if byte >= 0x80 or self._previous is not None:  # the decoder may strip a space that comes first
                return bytes([byte])
        return self._text_after_previous(token_id).encode("utf-8")

    def _text_after_previous(self, token_id: int) -> str:
        alone = self._tokenizer.decode([token_id])
        if self._previous is None:
            return alone
        before = self._tokenizer.decode([self._previous])
        both = self._tokenizer.decode([self._previous, token_id])
        return both[len(before) :] if both.startswith(before) else alone


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def _types(decoder: dict[str, Any]) -> list[str]:
    if decoder["type"] == "Sequence":
        return [name for part in decoder["decoders"] for name in _types(part)]
    return [decoder["type"]]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: the printable characters of Latin-1 stand for themselves, U+0100 and on for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _byte_level_bytes(token: str) -> bytes:
    """A token with a character outside the table, which only an added token has, stands for itself."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")
