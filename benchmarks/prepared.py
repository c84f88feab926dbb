"""What a training step costs under ``model.prepared``, beside the layers behind its start and beside the whole model.

The step of distributed alignment search: a subspace interchange at the input of layer ``l`` (an orthonormal basis ``[d_model, k]`` by QR, the
source's values inside its span), the loss of the answers at the last position, a backward pass to the basis, a step of Adam. The model is frozen.
The same step is done four ways, all of which must give the same gradient before anything is timed:

* ``plain blocks``: the model's own blocks from ``l`` on, its final norm and head, called by hand on recorded hidden states: what no engine can avoid;
* ``prepared``: ``run([edits.project(…)])`` inside ``model.prepared(inputs, start=("language", l))``;
* ``prepared, last position``: the same, the edit at the last position alone, where a suffix of the positions runs;
* ``whole model``: ``model.run(inputs, [edits.project(…)])``.

Ratios are to ``plain blocks`` of the same round, and of the minima over rounds, which other processes disturb least. The recording, one forward
without a graph, is timed apart: it is paid once for each batch. On small models (``--quick``) a step is mostly Python, and ratios say little.

    python benchmarks/prepared.py              # a language model of 12 layers and a LLaVA of 12 + 12, about ten minutes on one CPU core
    python benchmarks/prepared.py --device cuda
    python benchmarks/prepared.py --quick      # small models, seconds
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import AGAIN, peak_bytes, samples_in_rounds, spread, surroundings
from shapes import llava
from torch import Tensor

import circuitvision as cv
from circuitvision import edits

RESULTS = Path(__file__).parent / "results"
RANK = 8
AIM = 1.15
"""What a prepared step may cost, as a multiple of the layers behind its start."""
PLAIN, PREPARED, LAST, WHOLE = "plain blocks", "prepared", "prepared, last position", "whole model"


def models(quick: bool, device: torch.device) -> dict[str, tuple[str, cv.HookedModel, dict[str, Tensor]]]:
    """Name -> title, model and inputs: a Llama of 12 layers that reads words alone, and a LLaVA with as deep a vision tower."""
    width, rows, words = (64, 2, 16) if quick else (512, 4, 64)
    text = {"hidden_size": width, "num_hidden_layers": 12, "num_attention_heads": width // 32}
    text["intermediate_size"] = width * 43 // 16 // 2 * 2
    vision = {"hidden_size": width, "num_attention_heads": width // 32, "intermediate_size": 4 * width}
    size = 28 if quick else 112
    found = {}
    for name, title, layers in (("language", "Llama", 1), ("llava", "LLaVA", 12)):
        tower = {**vision, "num_hidden_layers": layers}
        shape = llava(name, title, size, 14, words, tower, text)
        inputs = {key: value.repeat(rows, *[1] * (value.ndim - 1)) for key, value in shape.inputs.items()}
        if name == "language":
            ids = torch.randint(3, 900, (rows, words), generator=torch.Generator().manual_seed(1))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model = cv.HookedModel(shape.module.to(device).requires_grad_(False))
        inputs = {key: value.to(device) for key, value in inputs.items()}
        length = inputs["input_ids"].shape[1]
        found[name] = (f"{title} of 12 layers of width {width}, {rows} × {length} positions", model, inputs)
    return found


class Steps:
    """The step at one layer, in every way it can be done; each trains a basis of its own."""

    def __init__(
        self, model: cv.HookedModel, inputs: dict[str, Tensor], layer: int, stack: contextlib.ExitStack
    ) -> None:
        self.model, self.inputs, self.layer = model, inputs, layer
        self.site = f"language.blocks.{layer}.hook_resid_pre"
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, self.site)
        self.stream: Tensor = cache[self.site]
        generator = torch.Generator().manual_seed(layer)
        noise = torch.randn(self.stream.shape, generator=generator).to(self.stream)
        self.source = self.stream + self.stream.std() * noise
        self.answers = torch.randint(3, 900, (len(self.stream),), generator=generator).to(self.stream.device)
        self.start = torch.randn(self.stream.shape[-1], RANK, generator=generator).to(self.stream)
        self.keywords = self._keywords()
        self.prepared = stack.enter_context(model.prepared(inputs, start=("language", layer)))

    def _keywords(self) -> dict[str, Any]:
        """What the model calls its blocks with."""
        seen: dict[str, Any] = {}
        block = self.model.language.blocks[self.layer].module

        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update({name: value for name, value in kwargs.items() if name != "hidden_states"})

        handle = block.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            self.model(self.inputs)
        handle.remove()
        return {**seen, "past_key_values": None}

    def _by_hand(self, basis: Tensor) -> Tensor:
        columns = torch.linalg.qr(basis.double())[0].to(basis)
        stream = self.stream + (self.source - self.stream) @ columns @ columns.T
        for block in self.model.language.blocks[self.layer :]:
            out = block.module(stream, **self.keywords)
            stream = out[0] if isinstance(out, tuple) else out
        return self.model.module.lm_head(self.model.module.model.language_model.norm(stream))

    def step(self, way: str) -> Callable[[], Tensor]:
        """A function that takes one step and returns the gradient."""
        basis = self.start.clone().requires_grad_()
        optimizer = torch.optim.Adam([basis], lr=1e-4)
        edit = edits.project(self.site, basis, self.source, positions=-1 if way == LAST else None)
        runs: dict[str, Callable[[], Tensor]] = {
            PLAIN: lambda: self._by_hand(basis),
            PREPARED: lambda: self.prepared([edit]),
            LAST: lambda: self.prepared([edit]),
            WHOLE: lambda: self.model.run(self.inputs, [edit]),
        }
        run = runs[way]

        def take() -> Tensor:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(run()[:, -1], self.answers).backward()
            assert basis.grad is not None
            gradient = basis.grad.clone()
            optimizer.step()
            return gradient

        return take

    def check(self) -> None:
        """The same gradient whichever way the step is done, and a suffix of the positions where one is enough."""
        wanted = self.step(PLAIN)()
        for way in (PREPARED, WHOLE):
            torch.testing.assert_close(self.step(way)(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        self.step(LAST)()
        assert "positions" in self.prepared.plan, self.prepared.plan


def measured(
    model: cv.HookedModel, inputs: dict[str, Tensor], layer: int, device: torch.device, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """One row for each way, at one layer."""
    with contextlib.ExitStack() as stack:
        steps = Steps(model, inputs, layer, stack)
        steps.check()
        ways = {way: steps.step(way) for way in (PLAIN, PREPARED, LAST, WHOLE)}

        def record() -> None:
            with model.prepared(inputs, start=("language", layer)):
                pass

        ways["recording, once"] = record  # type: ignore[assignment]
        for run in ways.values():
            run()
        samples = samples_in_rounds(ways, PLAIN, device, seconds, rounds)
        rows = []
        for way, taken in samples.items():
            ratios = [mine[0] / theirs[0] for mine, theirs in zip(taken, samples[PLAIN], strict=True)]
            middle, low, high = spread(ratios)
            least = min(one[0] for one in taken) / min(one[0] for one in samples[PLAIN])
            whole = min(one[0] for one in taken) / min(one[0] for one in samples[WHOLE])
            row = {"layer": layer, "way": way, "ratio": middle, "ratio_low": low, "ratio_high": high}
            row |= {"of_minima": least, "of_the_whole": whole, "rounds": len(taken)}
            row["peak_mib"] = peak_bytes(ways[PLAIN if way == AGAIN else way], device) / 2**20
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| layer | step | ÷ plain blocks: median (quartiles) | ÷ plain blocks: minima | ÷ whole model: minima | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        quartiles = f"{row['ratio']:.3f} ({row['ratio_low']:.3f}–{row['ratio_high']:.3f})"
        numbers = f"{row['of_minima']:.3f} | {row['of_the_whole']:.3f} | {row['peak_mib']:.1f}"
        lines.append(f"| {row['layer']} | {row['way']} | {quartiles} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=15, help="time for the timed rounds of one layer")
    parser.add_argument("--rounds", type=int, default=5, help="the fewest rounds of one layer")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9, 11])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cv.set_verbosity("quiet")
    parts, found = [], {}
    for name, (title, model, inputs) in models(arguments.quick, device).items():
        rows = []
        for layer in arguments.layers:
            rows += measured(model, inputs, layer, device, arguments.seconds, arguments.rounds)
        worst = max(row["of_minima"] for row in rows if row["way"] == PREPARED)
        aim = f"aim: a prepared step at most {AIM} × the layers behind its start; the worst is {worst:.3f} (minima)"
        parts.append(f"## {title}\n\n{table(rows)}\n\n{aim}")
        found[name] = {"title": title, "rows": rows, "worst": worst}
        print(parts[-1], "\n")
    arguments.results.mkdir(exist_ok=True)
    where = surroundings(device)
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    stem = arguments.results / f"prepared-{device.type}"
    head = f"# A training step behind a layer\n\n{where['device_name']}, {where['threads']} threads; {versions}."
    stem.with_suffix(".md").write_text("\n\n".join([head, *parts]) + "\n")
    stem.with_suffix(".json").write_text(json.dumps({"models": found, **where}, indent=1) + "\n")


if __name__ == "__main__":
    main()
