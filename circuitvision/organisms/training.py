"""What every shapes organism shares: the optimisation loop, the tokenizer, pixels for a model, and folders written whole or not at all.

The loop is AdamW with a short warm-up, a constant rate, and a linear decay to zero over the last 40 % of the steps; only matrices are
decayed. A model folder is written under a temporary name beside its target and renamed, so an interrupted run leaves nothing that looks
like a model.

Not covered: resuming in the middle of a run. A recipe takes minutes; an interrupted run starts again.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from circuitvision.progress import silent

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run. ``initial`` is the standard deviation that weight matrices start with."""

    steps: int
    batch: int
    rate: float = 1.5e-3
    decay: float = 0.1
    warm_up: int = 100
    cool_down: float = 0.4
    clip: float = 1.0
    initial: float = 0.1

    def rate_factor(self, step: int, steps: int) -> float:
        """The learning rate at ``step`` as a fraction of ``rate``."""
        warm = min(1.0, (step + 1) / self.warm_up)
        return warm * min(1.0, (steps - step) / max(1.0, self.cool_down * steps))


def fit(
    model: torch.nn.Module,
    loss: Callable[[], Float[Tensor, ""]],
    recipe: Recipe,
    *,
    steps: int | None = None,
    progress: bool = True,
    label: str = "training",
    check: Callable[[], float] | None = None,
    check_every: int = 500,
) -> float:
    """Minimise ``loss`` over the model's parameters; returns the minutes it took.

    ``loss`` draws its own next batch at every call. ``check`` is a score to show beside the loss while training; it steers nothing. Parameters that
    require no gradient stay as they are.
    """
    steps = recipe.steps if steps is None else steps
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(_groups(trained, recipe), lr=recipe.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.rate_factor(step, steps))
    model.train()
    started, smooth, checked = time.monotonic(), None, {}
    bar = tqdm(range(steps), desc=label, disable=not progress or silent(), mininterval=2.0)
    for step in bar:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        if progress and check is not None and (step + 1) % check_every == 0:
            checked = {"validation": f"{check():.3f}"}
        if step % 50 == 49:
            bar.set_postfix({"loss": f"{smooth:.4f}", **checked})
    model.eval()
    return (time.monotonic() - started) / 60


def _groups(trained: Sequence[torch.nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """The optimiser's parameter groups: matrices decay, others do not."""
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def initialise(model: torch.nn.Module, deviation: float) -> None:
    """Draw every matrix (and embedding vector of a token) anew from a normal distribution; biases to 0, norms to 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif parameter.numel() > 1:
                parameter.normal_(0.0, deviation)


@contextmanager
def reproducible(seed: int, stage: int = 1) -> Iterator[np.random.Generator]:
    """Seed torch for the length of a block, then give its generator back; yields a numpy generator for the data of a stage of training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield np.random.default_rng([seed, stage])


def pixel_values(
    pictures: UInt8[np.ndarray, "scene height width channel"],
) -> Float[Tensor, "scene channel height width"]:
    """Pictures as the models' processors give them: levels scaled to [-1, 1], channels first."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN[0]).div_(STD[0]).contiguous()


def word_tokenizer(words: Sequence[str], *, image_token: bool = False, wrap: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per blank-separated word.

    Args:
        image_token: reserve ``<image>`` as a special token.
        wrap: put ``<s>`` before and ``</s>`` after every text (CLIP reads its text at the end token).
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    # CLIPModel treats an end token with id 2 as a sign of an old checkpoint and reads the text at its highest id instead.
    special = [PAD, BOS, UNK, EOS] if wrap else [PAD, BOS, EOS, UNK]
    special += [IMAGE] if image_token else []
    ids = {word: index for index, word in enumerate([*special, *words])}
    inner = Tokenizer(WordLevel(ids, unk_token=UNK))
    inner.pre_tokenizer = WhitespaceSplit()
    if wrap:
        inner.post_processor = TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(BOS, ids[BOS]), (EOS, ids[EOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE] if image_token else [],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
    )


def write_folder(folder: Path, *parts: object) -> None:
    """Save models, processors and configurations into ``folder`` in one move: complete, or not there at all.

    Each part has ``save_pretrained``. What was in ``folder`` before, a card included, is gone.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part in parts:
            part.save_pretrained(temporary)  # type: ignore[attr-defined]
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def report(name: str, scores: dict[str, object]) -> None:
    """Print the scores of a finished run to the terminal, one per line."""
    print(f"{name}:", file=sys.stderr)
    for key, value in scores.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"  {key}: {shown}", file=sys.stderr)


def finished(
    name: str,
    seed: int,
    out_dir: Path,
    spent: Mapping[str, float],
    evaluate: Callable[[Path], dict[str, Any]],
    parts: Sequence[object],
    progress: bool,
) -> dict[str, Any]:
    """Write a trained organism, score what was written, print the scores if asked for, and return them with the minutes ``spent``."""
    write_folder(Path(out_dir), *parts)
    minutes = {key: round(value, 2) for key, value in spent.items()}
    scores: dict[str, Any] = {"seed": seed, **minutes, **evaluate(Path(out_dir))}
    if progress:
        report(name, scores)
    return scores
