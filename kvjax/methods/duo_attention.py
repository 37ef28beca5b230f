"""DuoAttention: some heads retrieve, the others look at sinks and recent tokens. Xiao et al., 2024,
https://arxiv.org/abs/2410.10819

A gate per KV head, trained once per model (`kvjax.training.duo`), says how much it needs the whole text. Retrieval
heads keep everything; the others a ring of constant size (section 2.4).

Differs from the authors' code: a streaming head's query sees the last `recent` tokens, itself included, as in their
training; their deployed cache shows it one more. Heads stay in the model's order (they reorder the projections). Of
equal gates the first retrieve (they add a little noise), so that a policy is the same wherever it is built.
"""

import math
import pathlib
from collections.abc import Sequence

from kvjax.policies import Policy, SplitHeads, register

PACKAGED = pathlib.Path(__file__).parent / "gates"


@register(
    "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    "https://arxiv.org/abs/2410.10819",
    sinks=4,
    recent=8,
)
def duo_attention(
    gates: str | Sequence[Sequence[float]] = "even", *, retrieval: float = 0.5, sinks: int = 64, recent: int = 256
) -> Policy:
    """Keeps everything in the heads that retrieve, and sinks and recent tokens in the others.

    Args:
      gates: A file with a line of numbers for every full-attention layer, one for each KV head, as
        `kvjax.training.duo.save_gates` writes and the authors publish (`full_attention_heads.tsv`); or the numbers.
        "tiny" are those of the house model (trained by `experiments/train_duo.py`).
        "even" is an untrained pattern for any model, to compare with: heads of both kinds take turns.
      retrieval: Part of all layers' KV heads that keep everything (paper: half with grouped queries, else a quarter).
      sinks: First tokens of a ring that stay.
      recent: Newest tokens of a ring.
    """
    if not 0 <= retrieval <= 1:
        raise ValueError(f"retrieval is the part of the heads that keep everything, between 0 and 1; got {retrieval}.")
    if sinks < 0 or recent < 1:
        raise ValueError(f"sinks must not be negative and recent at least 1, got {sinks} and {recent}.")
    if isinstance(gates, str):
        numbers = None if gates == "even" else read_gates(gates)
    else:
        numbers = tuple(tuple(float(gate) for gate in layer) for layer in gates)
    if numbers is not None and not (numbers and all(numbers) and all(map(math.isfinite, sum(numbers, ())))):
        raise ValueError("gates are finite numbers, one for each KV head of every full-attention layer.")
    return Policy(stages=(SplitHeads(gates=numbers, sparsity=1 - retrieval, sinks=sinks, recent=recent),))


def read_gates(name: str) -> tuple[tuple[float, ...], ...]:
    """Lines of numbers, of a file or of gates that come with kvjax.

    Raises:
      ValueError: There is no such file, or it holds something else.
    """
    packaged = PACKAGED / f"{name}.tsv"
    try:
        path = packaged if packaged.is_file() else pathlib.Path(name)
        lines = path.read_text(encoding="utf-8").split("\n")
        return tuple(tuple(float(word) for word in line.split()) for line in lines if line.strip())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read gates from {name!r}: {error}. Train some with kvjax.training.duo, or give 'even'."
        ) from None
