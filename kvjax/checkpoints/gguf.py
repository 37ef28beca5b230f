"""Reads a GGUF file (llama.cpp's format): header -> Config and Tokenizer, quantized tensors -> params.

The header is parsed here, since the `gguf` package takes 12 s over a vocabulary of 262,144. Its dequantization is used
as it is, for every kind it knows. Tensors are read and dequantized one at a time, in cache-sized pieces.

llama.cpp stores some weights differently from Hugging Face, whose conventions we follow: rows of q and k of the "llama"
architecture are permuted (its rotary embedding turns neighbouring channels), Gemma's norm weights have 1 added, Phi-3
keeps q, k, v as one matrix and gate, up as another.
"""

import concurrent.futures
import dataclasses
import functools
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from kvjax.checkpoints.check import CheckpointError, Tensor, assemble, check_names, parameter_names
from kvjax.checkpoints.tokenizer import Tokenizer, tokenizer_from_gguf
from kvjax.models.config import Config, LayerType, Rope

QuantizationType = gguf.GGMLQuantizationType


def load(path: str | os.PathLike[str], dtype: Any) -> tuple[dict[str, Any], Config, Tokenizer]:
    """Loads a model.

    Args:
      path: The file.
      dtype: Of the parameters, for example `jnp.float32`.

    Returns:
      Parameters (as in `kvjax.models.params`), config, tokenizer.

    Raises:
      CheckpointError: The file is truncated or corrupt, or its model is not supported.
      FileNotFoundError: There is no such file.
    """
    header = read_header(path)
    tokenizer = tokenizer_from_gguf(header.metadata, header.path)
    config = config_from_gguf(header)
    config = dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
    return assemble(config, _locate(header, config, dtype), header.path, dtype), config, tokenizer


# The file format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` is row-major (the file has it the other way round), `offset` counts from byte 0."""

    kind: QuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything in a GGUF file but the numbers."""

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parses metadata and tensor directory.

    Raises:
      CheckpointError: Not a GGUF file, truncated, or of an unsupported version.
      FileNotFoundError: There is no such file.
    """
    path = os.fspath(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, data)
            except (struct.error, IndexError, KeyError, ArithmeticError, ValueError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{path}: truncated or corrupt header ({error}); copy the file again.") from error
    for name, info in header.tensors.items():
        if info.offset + info.nbytes > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {name} ends at byte {info.offset + info.nbytes}, the file has {size}; copy "
                "the file again."
            )
    return header


def _parse(path: str, data: mmap.mmap) -> Header:
    position = 4

    def take(code: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from(f"<{code}", data, position)
        position += struct.calcsize(code)
        return value

    def take_string() -> str:
        nonlocal position
        length = take("Q")
        text = data[position : position + length]
        if len(text) < length:
            raise IndexError(f"a string of {length} bytes passes the end")
        position += length
        return text.decode()

    def take_array() -> list[Any]:
        nonlocal position
        kind, count = take("I"), take("Q")
        if kind not in _FORMATS:  # Strings or arrays; a plain loop, each element at least 8 bytes.
            if count > len(data) // 8:
                raise IndexError(f"an array of {count} elements passes the end")
            return [take_value(kind) for _ in range(count)]
        numbers = np.frombuffer(data, f"<{_FORMATS[kind]}", count, position)
        position += numbers.nbytes
        return numbers.tolist()

    def take_value(kind: int) -> Any:
        if kind == _STRING:
            return take_string()
        if kind == _ARRAY:
            return take_array()
        value = take(_FORMATS[kind])
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-6, not 9.999999974752427e-07.

    def take_tensor() -> tuple[str, TensorInfo]:
        name, rank = take_string(), take("I")
        shape = tuple(take("Q") for _ in range(rank))[::-1]
        kind, offset = QuantizationType(take("I")), take("Q")
        if shape and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} are no whole number of {kind.name} blocks")
        return name, TensorInfo(kind, shape, offset)

    version = take("I")
    if version not in (2, 3):  # A big-endian file shows up as 3 << 24.
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; 2 and 3 (little-endian) are.")
    tensor_count, metadata_count = take("Q"), take("Q")
    metadata = {}
    for _ in range(metadata_count):
        key = take_string()
        metadata[key] = take_value(take("I"))
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts; join them first with `llama-gguf-split --merge`."
        )
    tensors = dict(take_tensor() for _ in range(tensor_count))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-position // alignment) * alignment
    return Header(path, metadata, {n: dataclasses.replace(t, offset=start + t.offset) for n, t in tensors.items()})


# The architecture

_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": "gelu_tanh", "post_norms": True}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},  # Mistral too.
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "phi3": {},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | {"qk_norm": True},
}
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}  # Every so many layers attend to everything, the others to a window.
_NARROW_HEADS = {("gemma2", 46), ("gemma3", 62)}  # The 27B models scale queries by (hidden / heads) ** -0.5.


def config_from_gguf(header: Header) -> Config:
    """The architecture that the metadata of a GGUF file describes; `bos_id` and `eos_ids` are left to the tokenizer.

    Raises:
      CheckpointError: The architecture is not supported, or a setting is missing.
    """
    family = header.metadata.get("general.architecture")
    if family not in _FAMILIES:
        raise CheckpointError(
            f"{header.path}: architecture {family!r} is not supported; supported: {', '.join(_FAMILIES)}."
        )

    def get(key: str, default: Any = None) -> Any:
        value = header.metadata.get(f"{family}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1 and "pattern" not in key:
            return value[0]  # One value per layer, all alike.
        return value

    def need(key: str, default: Any = None) -> Any:
        value = get(key, default)
        if value is None or isinstance(value, list):
            what = "is missing" if value is None else f"differs between layers ({value}), which is not supported"
            raise CheckpointError(f"{header.path}: metadata {family}.{key} {what}.")
        return value

    if experts := get("expert_count", 0):
        raise CheckpointError(f"{header.path}: a mixture of {experts} experts; only dense models are supported.")
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor token_embd.weight is missing.")
    hidden, heads, layers = need("embedding_length"), need("attention.head_count"), need("block_count")
    head_dim = get("attention.key_length", hidden // heads)
    window = get("attention.sliding_window", 0)
    types = _layer_types(family, layers, window, get)
    rope = sliding_rope = _rope(header, get, head_dim)
    if family == "gemma3":  # Its sliding layers rotate at another base and are never stretched.
        sliding_rope = Rope(theta=get("rope.freq_base_swa", 10000.0), rotary_dim=head_dim)
    features: dict[str, Any] = {"qkv_bias": "blk.0.attn_q.bias" in header.tensors, **_FAMILIES[family]}
    query_dim = hidden // heads if (family, layers) in _NARROW_HEADS else head_dim
    try:
        return Config(
            family=family,
            vocab_size=header.tensors["token_embd.weight"].shape[0],  # May be padded beyond the tokenizer's.
            hidden_size=hidden,
            mlp_size=need("feed_forward_length"),
            num_heads=heads,
            num_kv_heads=need("attention.head_count_kv", heads),
            head_dim=head_dim,
            layer_types=types,
            rope=rope,
            sliding_rope=sliding_rope,
            sliding_window=window if "sliding" in types else 0,
            max_length=need("context_length"),
            norm_eps=need("attention.layer_norm_rms_epsilon"),
            query_scale=get("attention.scale", query_dim**-0.5),
            attn_softcap=get("attn_logit_softcapping", 0.0),
            logit_softcap=get("final_logit_softcapping", 0.0),
            embed_scale=hidden**0.5 if "gemma" in family else 1.0,
            tied="output.weight" not in header.tensors,
            **features,
        )
    except ValueError as error:
        raise CheckpointError(f"{header.path}: {error}") from error


def _layer_types(family: str, layers: int, window: int, get: Callable[..., Any]) -> tuple[LayerType, ...]:
    pattern = get("attention.sliding_window_pattern", _FULL_EVERY.get(family))
    if isinstance(pattern, list):  # One flag per layer.
        return tuple("sliding" if slides else "full" for slides in pattern)
    if pattern is None:  # Mistral 0.1 and Phi-3 slide everywhere, if a window is given.
        slides = 0 < window < get("context_length")
        return ("sliding" if slides else "full",) * layers
    return tuple("full" if i % pattern == pattern - 1 else "sliding" for i in range(layers))


def _rope(header: Header, get: Callable[..., Any], head_dim: int) -> Rope:
    plain = Rope(theta=get("rope.freq_base", 10000.0), rotary_dim=get("rope.dimension_count", head_dim))
    extend = functools.partial(dataclasses.replace, plain)
    length = get("context_length")
    original = get("rope.scaling.original_context_length", length)
    factor = get("rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in header.tensors:  # Llama 3.1: one divisor per frequency, at any length.
        divisors = _floats(header, "rope_freqs.weight")
        return extend(scaling="longrope", original_length=original, short_factor=divisors, long_factor=divisors)
    if "rope_factors_long.weight" in header.tensors:  # Phi-3 with 128k.
        stretch = length / original
        scale = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return extend(
            scaling="longrope",
            factor=stretch,
            original_length=original,
            attention_factor=get("rope.scaling.attn_factor", scale),
            short_factor=_floats(header, "rope_factors_short.weight"),
            long_factor=_floats(header, "rope_factors_long.weight"),
        )
    match get("rope.scaling.type", "none"):
        case "none":
            return plain
        case "linear":
            return extend(scaling="linear", factor=factor)
        case "yarn":
            sharper = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
            return extend(
                scaling="yarn",
                factor=factor,
                original_length=original,
                attention_factor=get("rope.scaling.attn_factor", 1.0) * sharper,
                beta_fast=get("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=get("rope.scaling.yarn_beta_slow", 1.0),
            )
        case other:
            raise CheckpointError(
                f"{header.path}: rope.scaling.type {other!r} without its factors is not supported; supported: none, "
                "linear, yarn."
            )


# The tensors

_TOP = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight"}
_LAYER = {
    "attn_norm": "attn_norm.weight",
    "q_proj": "attn_q.weight",
    "k_proj": "attn_k.weight",
    "v_proj": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o_proj": "attn_output.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate_proj": "ffn_gate.weight",
    "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
}
_FUSED = {  # Phi-3.
    "q_proj": "attn_qkv.weight",
    "k_proj": "attn_qkv.weight",
    "v_proj": "attn_qkv.weight",
    "gate_proj": "ffn_up.weight",
}
_USED_BY_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_PIECE_BYTES = 1 << 18  # Of quantized data, dequantized at once: intermediates stay within a core's cache.


def _locate(header: Header, config: Config, dtype: Any) -> dict[str, Tensor]:
    """Every parameter of the model as a `Tensor` that reads it.

    Raises:
      CheckpointError: The file lacks a tensor or holds one too many.
    """
    names = {name: _file_name(name, config) for name in parameter_names(config)}
    check_names(expected=names.values(), found=header.tensors.keys() - _USED_BY_CONFIG, source=header.path)
    return {
        name: Tensor(where, functools.partial(_read_parameter, header, config, name, where, dtype))
        for name, where in names.items()
    }


def _file_name(name: str, config: Config) -> str:
    """What the file calls a parameter: "layers.3.q_proj" is "blk.3.attn_q.weight"."""
    if name in _TOP:
        return _TOP[name]
    _, layer, leaf = name.split(".")
    return f"blk.{layer}.{_FUSED.get(leaf, _LAYER[leaf]) if config.family == 'phi3' else _LAYER[leaf]}"


def _read_parameter(header: Header, config: Config, name: str, where: str, dtype: Any) -> np.ndarray:
    leaf = name.rsplit(".", maxsplit=1)[-1]
    if leaf.endswith("norm"):  # In float32, since 1 + w has fewer digits of w.
        return _read_rows(header, where, np.float32) - np.float32(config.norm_offset)
    value = _read_rows(header, where, dtype, _rows(config, leaf))
    if config.family == "llama" and leaf in ("q_proj", "k_proj", "q_bias", "k_bias"):
        value = _unpermute(value, config.num_heads if leaf.startswith("q") else config.num_kv_heads)
    return value.T if leaf.endswith("proj") else value


def _rows(config: Config, leaf: str) -> slice:
    """Which rows of a tensor of the file are the parameter: all, but in Phi-3 q lies above k above v, gate above up."""
    if config.family != "phi3":
        return slice(None)
    q, kv, mlp = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.mlp_size
    parts = {
        "q_proj": slice(0, q),
        "k_proj": slice(q, q + kv),
        "v_proj": slice(q + kv, None),
        "gate_proj": slice(0, mlp),
        "up_proj": slice(mlp, None),
    }
    return parts.get(leaf, slice(None))


def _unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from (pair, half) order, as llama.cpp's rotary embedding takes them, to (half, pair) order."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _read_rows(header: Header, name: str, dtype: Any, rows: slice = slice(None)) -> np.ndarray:
    """Dequantized rows of a tensor as the file lays them out, [rows, columns] (or [columns])."""
    info = header.tensors[name]
    packed = np.memmap(header.path, np.uint8, "r", info.offset, (info.nbytes,))
    row_count = info.shape[0] if len(info.shape) > 1 else 1
    packed = packed.reshape(row_count, -1)[rows].reshape(-1)
    shape = (len(range(*rows.indices(row_count))), *info.shape[1:]) if len(info.shape) > 1 else info.shape
    return dequantize(packed, info.kind, dtype).reshape(shape)


def dequantize(packed: np.ndarray, kind: QuantizationType, dtype: Any) -> np.ndarray:
    """Numbers of quantized blocks.

    Args:
      packed: Whole blocks, uint8 [bytes].
      kind: How they are quantized.
      dtype: Of the result; values are computed in float32.

    Returns:
      A new array [numbers], aligned so that JAX can take it over without a copy.

    Raises:
      NotImplementedError: The `gguf` package does not know this kind.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    step = max(1, _PIECE_BYTES // size)  # Blocks in a piece.
    out = _aligned_empty(packed.size // size * block, dtype)

    def fill(start: int) -> None:
        piece = gguf.dequantize(packed[None, start * size : (start + step) * size], kind)
        out[start * block : (start + step) * block] = piece[0]

    starts = range(0, packed.size // size, step)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NumPy releases the GIL.
        for _ in pool.map(fill, starts):
            pass
    return out


def _aligned_empty(count: int, dtype: Any) -> np.ndarray:
    """An uninitialised array [count] whose memory begins at a multiple of 64 bytes."""
    nbytes = count * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype)


def _floats(header: Header, name: str) -> tuple[float, ...]:
    return tuple(float(x) for x in _read_rows(header, name, np.float32))


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a GGUF file, by its name or its first bytes."""
    path = pathlib.Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"
