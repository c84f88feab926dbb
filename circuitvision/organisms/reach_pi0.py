"""reach-pi0: a small π0 that reaches for the object its instruction names, in closed loop.

The model is transformers' ``PI0ForConditionalGeneration``: a SigLIP tower reads the board (one patch per cell), a Gemma
prefix joins it with the instruction, and an action expert turns noise into the next two steps by flow matching. It is
trained by imitation on single scenes (:mod:`circuitvision.data.reach`), with the gripper anywhere, so what it meets in
the middle of an episode is not new to it; whole layouts are kept back for validation and test.

``PI0ImageProcessor`` needs torchvision, so the processor is saved with SigLIP's, which loads without it. Both
``AutoProcessor.from_pretrained(folder)`` and :func:`load_processor` read the folder. A processor call takes one *list
of cameras* per prompt: ``processor(images=[[image], [image]], text=[...])``.

Not covered: several cameras, continuous positions, real π0 weights.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.data import reach
from circuitvision.data.generated import reach_pairs
from circuitvision.data.pairs import Pairs
from circuitvision.errors import InputError
from circuitvision.organisms.training import Recipe, fit, report, reproducible, write_folder

if TYPE_CHECKING:
    from transformers import PI0ForConditionalGeneration, PI0Processor

CHUNK = 2
RECIPE = Recipe(steps=2000, batch=64, rate=3e-3, decay=0.01, cool_down=0.5, initial=0.06)
DRAWS = 2
WIDTH = 64
DENOISING_STEPS = 5
HORIZON = 8
# Room for the image tokens, <bos>, two words and the newline that the processor appends.
PROMPT_LENGTH = 32
WORDS = ("<pad>", "<bos>", "<unk>", "\n", "reach", *reach.COLOR_NAMES)
EPISODES = 500


def build_processor(board: reach.Board | None = None) -> PI0Processor:
    """A new processor for ``board``: word-level tokenizer, SigLIP's image processor, statistics of states and actions.

    ``PI0Processor`` pads prompts to 48 tokens unless the tokenizer brings a ``max_length`` of its own, as this one
    does, and adds 1024 ``<loc>`` and 128 ``<seg>`` tokens to it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PI0Processor, PreTrainedTokenizerFast, SiglipImageProcessorPil

    board = board or reach.Board()
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", max_length=PROMPT_LENGTH
    )
    side = board.image_size
    image_processor: Any = SiglipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    image_processor.image_seq_length = board.size**2
    middle = (board.size - 1) / 2
    return PI0Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        state_mean=[middle, middle],
        state_std=[middle, middle],
        actions_mean=[0.0, 0.0],
        actions_std=[0.8, 0.8],
        max_state_dim=2,
        chunk_size=CHUNK,
    )


def load_processor(folder: str | Path) -> PI0Processor:
    """The processor of a folder written by :func:`train`, by the route of the pi0 family: without torchvision.

    Raises:
        InputError: the folder has no processor.
    """
    from circuitvision.families import pi0

    if not (Path(folder) / "processor_config.json").is_file():
        raise InputError(f"{folder} holds no processor_config.json; save a processor there with save_pretrained")
    return pi0.load_processor(str(folder))


def build_model(processor: PI0Processor, board: reach.Board | None = None) -> PI0ForConditionalGeneration:
    """An untrained model for ``processor``: 2 vision, 3 prefix and 3 expert layers, 4 heads over 2 key-value heads."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    board = board or reach.Board()
    gemma = {
        "model_type": "gemma",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "vocab_size": len(processor.tokenizer),
        "pad_token_id": processor.tokenizer.pad_token_id,
        "bos_token_id": processor.tokenizer.bos_token_id,
        "eos_token_id": None,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": board.image_size,
        "patch_size": board.cell_pixels,
        "vision_use_head": False,
    }
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": gemma,
            "vision_config": vision,
            "projection_dim": WIDTH,
            "image_token_id": processor.image_token_id,
        },
        dit_config={**gemma, "intermediate_size": WIDTH * 3 // 2},
        chunk_size=CHUNK,
        max_state_dim=2,
        max_action_dim=2,
        num_inference_steps=DENOISING_STEPS,
    )
    model = PI0ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=RECIPE.initial)
    return model


def model_inputs(processor: PI0Processor, scenes: reach.ReachScenes, actions: bool = False) -> dict[str, Any]:
    """The tensors of ``scenes`` as ``processor`` makes them: image, prompt, state; the expert's steps if asked for."""
    extra = {"actions": scenes.expert(CHUNK)} if actions else {}
    batch = processor(
        images=[[image] for image in scenes.images()], text=scenes.instructions(), state=scenes.gripper, **extra
    )
    return dict(batch)


def fast_inputs(processor: PI0Processor, scenes: reach.ReachScenes) -> dict[str, Tensor]:
    """What :func:`model_inputs` makes with actions, but without padding and fast enough to train with."""
    board, tokenizer = scenes.board, processor.tokenizer
    pixels = torch.from_numpy(scenes.images()).permute(0, 3, 1, 2)[:, None].float() / 127.5 - 1
    words = np.array(tokenizer.convert_tokens_to_ids(list(reach.COLOR_NAMES)))
    start, reach_word, newline = tokenizer.convert_tokens_to_ids(["<bos>", "reach", "\n"])
    patches = board.size**2
    ids = np.full((len(scenes), patches + 4), processor.image_token_id)
    ids[:, patches:] = (start, reach_word, 0, newline)
    ids[:, patches + 2] = words[scenes.goal]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(len(scenes), 1, dtype=torch.bool),
        "state": processor.normalize(torch.from_numpy(scenes.gripper).float(), "state"),
        "actions": processor.normalize(torch.from_numpy(scenes.expert(CHUNK)).float(), "actions"),
    }


def to_steps(processor: PI0Processor, actions: Float[Tensor, "scene chunk 2"]) -> Int[np.ndarray, "scene chunk 2"]:
    """The model's normalised actions as whole steps in {-1, 0, 1} (row step, column step)."""
    plain = actions.float() * torch.tensor(processor.actions_std) + torch.tensor(processor.actions_mean)
    return plain.round().clamp(-1, 1).long().numpy()


@torch.no_grad()
def predict(
    model: PI0ForConditionalGeneration, processor: PI0Processor, scenes: reach.ReachScenes, seed: int = 0
) -> Float[Tensor, "scene chunk 2"]:
    """The sampled actions, normalised; the noise they start from is drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(scenes), CHUNK, 2, generator=generator)
    return model.sample_actions(**model_inputs(processor, scenes), noise=noise)


def policy(model: PI0ForConditionalGeneration, processor: PI0Processor, seed: int = 0) -> reach.Policy:
    """The model as a policy for :func:`~circuitvision.data.reach.run_episodes`; new noise at every call, seeded."""
    seeds = np.random.default_rng(seed)

    def act(scenes: reach.ReachScenes) -> Int[np.ndarray, "scene chunk 2"]:
        return to_steps(processor, predict(model, processor, scenes, int(seeds.integers(2**31))))

    return act


def closed_loop(
    model: PI0ForConditionalGeneration, processor: PI0Processor, split: str, count: int = EPISODES, seed: int = 0
) -> reach.Episodes:
    """``count`` new episodes of ``HORIZON`` steps, on layouts of ``split`` only."""
    return reach.run_episodes(policy(model, processor, seed), reach.sample_starts(count, seed, split), HORIZON)


def imitation_loss(model: PI0ForConditionalGeneration, batch: dict[str, Tensor], draws: int = DRAWS) -> Tensor:
    """The flow-matching loss of ``batch``, over ``draws`` noises and times per scene.

    The prefix does not see noise or time, so it runs once and its keys and values serve every draw: the expert is a
    tenth of the tokens, and the many draws make the loss far less noisy for nearly the same time.
    """
    prefix = model.model.embed_prefix(batch["input_ids"], batch["pixel_values"], batch["pixel_attention_mask"])
    mask = batch["attention_mask"]
    cache = model.model.vlm(
        inputs_embeds=prefix,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(mask),
        use_cache=True,
    ).past_key_values
    cache.batch_repeat_interleave(draws)
    repeated = {key: batch[key].repeat_interleave(draws, dim=0) for key in ("state", "actions", "attention_mask")}
    return model(past_key_values=cache, **repeated).loss


class SmallTokenizerFile:
    """The last part of a folder: takes the indentation out of its tokenizer.json, a third of the file."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Rewrite ``tokenizer.json`` in ``folder`` without blanks; what it says stays the same."""
        path = Path(folder) / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False), encoding="utf-8")


def train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one model from scratch, write it to ``out_dir``, return the minutes and its scores (:func:`evaluate`)."""
    processor = build_processor()
    started = time.process_time()
    with reproducible(seed) as generator:
        model = build_model(processor)

        def loss() -> Float[Tensor, ""]:
            return imitation_loss(model, fast_inputs(processor, reach.sample_scenes(RECIPE.batch, generator, "train")))

        minutes = fit(model, loss, RECIPE, steps=steps, progress=progress, label=f"reach-pi0 seed {seed}")
    spent = {"minutes": round(minutes, 2), "cpu_minutes": round((time.process_time() - started) / 60, 2)}
    write_folder(Path(out_dir), model, processor, SmallTokenizerFile())
    scores = {"seed": seed, **spent, **evaluate(Path(out_dir))}
    if progress:
        report("reach-pi0", scores)
    return scores


def evaluate(folder: Path, *, count: int = EPISODES, seed: int = 1_000_003) -> dict[str, Any]:
    """Score the model in ``folder`` in closed loop, each stream on ``count`` new episodes, through the saved processor.

    ``held_out`` is the success on test layouts, ``validation`` on validation layouts (the score that chooses between
    seeds), ``trained`` on training layouts; success means that the gripper rests on the goal after ``HORIZON`` steps.
    ``held_out_actions`` is the share of single test scenes in which the whole chunk is the expert's. ``random_policy``
    is the control on the test episodes.
    """
    from transformers import AutoProcessor, PI0ForConditionalGeneration

    model = PI0ForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    scores: dict[str, Any] = {}
    for group, split, stream in (
        ("held_out", "test", seed),
        ("validation", "validation", seed + 1),
        ("trained", "train", seed + 2),
    ):
        scores[group] = round(closed_loop(model, processor, split, count, stream).success_rate, 5)
        scores[f"{group}_episodes"] = count
    scenes = reach.sample_scenes(count, seed + 3, "test")
    right = (to_steps(processor, predict(model, processor, scenes, seed)) == scenes.expert(CHUNK)).all(axis=(1, 2))
    scores["held_out_actions"] = round(float(right.mean()), 5)
    starts = reach.sample_starts(count, seed, "test")
    scores["random_policy"] = round(reach.run_episodes(reach.random_policy(seed), starts, HORIZON).success_rate, 5)
    return scores


def pairs(count: int, seed: int, *, change: str = "object_cell", dim: int = 0) -> Pairs:
    """Two boards of held-out layouts whose right first steps along ``dim`` (0 rows, 1 columns) differ, the larger step on the clean one.

    ``change``: the goal stands in another cell (``"object_cell"``), the instruction names another object of the same board (``"goal"``), or the
    gripper stands elsewhere (``"gripper"``). Answers and foils are steps, so ``pairs.answered(model, cv.metrics.action_estimate(dim))``.

    Raises:
        InputError: another dimension or change.
    """
    return reach_pairs(count, seed, change=change, dim=dim, split="test", oriented=True)
