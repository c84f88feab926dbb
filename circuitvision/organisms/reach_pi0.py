"""reach-pi0: a small π0 that reaches for the object its instruction names, in closed loop.

The model is transformers' ``PI0ForConditionalGeneration``: a SigLIP tower reads the board (one patch per cell), a Gemma prefix joins it with
the instruction, and an action expert turns noise into the next two steps by flow matching. It is trained by imitation on single scenes
(:mod:`circuitvision.data.reach`), with the gripper anywhere, so what it meets in the middle of an episode is not new to it; whole layouts
are kept back for validation and test.

``PI0ImageProcessor`` needs torchvision, so the processor is saved with SigLIP's, which loads without it. Both
``AutoProcessor.from_pretrained(folder)`` and :func:`load_processor` read the folder. A processor call takes one *list of cameras* per
prompt: ``processor(images=[[image], [image]], text=[...])``.

Not covered: several cameras, continuous positions, real π0 weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.data import reach
from circuitvision.errors import InputError
from circuitvision.progress import track

if TYPE_CHECKING:
    from transformers import PI0ForConditionalGeneration, PI0Processor

CHUNK = 2
STEPS = 3000
BATCH = 64
DRAWS = 4
LEARNING_RATE = 2e-3
WIDTH = 64
DENOISING_STEPS = 5
HORIZON = 8
# Room for the image tokens, <bos>, two words and the newline that the processor appends.
PROMPT_LENGTH = 32
WORDS = ("<pad>", "<bos>", "<unk>", "\n", "reach", *reach.COLOR_NAMES)
STREAMS = {"train": 1_000, "validation": 2_000, "test": 3_000}


def build_processor(board: reach.Board | None = None) -> PI0Processor:
    """A new processor for ``board``: a word-level tokenizer, SigLIP's image processor, and the statistics of states and actions.

    ``PI0Processor`` pads prompts to 48 tokens unless the tokenizer brings a ``max_length`` of its own, as this one does, and adds
    1024 ``<loc>`` and 128 ``<seg>`` tokens to it.
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
    image_processor = SiglipImageProcessorPil(
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
    """The processor saved in a π0 folder, also where ``PI0ImageProcessor`` cannot be loaded because torchvision is missing.

    Reads ``processor_config.json`` (or ``preprocessor_config.json``), makes SigLIP's image processor with the same sizes, means and
    standard deviations, gives it the ``image_seq_length`` that ``PI0Processor`` asks for, and takes the tokenizer from the folder.

    Raises:
        InputError: the folder has no processor configuration.
    """
    from transformers import AutoTokenizer, PI0Processor, SiglipImageProcessorPil

    folder = Path(folder)
    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json") if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} holds no processor_config.json or preprocessor_config.json; save one with save_pretrained")
    settings = json.loads(files[0].read_text(encoding="utf-8"))
    image_settings = settings.get("image_processor") or settings
    keys = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std", "resample", "rescale_factor")
    size = image_settings.get("pad_size") or image_settings["size"]
    image_processor = SiglipImageProcessorPil(size=size, **{key: image_settings[key] for key in keys if key in image_settings})
    image_processor.image_seq_length = image_settings.get("image_seq_length", 256)
    own = ("state_mean", "state_std", "actions_mean", "actions_std", "max_state_dim", "chunk_size")
    return PI0Processor(
        image_processor=image_processor,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        **{key: settings[key] for key in own if key in settings},
    )


def build_model(processor: PI0Processor, board: reach.Board | None = None, seed: int = 0) -> PI0ForConditionalGeneration:
    """An untrained model for ``processor``: 2 SigLIP layers, 3 prefix and 3 expert layers of width 64, 4 heads over 2 key-value heads."""
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
        dit_config=dict(gemma),
        chunk_size=CHUNK,
        max_state_dim=2,
        max_action_dim=2,
        num_inference_steps=DENOISING_STEPS,
    )
    with _seeded(seed):
        return PI0ForConditionalGeneration(config)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's generator seeded for a block, and put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def model_inputs(processor: PI0Processor, scenes: reach.ReachScenes, actions: bool = False) -> dict[str, Tensor]:
    """The tensors of ``scenes`` as ``processor`` makes them: image, prompt and state, and the expert's next steps if asked for."""
    extra = {"actions": scenes.expert(CHUNK)} if actions else {}
    batch = processor(
        images=[[image] for image in scenes.images()], text=scenes.instructions(), state=scenes.gripper, **extra
    )
    return dict(batch)


def fast_inputs(processor: PI0Processor, scenes: reach.ReachScenes) -> dict[str, Tensor]:
    """What :func:`model_inputs` makes with actions, for many scenes at once and without padding (training needs the speed)."""
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
    """The model as a policy for :func:`circuitvision.data.reach.run_episodes`; every call draws new noise from one seeded stream."""
    seeds = np.random.default_rng(seed)

    def act(scenes: reach.ReachScenes) -> Int[np.ndarray, "scene chunk 2"]:
        return to_steps(processor, predict(model, processor, scenes, int(seeds.integers(2**31))))

    return act


def closed_loop(
    model: PI0ForConditionalGeneration, processor: PI0Processor, count: int = 500, seed: int = STREAMS["test"], split: str = "test"
) -> reach.Episodes:
    """``count`` new episodes of at most ``HORIZON`` steps, on layouts of ``split`` only."""
    model.eval()
    return reach.run_episodes(policy(model, processor, seed), reach.sample_starts(count, seed, split), HORIZON)


def imitation_loss(model: PI0ForConditionalGeneration, batch: dict[str, Tensor], draws: int = DRAWS) -> Tensor:
    """The flow-matching loss of ``batch``, over ``draws`` noises and times per scene.

    The prefix does not see noise or time, so it runs once and its keys and values serve every draw: the expert is a tenth of the
    tokens, and the many draws make the loss far less noisy for nearly the same time.
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


def fit(
    model: PI0ForConditionalGeneration, processor: PI0Processor, seed: int, steps: int = STEPS, progress: bool = True
) -> list[float]:
    """Imitate the expert on fresh training scenes; returns the loss of every step.

    AdamW on the flow-matching loss; the rate rises over the first 100 steps and falls linearly to zero over the last half.
    """
    generator = np.random.default_rng([STREAMS["train"], seed])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 100, 2 * (steps - n) / steps))
    losses: list[float] = []
    model.train()
    numbers = range(steps)
    with _seeded(seed):
        for _ in track(numbers, "training reach-pi0") if progress else numbers:
            batch = fast_inputs(processor, reach.sample_scenes(BATCH, generator, "train"))
            loss = imitation_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses
