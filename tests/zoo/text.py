"""A word-level tokenizer built in memory, and prompts by id.

Words are whole tokens, so that "red" is one id in every case. Three orders of special tokens exist because families put
them differently: LLaMA-like prompts start with <bos>, CLIP's texts are bracketed, SigLIP's end with <eos>.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
WORDS = [
    *("\n", "?", ":", ".", ","),
    *("red", "green", "blue", "yellow", "circle", "square", "triangle", "cross", "star"),
    *("what", "which", "color", "shape", "is", "are", "the", "a", "an", "of", "on", "in", "to", "there"),
    *("left", "right", "top", "bottom", "above", "below", "object", "picture", "small", "large"),
    *("reach", "move", "go", "yes", "no", "one", "two", "three", "user", "assistant", "answer", "question"),
]
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)
FIRST_WORD = len(SPECIAL)
N_TOKENS = FIRST_WORD + len(WORDS)

TEMPLATES = {"bos": "<bos> $A", "bos_eos": "<bos> $A <eos>", "eos": "$A <eos>", "plain": "$A"}


def vocabulary(eos_last: bool = False) -> dict[str, int]:
    """Token -> id. `eos_last` gives <eos> the highest id (and shifts the rest down), as CLIP's vocabulary has it."""
    tokens = [*SPECIAL, *WORDS]
    if eos_last:
        tokens.remove("<eos>")
        tokens.append("<eos>")
    return {token: index for index, token in enumerate(tokens)}


def tokenizer(
    template: str = "bos", eos_last: bool = False, padding_side: str = "left", mask: bool = True
) -> PreTrainedTokenizerFast:
    """The tokenizer, with one of `TEMPLATES` around every text; without `mask` it returns input_ids alone."""
    ids = vocabulary(eos_last)
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\n|[^\w\s]"), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single=TEMPLATES[template],
        pair=f"{TEMPLATES[template]} $B:1",
        special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])],
    )
    built = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"] if mask else ["input_ids"],
    )
    built.add_tokens(["<image>"], special_tokens=True)
    return built


def words(count: int, generator: torch.Generator) -> list[int]:
    """`count` random word ids, the same for both vocabularies' numbering of ordinary tokens (never special)."""
    return torch.randint(FIRST_WORD, N_TOKENS - 1, (count,), generator=generator).tolist()


def shortened(row: int, padding: str | None) -> int:
    """How many words fewer row `row` has. With padding, rows 0, 3, ... lose 2 words and rows 2, 5, ... lose 1."""
    return (2, 0, 1)[row % 3] if padding else 0


def pad_rows(rows: list[list[int]], width: int, padding: str | None, pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [row pos], every row filled up to `width` on the given side."""
    if padding not in (None, "left", "right"):
        raise ValueError(f"padding must be None, 'left' or 'right', not {padding!r}")
    if padding is None and any(len(row) != width for row in rows):
        raise ValueError("rows of different length need padding='left' or 'right'")
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if padding == "left" else slice(0, len(row))
        ids[index, span] = torch.tensor(row)
        mask[index, span] = 1
    return ids, mask
