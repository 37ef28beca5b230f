"""A model of no parameters whose tokens are characters: what samples hold can be read."""

import kvjax
from kvjax.checkpoints import Tokenizer
from kvjax.evaluation.tasks import Ids, Sample
from tests import tiny


class Letters:
    """Every character is a token, in the place of a `tokenizers.Tokenizer`; ids are code points."""

    def encode(self, text, add_special_tokens=False):
        return type("Encoding", (), {"ids": [ord(letter) for letter in text]})

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))

    def get_vocab_size(self):
        return 128


MODEL = kvjax.Model({}, tiny.CONFIG, Tokenizer(Letters(), bos_id=1, eos_ids=()))  # type: ignore[arg-type]


def read(ids: Ids) -> str:
    """Without BOS."""
    return "".join(map(chr, ids[1:] if ids[:1] == (1,) else ids))


def prompt(sample: Sample) -> str:
    return read(sample.context_ids) + read(sample.question_ids)
