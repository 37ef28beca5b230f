"""Trains kvjax-tiny, the house model: 5 million parameters that find things in a context.

    python experiments/train_tiny.py --out results/tiny --minutes 8.5

Llama-shaped (6 layers, width 256, 8 query heads on 4 KV heads, vocabulary 2,048), trained from nothing on text that
ships with Python and on recall tasks made of it (`tiny_data.py`), so that cache compression can be tested in seconds on
a model that really retrieves. The clock decides: learning rate and curriculum follow the share of `--minutes` that has
passed. Samples are drawn from seeds by worker processes. Writes into `--out`, after every evaluation, a Hugging Face
folder (model.safetensors, config.json, tokenizer.json), training_log.jsonl and loss.png; with `--checkpoints DIR` it
also saves its state there, and goes on from it.

Measured (docs/models/tiny/README.md): 0.86 billion tokens in 231 s on an NVIDIA H200; then, undisturbed text, 0.2
million tokens in 14 minutes on two CPU cores. What came of it: `tiny_accuracy.py`.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_data as data
import tokenizers
from jax import Array

from kvjax.checkpoints import huggingface
from kvjax.models.config import Config, Rope
from kvjax.models.families import weight_table
from kvjax.models.params import init_params
from kvjax.models.transformer import embed, layer_spec, run_layer, unembed

TEXT_LOSS = 0.5  # Weight of the mean loss of text next to the mean loss of answers.
# Against learning the little text by heart, on rows of text only: channels that are dropped, tokens that are replaced.
DROPPED, REPLACED = 0.1, 0.08
TEMPLATES = [text.format(key=city, value="12345") for pair in data.NEEDLES for text in pair for city in data.CITIES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the curriculum.

    Attributes:
      until: Share of the time at which it ends; it ends sooner once answers are right.
      lengths: Length of rows in tokens, and how often it is drawn.
      tokens: Of a step.
      mixture: Tasks, and how often they are drawn.
      disturbed: Whether rows of text lose tokens and channels, see `disturbances`.
      haystacks: Whether text in which something is hidden is learned as well.
    """

    until: float
    lengths: tuple[tuple[int, float], ...]
    tokens: int
    mixture: dict[str, float]
    disturbed: bool = True
    haystacks: bool = False


DENSE = {"text": 0.15, "recall": 0.3, "repeat": 0.15, "pairs": 0.25, "needle": 0.15}
FULL = {"text": 0.06, "recall": 0.1, "repeat": 0.1, "pairs": 0.32, "needle": 0.28, "passkey": 0.04, "variables": 0.1}
STAGES = (
    Stage(until=0.3, lengths=((256, 1.0),), tokens=1 << 16, mixture=DENSE),
    Stage(until=0.4, lengths=((256, 0.25), (640, 0.75)), tokens=1 << 16, mixture=FULL),
    Stage(until=0.6, lengths=((256, 0.1), (1152, 0.9)), tokens=1 << 17, mixture=FULL),
    Stage(until=1.0, lengths=((256, 0.05), (1152, 0.6), (2304, 0.35)), tokens=1 << 17, mixture=FULL),
)
# A short second part, from an export: undisturbed text. After the first, a model predicts text only where it sees
# replaced tokens, which tell the rows that count from haystacks, which do not.
TUNING = (
    Stage(
        until=1.0,
        lengths=((256, 0.75), (1152, 0.25)),
        tokens=1 << 10,
        mixture={"text": 0.6, "needle": 0.18, "pairs": 0.14, "passkey": 0.03, "recall": 0.03, "variables": 0.02},
        disturbed=False,
        haystacks=True,
    ),
)
# The share of the tuned weights in what is exported (arXiv 2109.01903): language needs no more, recall stays whole.
TUNED = 0.4
ENOUGH = 0.85  # Share of rows (needles, pairs) whose answers are all right that ends a stage early.


def shapes(stage: Stage) -> list[tuple[int, int]]:
    return [(max(1, stage.tokens // length), length) for length, _ in stage.lengths]


def tiny_config(layers: int = 6, hidden: int = 256, vocab: int = 2048) -> Config:
    """The house model; smaller ones are for trying the script."""
    rope = Rope(theta=10_000.0, rotary_dim=64)
    return Config(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        mlp_size=2 * hidden,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        layer_types=("full",) * layers,
        rope=rope,
        sliding_rope=rope,
        max_length=2304,
        norm_eps=1e-5,
        query_scale=64**-0.5,
        tied=True,
        bos_id=data.BOS_ID,
        eos_ids=(data.EOS_ID,),
    )


# Forward and step


def attention(implementation: str | None):
    """Causal attention for `run_layer`; "cudnn" never holds the whole matrix."""

    def attend(spec, state, new, shared):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (new.q, new.k, new.v))
        out = jax.nn.dot_product_attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            scale=spec.scale,
            is_causal=True,
            implementation=implementation,  # type: ignore[arg-type]
        )
        return jnp.swapaxes(out, 1, 2), state, shared

    return attend


def working_attention() -> str | None:
    """ "cudnn" where it works, forward and backward."""
    if jax.default_backend() != "gpu":
        return None
    q = jnp.ones((2, 256, 8, 64), jnp.bfloat16)
    kv = q[:, :, :4]
    try:
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        jax.block_until_ready(jax.jit(jax.grad(lambda q: attend(q, kv, kv).astype(jnp.float32).sum()))(q))
        return "cudnn"
    except Exception as error:  # Whatever the driver and libraries have to say.
        print(f"Warning: cudnn attention does not work here, using XLA's, which is slower: {error}", flush=True)
        return None


def logits_of(params: Any, config: Config, tokens: Array, attend: Any, dtype: Any, drop: Any = None) -> Array:
    """Logits [B, T, vocab] float32 of ids [B, T]. `drop(i, old, new)` comes after the embedding and every layer."""
    drop = drop or (lambda i, old, new: new)
    # Looked up in float32: the gradient of a lookup adds up thousands of rows, too many for bfloat16.
    x = embed(params, config, tokens).astype(dtype)
    x = drop(0, jnp.zeros_like(x), x)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    pos = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    for i, weights in enumerate(params["layers"]):
        new = run_layer(weights, config, layer_spec(config, i), x, pos, None, None, attend, rows=tokens.size)[0]
        x = drop(i + 1, x, new)
    return unembed(params, config, x)


def disturbances(config: Config, tokens: Array, kinds: Array, seed: Array) -> tuple[Array, Any]:
    """Ids with some replaced, and `drop` for `logits_of`: both only on rows of text. Channels are dropped for a whole
    row (arXiv 1512.05287)."""
    key, is_text = jax.random.key(seed), (kinds == data.NAMES.index("text"))[:, None]
    where, what = jax.random.split(jax.random.fold_in(key, 0))
    other = jax.random.randint(what, tokens.shape, 2, config.vocab_size)
    tokens = jnp.where(is_text & jax.random.bernoulli(where, REPLACED, tokens.shape), other, tokens)

    def drop(i: int, old: Array, new: Array) -> Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, i + 1), 1 - DROPPED, (new.shape[0], 1, new.shape[2]))
        changed = old + (new - old) * keep.astype(new.dtype) / (1 - DROPPED)
        return jnp.where(is_text[:, None], changed, new).astype(new.dtype)

    return tokens, drop


def losses(
    params: Any,
    config: Config,
    tokens: Array,
    weights: Array,
    kinds: Array,
    seed: Array | None = None,
    *,
    attend: Any,
    dtype: Any,
):
    """What is minimized, and what is reported.

    Args:
      tokens: Ids [B, T] int16. weights: [B, T], see `tiny_data`. kinds: Task of each row [B].
      seed: For `disturbances`; None for none.

    Returns:
      The loss, and {"text", "answer": mean losses, "right", "rows": [tasks] rows whose answers are all right, and all}.
    """
    tokens, weights = tokens.astype(jnp.int32), weights.astype(jnp.float32)
    seen, drop = (tokens, None) if seed is None else disturbances(config, tokens, kinds, seed)
    logits = logits_of(params, config, seen, attend, dtype, drop)
    target, weight = jnp.roll(tokens, -1, 1), jnp.roll(weights, -1, 1).at[:, -1].set(data.IGNORED)
    chosen = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    loss = jax.nn.logsumexp(logits, -1) - chosen
    is_text, answer = (weight == 0).astype(jnp.float32), jnp.maximum(weight, 0)
    text = (loss * is_text).sum() / jnp.maximum(is_text.sum(), 1)
    recalled = (loss * answer).sum() / jnp.maximum(answer.sum(), 1e-6)
    hit = jax.lax.stop_gradient(chosen >= logits.max(-1))
    row = ((weight <= 0) | hit).all(-1)
    has = (weight > 0).any(-1)
    count = functools.partial(jax.ops.segment_sum, segment_ids=kinds.astype(jnp.int32), num_segments=len(data.NAMES))
    report = {
        "text": text,
        "answer": recalled,
        "tokens_right": (hit & (weight > 0)).sum() / jnp.maximum((weight > 0).sum(), 1),
        "right": count((row & has).astype(jnp.float32)),
        "rows": count(has.astype(jnp.float32)),
    }
    return TEXT_LOSS * text + recalled, report


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which the clock decides."""
    matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9),
        optax.add_decayed_weights(0.1, mask=matrices),
    )


def make_step(config: Config, attend: Any, dtype: Any, disturbed: bool = True):
    """(params, optimizer state, rate, seed, tokens, weights, kinds) -> (params, state, report)."""
    rule = optimizer()

    def step(params, state, rate, seed, tokens, weights, kinds):
        grad = jax.grad(losses, has_aux=True)
        grads, report = grad(
            params, config, tokens, weights, kinds, seed if disturbed else None, attend=attend, dtype=dtype
        )
        updates, after = rule.update(grads, state, params)
        norm = optax.tree.norm(grads)
        new = jax.tree.map(lambda p, u: p - rate * u, params, updates), after
        # One bad batch must not end a run that cannot be repeated.
        params, state = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(norm), a, b), new, (params, state))
        return params, state, {**report, "grad": norm}

    return jax.jit(step, donate_argnums=(0, 1))


def start_params(config: Config, key: Array) -> Any:
    """Random parameters; what writes to the residual stream is scaled down by its depth (GPT-2)."""
    params = init_params(config, key)
    scale = (2 * config.num_layers) ** -0.5
    small = lambda layer: {n: w * scale if n in ("o_proj", "down_proj") else w for n, w in layer.items()}  # noqa: E731
    return {**params, "layers": tuple(small(layer) for layer in params["layers"])}


# Data


def prepare(folder: pathlib.Path, vocab: int) -> None:
    """Text, tokenizer and token streams, as files that the workers read."""
    prose, code = data.library()
    kept = lambda texts, out: [text for name, text in texts if data.held_out(name) == out]  # noqa: E731
    # Prose counts as much as code, of which there is ten times more. Templates and cities are learned to stay short.
    backend = data.train_tokenizer([*kept(prose, False) * 8, *kept(code, False), *TEMPLATES * 4], vocab)
    backend.save(str(folder / "tokenizer.json"))
    for name, texts in (("prose", prose), ("code", code)):
        np.save(folder / f"{name}.npy", data.stream(backend, kept(texts, False)))
        np.save(folder / f"{name}_held_out.npy", data.stream(backend, kept(texts, True)))
    kept_names = [name for name, _ in prose + code if data.held_out(name)]
    found = {"python": platform.python_version(), "held_out": kept_names}
    (folder / "held_out.json").write_text(json.dumps(found))  # Last: with it the folder is complete.


def corpus(folder: pathlib.Path, held_out: bool = False) -> data.Corpus:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    suffix = "_held_out" if held_out else ""
    return data.make_corpus(backend, *(np.load(folder / f"{name}{suffix}.npy") for name in ("prose", "code")))


def work(folder: str, seed: tuple[int, ...], stages: tuple[Stage, ...], stage: Any, queue: Any) -> None:
    """A worker: batches of the present stage, without end."""
    texts, rng = corpus(pathlib.Path(folder)), np.random.default_rng(seed)
    while True:
        now = stages[stage.value]
        mine = dataclasses.replace(texts, haystack=0.0) if now.haystacks else texts
        chances = np.asarray([chance for _, chance in now.lengths])
        shape = shapes(now)[rng.choice(len(chances), p=chances / chances.sum())]
        queue.put(data.batch(mine, rng, shape, now.mixture))


def examination(folder: pathlib.Path, rows: int, context: int, length: int) -> dict[str, tuple[np.ndarray, ...]]:
    """Held-out questions and text, as batches for `losses`."""
    texts, rng = corpus(folder, held_out=True), np.random.default_rng(1234)
    made: dict[str, tuple[np.ndarray, ...]] = {}
    makers = {
        "needle": lambda: data.needle_row(texts, rng, context),
        "needle_of_4": lambda: data.needle_row(texts, rng, context, 4),
        "pairs": lambda: data.pairs_row(texts, rng, context),
    }
    for name, make in makers.items():
        ids = np.zeros((rows, length), np.int16)
        weights = np.full((rows, length), data.IGNORED, np.float16)
        for i in range(rows):
            row, mask = make()
            ids[i, : len(row)], weights[i, : len(row)] = row, np.where(mask, 1, data.IGNORED)
        made[name] = (ids, weights, np.zeros(rows, np.uint8))
    for name in ("prose", "code"):
        source = getattr(texts, name)
        starts = rng.integers(max(1, len(source) - length), size=rows)
        ids = np.stack([np.resize(source[start : start + length], length) for start in starts])
        ids[:, 0] = data.BOS_ID
        made[name] = (ids, np.zeros((rows, length), np.float16), np.zeros(rows, np.uint8))
    return made


# Out


def export(params: Any, config: Config, folder: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """A Hugging Face folder, bfloat16."""
    import safetensors.numpy

    tensors = {}
    for path, weight in weight_table(config).items():
        leaf: Any = params
        for part in path.split("."):
            leaf = leaf[int(part)] if part.isdigit() else leaf[part]
        value = np.asarray(leaf.astype(jnp.bfloat16))
        tensors[f"model.{weight.name}"] = np.ascontiguousarray(value.T if weight.transpose else value)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": data.BOS_ID,
        "eos_token_id": data.EOS_ID,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"  # A kill while writing leaves the last one whole.
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def plot(log: list[dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row for row in log if row["event"] == "step"]
    tests = [row for row in log if row["event"] == "evaluation"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name in ("text", "answer"):
        left.plot([row["seconds"] for row in steps], [row[name] for row in steps], label=name)
    for before, row in zip(steps, steps[1:], strict=False):
        if row["stage"] != before["stage"]:
            left.axvline(row["seconds"], color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="seconds", ylabel="loss, nats per token", ylim=(0, None), title="Training")
    left.legend()
    for name in ("needle", "needle_of_4", "pairs"):
        right.plot([row["seconds"] for row in tests], [row[name] for row in tests], marker="o", label=name)
    right.set(xlabel="seconds", ylabel="exactly right", ylim=(0, 1.02), title="Held-out questions")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def manager(folder: pathlib.Path | None) -> Any:
    """Orbax's, or None."""
    if folder is None:
        return None
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))


# The run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. `small` shrinks everything for a try on a CPU."""

    out: pathlib.Path
    minutes: float
    checkpoints: pathlib.Path | None
    text: pathlib.Path | None
    start: pathlib.Path | None
    seed: int
    rate: float
    workers: int
    small: bool


def train(settings: Settings) -> None:
    begun = time.time()
    seconds = lambda: time.time() - begun  # noqa: E731
    limit = settings.minutes * 60
    small = settings.small
    config = tiny_config(layers=2, hidden=64, vocab=2048) if small else tiny_config()
    stages = (Stage(until=1.0, lengths=((64, 1.0),), tokens=1 << 12, mixture=DENSE),) if small else STAGES
    if settings.start:
        stages = TUNING
    context, exam_length, exam_rows = (192, 256, 16) if small else (1024, 1152, 96)
    exam_rows = 8 if jax.default_backend() == "cpu" else exam_rows
    settings.out.mkdir(parents=True, exist_ok=True)
    work_folder = settings.text or pathlib.Path(tempfile.mkdtemp(prefix="kvjax-tiny-"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not (work_folder / "held_out.json").is_file():
        work_folder.mkdir(parents=True, exist_ok=True)
        prepare(work_folder, config.vocab_size)
    print(f"{seconds():.0f} s: tokenizer and text are ready", flush=True)

    log_path = settings.out / "training_log.jsonl"
    log: list[dict[str, Any]] = []

    def note(event: str, **values: Any) -> None:
        log.append({"event": event, "seconds": round(seconds() + earlier, 2), **values})
        with log_path.open("a") as file:
            file.write(json.dumps(log[-1]) + "\n")

    # State, from a checkpoint if there is one.
    params = start_params(config, jax.random.key(settings.seed))
    if settings.start:
        params = huggingface.load(settings.start, jnp.float32)[0]
    began = jax.tree.map(np.array, params)  # A copy: steps take the buffers over.
    state, step, stage_index, earlier = optimizer().init(params), 0, 0, 0.0
    keeper = manager(settings.checkpoints)
    if keeper and (last := keeper.latest_step()) is not None:
        import orbax.checkpoint as ocp

        progress = {"stage": np.asarray(0), "seconds": np.asarray(0.0)}
        saved = {"params": params, "state": state, "progress": progress}
        saved = keeper.restore(last, args=ocp.args.StandardRestore(saved))
        params, state, step = saved["params"], saved["state"], last
        stage_index, earlier = int(saved["progress"]["stage"]), float(saved["progress"]["seconds"])
        if log_path.is_file():
            log = [json.loads(line) for line in log_path.read_text().splitlines()]
        print(f"Going on after step {step}, {earlier:.0f} s.", flush=True)

    implementation = working_attention()
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    if (
        implementation is None and not small and jax.default_backend() == "gpu"
    ):  # Whole attention matrices take their room.
        stages = tuple(dataclasses.replace(stage, tokens=stage.tokens // 4) for stage in stages)

    # Workers. Their seeds hold the step, so that a run that goes on sees new samples.
    context_of = multiprocessing.get_context("spawn")
    stage_value, queue = context_of.Value("i", stage_index), context_of.Queue(maxsize=2 * settings.workers)
    workers = [
        context_of.Process(
            target=work, args=(str(work_folder), (settings.seed, step, i), stages, stage_value, queue), daemon=True
        )
        for i in range(settings.workers)
    ]
    for worker in workers:
        worker.start()

    attend = attention(implementation)
    jitted = make_step(config, attend, dtype, disturbed=stages[0].disturbed)
    exams = examination(work_folder, exam_rows, context, exam_length)
    jitted_test = jax.jit(lambda params, *batch: losses(params, config, *batch, attend=attend, dtype=dtype)[1])
    like = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)  # noqa: E731
    abstract = like(params), like(state)

    def compile_for(shape: tuple[int, int], testing: bool = False):
        took = time.time()
        batch = [jax.ShapeDtypeStruct(s, d) for s, d in ((shape, "int16"), (shape, "float16"), (shape[:1], "uint8"))]
        if testing:
            compiled = jitted_test.lower(abstract[0], *batch).compile()
        else:
            compiled = jitted.lower(
                *abstract, *(jax.ShapeDtypeStruct((), d) for d in ("float32", "uint32")), *batch
            ).compile()
        print(f"{seconds():.0f} s: compiled {shape} in {time.time() - took:.0f} s", flush=True)
        return compiled

    # In the order of their need, in the background, while the first already train.
    pool = concurrent.futures.ThreadPoolExecutor(2)
    wanted = list(dict.fromkeys(shape for stage in stages for shape in shapes(stage)))
    compiled = {shape: pool.submit(compile_for, shape) for shape in wanted[:1]}
    test = pool.submit(compile_for, (exam_rows, exam_length), True)
    compiled |= {shape: pool.submit(compile_for, shape) for shape in wanted[1:]}

    note(
        "start",
        python=platform.python_version(),
        jax=jax.__version__,
        device=jax.devices()[0].device_kind,
        attention=implementation or "xla",
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        seed=settings.seed,
        rate=settings.rate,
        minutes=settings.minutes,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        text_tokens={p.stem: int(np.load(p, mmap_mode="r").shape[0]) for p in sorted(work_folder.glob("*.npy"))},
        tokenizer_sha256=hashlib.sha256((work_folder / "tokenizer.json").read_bytes()).hexdigest(),
        text=json.loads((work_folder / "held_out.json").read_text()),
        stages=[dataclasses.asdict(stage) for stage in stages],
    )
    print({key: value for key, value in log[-1].items() if key not in ("text", "stages")}, flush=True)

    def evaluate() -> None:
        started, mixed = time.time(), params
        if settings.start:
            mixed = jax.tree.map(lambda old, new: old + TUNED * (new - old), began, params)
        reports = {
            name: jax.device_get(test.result()(mixed, *map(jnp.asarray, batch))) for name, batch in exams.items()
        }
        values = {n: round(float(r["right"].sum() / exam_rows), 4) for n, r in reports.items() if r["rows"].sum()}
        values |= {f"{n}_loss": round(float(r["text"]), 4) for n, r in reports.items() if not r["rows"].sum()}
        note("evaluation", step=step, **values)
        export(mixed, config, settings.out, work_folder / "tokenizer.json")
        try:
            plot(log, settings.out / "loss.png")
            if keeper:
                import orbax.checkpoint as ocp

                progress = {"stage": np.asarray(stage_index), "seconds": np.asarray(seconds() + earlier)}
                keeper.save(step, args=ocp.args.StandardSave({"params": params, "state": state, "progress": progress}))
        except Exception as error:  # Training is worth more than a plot or a checkpoint.
            print(f"Warning: {error}", flush=True)
        print(f"{seconds():.0f} s: step {step}: {values} ({time.time() - started:.1f} s)", flush=True)

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    tokens_seen, reports, since, waited = 0, [], time.time(), 0.0
    tested, entered, solved = time.time(), step, 0.0
    reserve = 0.02 * limit + (2 if small else 8)  # For the last evaluation and export.
    with Progress(*columns, refresh_per_second=1) as bar:
        shown = bar.add_task("training", total=1.0)
        while (share := (seconds() + earlier) / (limit - reserve)) < 1:
            before = time.time()
            batch = queue.get(timeout=120)
            waited += time.time() - before
            rate = (
                settings.rate
                * min(1.0, (step + 1) / (20 if settings.start else 200))
                * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
            )
            run = compiled[batch[0].shape].result()
            numbers = jnp.float32(rate), jnp.uint32(step)
            params, state, report = run(params, state, *numbers, *(jnp.asarray(x) for x in batch))
            step += 1
            tokens_seen += batch[0].size
            reports.append((batch[0].shape[1], report))
            if len(reports) < 3:
                continue
            jax.block_until_ready(reports[-3][1]["text"])  # At most three steps ahead of the device.
            if len(reports) < (10 if jax.default_backend() == "cpu" else 25):
                continue
            got = [(length, jax.device_get(report)) for length, report in reports]
            longest = stages[stage_index].lengths[-1][0]
            of_stage = [report for length, report in got if length == longest] or [report for _, report in got]
            right, rows = (np.sum([report[name] for report in of_stage], axis=0) for name in ("right", "rows"))
            by_task = {n: round(float(r / k), 3) for n, r, k in zip(data.NAMES, right, rows, strict=True) if k}
            means = {
                n: round(float(np.mean([r[n] for _, r in got])), 4) for n in ("text", "answer", "tokens_right", "grad")
            }
            speed = tokens_seen / (time.time() - since)
            note(
                "step",
                step=step,
                stage=stage_index,
                rate=round(rate, 7),
                **means,
                right=by_task,
                tokens_per_s=round(speed),
                waited=round(waited, 2),
            )
            words = (
                f"stage {stage_index} step {step} text {means['text']} answer {means['answer']} {speed / 1e6:.2f} M/s"
            )
            bar.update(shown, completed=share, description=words)
            if (step // len(reports)) % 4 == 0:
                print(f"{seconds():.0f} s: {words} waited {waited:.1f} s {by_task}", flush=True)
            reports, tokens_seen, since, waited = [], 0, time.time(), 0.0
            # Rows of the stage's longest length decide whether it is done.
            hard = [by_task[name] for name in ("needle", "pairs") if name in by_task]
            solved = min(hard) if hard else 0.0
            over = share > stages[stage_index].until or (solved > ENOUGH and step - entered > 400)
            if over and stage_index + 1 < len(stages):
                stage_index += 1
                stage_value.value, entered = stage_index, step
                print(f"{seconds():.0f} s: stage {stage_index} begins at step {step} ({solved:.2f} solved)", flush=True)
            if time.time() - tested > (15 if small else 900 if jax.default_backend() == "cpu" else 45):
                evaluate()
                tested = since = time.time()
    evaluate()
    for worker in workers:
        worker.terminate()
    if keeper:
        keeper.wait_until_finished()
    print(f"{seconds():.0f} s: done, {step} steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tiny"))
    parser.add_argument("--minutes", type=float, default=8.5, help="of the clock, everything included")
    parser.add_argument("--checkpoints", type=pathlib.Path, default=None, help="folder to save to and go on from")
    parser.add_argument("--text", type=pathlib.Path, default=None, help="folder of tokenized text, made if not there")
    parser.add_argument("--start", type=pathlib.Path, default=None, help="export to tune on undisturbed text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that make samples")
    parser.add_argument("--small", action="store_true", help="a model of 2 layers on rows of 64 tokens, for a CPU")
    train(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
