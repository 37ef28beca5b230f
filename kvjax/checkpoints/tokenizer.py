"""Text to token ids and back, built from a Hugging Face `tokenizer.json` or from the vocabulary inside a GGUF file.

A GGUF file holds pieces, scores and types, not a tokenizer. Two kinds are in use, and both are byte-pair encoding:

* "llama" (SentencePiece: Gemma, Llama 2, Mistral, Phi-3): spaces are written as U+2581, unknown characters fall back to
  bytes, and the merges are implied: two pieces merge if the result is a piece, best score first.
* "gpt2" (byte level: Llama 3, Qwen): text is cut by a regular expression, bytes are spelled as printable characters,
  and the merges are listed.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from kvjax.checkpoints.check import CheckpointError

SPACE = "\u2581"  # How SentencePiece writes a space.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # Values of tokenizer.ggml.token_type that matter here.


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: The `tokenizers` object that does the work.
      bos_id: Put in front of every text, -1 if the model wants none.
      eos_ids: Any of them ends a generation.
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    eos_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's embedding may have more rows."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text, `bos_id` in front if the model has one. Special tokens in the text are recognised."""
        bos = [self.bos_id] if add_bos and self.bos_id >= 0 else []
        return bos + self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, ids: Iterable[int], skip_special: bool = False) -> Iterator[str]:
        """Decodes while ids arrive: one string per id, empty while a character is unfinished, then what was held back.

        The strings add up to `decode(ids)` wherever that is valid text. What a token adds depends on the one before it
        (a space, a byte of the same character), so the last piece that was shown is decoded again with the pending ids.
        """
        shown: list[int] = []
        pending: list[int] = []
        for i in ids:
            pending.append(int(i))
            text = self.decode(shown + pending, skip_special)
            new = text[len(self.decode(shown, skip_special)) :]
            if not new or text.endswith("\ufffd"):  # A skipped token, or bytes that end within a character.
                yield ""
            else:
                yield new
                shown, pending = pending, []
        yield self.decode(shown + pending, skip_special)[len(self.decode(shown, skip_special)) :]

    def token_id(self, piece: str) -> int:
        """Id of a piece as the vocabulary spells it.

        Raises:
          KeyError: There is no such piece.
        """
        found = self.backend.token_to_id(piece)
        if found is None:
            raise KeyError(f"No token {piece!r} in a vocabulary of {self.vocab_size}.")
        return found


def tokenizer_from_folder(folder: str | pathlib.Path) -> Tokenizer:
    """Reads `tokenizer.json` of a Hugging Face folder, and the special tokens from the settings beside it.

    Raises:
      CheckpointError: A file is missing or cannot be parsed.
    """
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing. A `tokenizer.model` alone is not enough: save the tokenizer once with transformers' "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`, which writes tokenizer.json."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exceptions.
        raise CheckpointError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error
    settings = [_json(folder / name) for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
    # What the tokenizer itself puts in front of a text is the model's BOS.
    first = backend.encode("", add_special_tokens=True).ids[:1]
    return Tokenizer(backend, bos_id=first[0] if first else -1, eos_ids=_eos_ids(settings, backend))


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Builds the tokenizer that the metadata of a GGUF file describes.

    Args:
      metadata: Keys and values of the file's header.
      source: The file, for error messages.

    Raises:
      CheckpointError: The vocabulary is missing or of an unknown kind.
    """
    tokens = _need(metadata, "tokens", source)
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    kind = _need(metadata, "model", source)
    if kind == "llama":
        backend, bos_by_default = _sentencepiece(metadata, tokens, types, source), True
    elif kind == "gpt2":
        backend, bos_by_default = _byte_level(metadata, tokens, source)
    else:
        raise CheckpointError(f"{source}: tokenizer.ggml.model is {kind!r}; known are 'llama' and 'gpt2'.")
    _add_whole_tokens(backend, tokens, types)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return Tokenizer(
        backend,
        bos_id=int(metadata.get("tokenizer.ggml.bos_token_id", -1)) if add_bos else -1,
        eos_ids=tuple(dict.fromkeys(int(i) for i in ends if i is not None)),
    )


# SentencePiece


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], source: str
) -> tokenizers.Tokenizer:
    # Gemma's runs of spaces are stored as spaces, but text is looked up after its spaces were replaced.
    tokens = [SPACE * len(token) if token.isspace() and " " in token else token for token in tokens]
    scores = _need(metadata, "scores", source)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=implied_merges(tokens, scores, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    restore = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):  # Llama 2, Mistral: "hi" and " hi" start alike.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        backend.decoder = decoders.Sequence([*restore, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = replace
        backend.decoder = decoders.Sequence(restore)
    return backend


def implied_merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Merges of a SentencePiece vocabulary, most urgent first.

    SentencePiece merges the neighbours whose union has the best score. User-defined pieces go before all others: it
    never splits them, whatever score the file gives. Among the ways to cut a piece, the longest left part comes first.
    """
    is_piece = [kind in (NORMAL, USER_DEFINED) for kind in types]
    pieces = {token for token, keep in zip(tokens, is_piece, strict=True) if keep}
    ranks = [-float("inf") if kind == USER_DEFINED else -score for kind, score in zip(types, scores, strict=True)]
    order = sorted((i for i, keep in enumerate(is_piece) if keep), key=ranks.__getitem__)  # Stable: ties by id.
    return [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in order)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in pieces and token[cut:] in pieces
    ]


# Byte level

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    return rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(suffix: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How a byte-level tokenizer cuts text before merging: `pattern` None is GPT-2's own rule."""

    pattern: str | None
    nfc: bool = False  # Unicode is composed first.
    whole: bool = False  # A word that is a token is taken as it is, without merges.
    bos: bool = False  # BOS is added unless the file says otherwise.


_LLAMA3 = _Cut(_words(r"\p{N}{1,3}"), whole=True, bos=True)
_QWEN2 = _Cut(_words(r"\p{N}"), nfc=True)
_CUTS = {  # By tokenizer.ggml.pre.
    "default": _Cut(None),
    "gpt-2": _Cut(None),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": _Cut(_words(r"\p{N}{1,3}")),
    "smaug-bpe": _Cut(_words(r"\p{N}{1,3}")),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Cut(_cased_words("", r"\p{N}"), whole=True, bos=True),
    "gpt-4o": _Cut(_cased_words(_ENGLISH + "?", r"\p{N}{1,3}")),
}


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], source: str) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether its kind adds BOS by default."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _CUTS:
        raise CheckpointError(f"{source}: tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(_CUTS))}.")
    cut = _CUTS[name]
    merges = [tuple(merge.split(" ")) for merge in _need(metadata, "merges", source)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.whole))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None)
    if cut.pattern is None:
        backend.pre_tokenizer = to_bytes
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(cut.pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, cut.bos


# Special tokens


def _add_whole_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens ("<bos>") and user-defined ones (Gemma's "<h1>", tabs, newlines) are never split."""
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    # Runs of spaces were respelled and are left to the merges: added under their old spelling they would get new ids.
    user = [token for token in user if backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in user])


def _eos_ids(settings: Iterable[Mapping[str, Any]], backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The first of the settings that names end tokens, as an id, a list of ids, a piece, or a piece in a dict."""
    for setting in settings:
        if (ids := setting.get("eos_token_id")) is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
        if (piece := setting.get("eos_token")) is not None:
            found = backend.token_to_id(piece["content"] if isinstance(piece, dict) else piece)
            return () if found is None else (found,)
    return ()


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def _need(metadata: Mapping[str, Any], name: str, source: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise CheckpointError(f"{source}: metadata has no {key}, so no tokenizer can be built.")
    return metadata[key]
