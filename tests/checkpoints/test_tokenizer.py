"""Tokenizers: Gemma's to the last id, and each kind of GGUF vocabulary against an independent reading of its rules."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from kvjax.checkpoints.check import CheckpointError
from kvjax.checkpoints.tokenizer import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)

BYTE = 6  # tokenizer.ggml.token_type of "<0x41>".
ROWS = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_gemma3.json").read_text())
TEXTS = ["Hello world", "  two  spaces", "it's 12345 o'clock\n\n\tDÉJÀ vu", "日本語 and 😀!", "", " "]


@pytest.fixture(scope="module")
def gemma_tokenizer(gemma):
    return gemma.tokenizer


# --- Gemma 3, as transformers tokenizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_gemma(gemma_tokenizer, row):
    assert gemma_tokenizer.encode(row["text"]) == row["ids"]
    assert gemma_tokenizer.decode(row["ids"], skip_special=True) == row["decoded"]
    for skip in (True, False):
        assert "".join(gemma_tokenizer.stream(row["ids"], skip)) == gemma_tokenizer.decode(row["ids"], skip)


def test_gemma_properties(gemma_tokenizer):
    assert (gemma_tokenizer.bos_id, gemma_tokenizer.eos_ids, gemma_tokenizer.vocab_size) == (2, (1,), 262144)
    assert gemma_tokenizer.token_id("<start_of_turn>") == 105
    assert gemma_tokenizer.encode("hi", add_bos=False) == gemma_tokenizer.encode("hi")[1:]
    with pytest.raises(KeyError, match="no such piece"):
        gemma_tokenizer.token_id("no such piece")


def test_streaming_shows_a_character_when_it_is_whole(gemma_tokenizer):
    ids = gemma_tokenizer.encode("a𝔘b", add_bos=False)  # The letter in the middle is four byte tokens.
    assert len(ids) == 6
    assert list(gemma_tokenizer.stream(ids)) == ["a", "", "", "", "𝔘", "b", ""]
    assert list(gemma_tokenizer.stream(ids[:3])) == [
        "a",
        "",
        "",
        "\ufffd\ufffd",
    ]  # What was held back comes at the end.


# --- SentencePiece ----------------------------------------------------------------------------------------------------

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = ["▁a", "ab", "bc", "abc", "▁ab", "cc", "bcc", "▁▁", "▁", "a", "b", "c"]


def sentencepiece(**changes) -> dict:
    """Metadata of a small vocabulary. Scores are not in the order of ids, as in a vocabulary that was edited."""
    tokens = [*SPECIAL, *BYTES, *PIECES, "<tool>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), USER_DEFINED]
    scores = [0.0] * (3 + 256) + [-float(7 * i % len(PIECES)) for i in range(len(PIECES))] + [-1000.0]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | changes).items()}


def merge_by_score(text: str, metadata: dict) -> list[int]:
    """SentencePiece by its definition: join the neighbours with the best union, leftmost first, until none is left."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    score = {token: scores[i] for i, token in enumerate(tokens) if token in PIECES}
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = [
            (score[a + b], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in score
        ]
        if not joined:
            break
        i = -max(joined)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    ids = []
    for symbol in symbols:
        ids += [tokens.index(symbol)] if symbol in score else [tokens.index(f"<0x{b:02X}>") for b in symbol.encode()]
    return ids


def test_sentencepiece_merges_by_score():
    metadata = sentencepiece(add_space_prefix=False)
    tokenizer = tokenizer_from_gguf(metadata, "tiny.gguf")
    rng = random.Random(0)
    for length in range(40):
        text = "".join(rng.choice("aabbcc xé") for _ in range(length))
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == merge_by_score(text, metadata)
        assert tokenizer.decode(ids) == text


def test_sentencepiece_prefix():
    tokenizer = tokenizer_from_gguf(sentencepiece(), "tiny.gguf")
    assert tokenizer.encode("a") == [1, tokenizer.token_id("▁a")]
    for text in ("a", " a", "a b", ""):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text
    ids = tokenizer.encode("a<tool>b")
    assert tokenizer.token_id("<tool>") in ids


def test_bos_is_added_only_where_the_file_wants_it():
    without = tokenizer_from_gguf(sentencepiece(add_bos_token=False, eot_token_id=1), "tiny.gguf")
    assert without.bos_id == -1 and without.eos_ids == (2, 1)
    assert without.encode("a", add_bos=True) == without.encode("a", add_bos=False)


# --- Byte level -------------------------------------------------------------------------------------------------------


def trained(pattern: str | None, *, nfc: bool = False, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level tokenizer as its authors would have made it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = to_bytes
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "the theme of then 1234 12 it's we're\n\n  x"] * 3, trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_level(tokenizer: tokenizers.Tokenizer, **changes) -> dict:
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    metadata = {
        "model": "gpt2",
        "tokens": [token for token, _ in vocab],
        "token_type": [CONTROL if token == "<|end|>" else NORMAL for token, _ in vocab],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": len(vocab) - 1,
        "eos_token_id": len(vocab) - 1,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | changes).items()}


# The patterns as the models' own tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "made", "bos"),
    [
        ("default", {"pattern": None}, False),
        ("llama-bpe", {"pattern": LLAMA3, "ignore_merges": True}, True),
        ("qwen2", {"pattern": QWEN2, "nfc": True}, False),
        ("tekken", {"pattern": TEKKEN, "ignore_merges": True}, True),
    ],
)
def test_byte_level(pre, made, bos):
    original = trained(**made)
    tokenizer = tokenizer_from_gguf(byte_level(original, pre=pre), "tiny.gguf")
    assert tokenizer.vocab_size == original.get_vocab_size()
    for text in [*TEXTS, "e\u0301<|end|>the 1234567", "MiXeD caseWords 'S", " \r\n  trailing  "]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.decode(ids) == original.decode(ids, skip_special_tokens=False)
        assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
    assert tokenizer.encode("a")[:1] == ([tokenizer.bos_id] if bos else tokenizer.encode("a", add_bos=False)[:1])


def test_unknown_kinds_are_refused():
    metadata = byte_level(trained(None))
    with pytest.raises(CheckpointError, match=r"tiny.gguf: tokenizer.ggml.pre is 'new'; known are .*llama-bpe"):
        tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "new"}, "tiny.gguf")
    with pytest.raises(CheckpointError, match=r"tiny.gguf: tokenizer.ggml.model is 'bert'"):
        tokenizer_from_gguf(metadata | {"tokenizer.ggml.model": "bert"}, "tiny.gguf")
    with pytest.raises(CheckpointError, match="no tokenizer.ggml.tokens"):
        tokenizer_from_gguf({}, "tiny.gguf")


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def test_folder(tmp_path):
    backend = trained(QWEN2)
    end = backend.token_to_id("<|end|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    tokenizer = tokenizer_from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (-1, (end,))

    backend.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", end)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    tokenizer = tokenizer_from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (end, (3, 4))
    assert tokenizer.encode("Hello") == backend.encode("Hello").ids


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer"):
        tokenizer_from_folder(tmp_path)
