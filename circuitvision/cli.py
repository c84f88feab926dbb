"""The ``circuitvision`` command: arguments in, one call of the library, a short text out.

Mistakes that the library explains end with that explanation on standard error and exit code 2, Ctrl-C with code 130;
anything else is a bug and shows its trace. What the command switches (progress bars, transformers' notices) it gives
back when it ends, so that it can be called from Python as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence

from circuitvision.errors import CircuitVisionError
from circuitvision.organisms.registry import DEFAULT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0; 2 for a mistake in what was asked, 130 after Ctrl-C)."""
    options = _parser().parse_args(arguments)
    options.typed = ["circuitvision", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        with _verbosity(options.quiet), _printable():
            return options.run(options)
    except CircuitVisionError as error:
        print(f"circuitvision: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("circuitvision: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough (head, less); Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextlib.contextmanager
def _verbosity(quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    from circuitvision.progress import verbosity

    with verbosity("quiet"):
        yield


@contextlib.contextmanager
def _printable() -> Iterator[None]:
    """A terminal that lacks a character gets a question mark, not a traceback."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def _parser() -> argparse.ArgumentParser:
    from circuitvision import __version__

    parser = argparse.ArgumentParser(
        prog="circuitvision", description="Mechanistic circuit analysis of vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"circuitvision {__version__}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quickstart(commands.add_parser("quickstart", help="from two images to a circuit, with a report to look at"))
    _add_sites(commands.add_parser("sites", help="list the sites of a model"))
    _add_organisms(commands.add_parser("organisms", help="the small trained models that come with circuitvision"))
    _add_benchmark(commands.add_parser("benchmark", help="how well methods find circuits that are known"))
    return parser


def _count(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Patch every attention head that the images reach between two images, and write circuit.graphml, circuit.json, heads.html, lens.html and "
        "report.html. Without a case, an organism draws pairs of its own, explains the first, and checks its heads on the others. A model that "
        "answers in words needs a prompt, an answer and a foil; a classifier the images alone; a dual encoder two captions as answer and foil."
    )
    parser.add_argument(
        "--model", default=DEFAULT, metavar="NAME_OR_FOLDER", help="organism, checkpoint name or folder (%(default)s)"
    )
    parser.add_argument("--clean", metavar="IMAGE", help="image for which the answer is right")
    parser.add_argument("--corrupt", metavar="IMAGE", help="image of the same size for which the foil is right")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="of models that answer in words: the question, with the image token"
    )
    parser.add_argument("--answer", metavar="TEXT", help="a one-piece word, a class (name or number), or a caption")
    parser.add_argument("--foil", metavar="TEXT", help="likewise, what is right for the corrupt image")
    parser.add_argument(
        "--out", default="circuitvision-quickstart", metavar="DIR", help="folder for the files (%(default)s)"
    )
    parser.add_argument(
        "--top-k", type=_positive, default=4, metavar="N", help="heads of each tower in the graph (%(default)s)"
    )
    parser.add_argument(
        "--circuit", action="store_true", help="find a circuit of edges, too, and test what it claims (minutes)"
    )
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="which pair is drawn (%(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, …: the checkpoint's own by default")
    parser.add_argument("--device", help="cpu, cuda, …")
    parser.set_defaults(run=_quickstart)


def _add_sites(parser: argparse.ArgumentParser) -> None:
    parser.usage = "circuitvision sites [-h] [MODEL] [GLOB]"
    parser.add_argument(
        "what",
        nargs="*",
        metavar="MODEL GLOB",
        help=f"organism, checkpoint name or folder ({DEFAULT}); sites to list, for example 'vision.blocks.*.attn.*' (all)",
    )
    parser.add_argument("--model", metavar="MODEL", help="the model, where it does not come first")
    parser.set_defaults(run=_sites)


def _add_organisms(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="their names and tasks").set_defaults(run=_organisms_list)
    card = actions.add_parser("card", help="what one was trained on, and how well it does")
    card.add_argument("name")
    card.set_defaults(run=_organisms_card)
    train = actions.add_parser("train", help="train one from scratch")
    train.add_argument("name")
    train.add_argument("--seed", type=_count, default=0, metavar="N")
    train.add_argument("--steps", type=_positive, metavar="N", help="a shorter run, for trying things out")
    train.add_argument("--out", metavar="DIR", help="folder for the weights (NAME-seedN)")
    train.set_defaults(run=_organisms_train)


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    circuits = what.add_parser("circuits", help="every method on every hand-built network, and on organisms")
    circuits.add_argument("--networks", nargs="*", metavar="NAME", help="hand-built networks (all)")
    circuits.add_argument("--organisms", nargs="*", metavar="NAME", help="trained models (scenes-vit, shapes-llava)")
    circuits.add_argument("--methods", nargs="*", metavar="NAME", help="methods (all)")
    circuits.add_argument(
        "--pairs", type=_positive, default=32, metavar="N", help="pairs of each organism (%(default)s)"
    )
    circuits.add_argument("--out", default="circuits-benchmark.md", metavar="FILE", help="the table (%(default)s)")
    circuits.set_defaults(run=_benchmark_circuits)


def _benchmark_circuits(options: argparse.Namespace) -> int:
    from circuitvision import provenance
    from circuitvision.studies import circuit_benchmark

    given = {} if options.organisms is None else {"organisms": options.organisms}
    with _silent_transformers(), provenance.command(options.typed):
        found = circuit_benchmark(options.networks, options.methods, pairs=options.pairs, **given)
    print(found.to_frame().to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"\nWrote {found.write(options.out)}")
    return 0


def _quickstart(options: argparse.Namespace) -> int:
    from circuitvision import provenance
    from circuitvision.quickstart import quickstart

    loading = {name: getattr(options, name) for name in ("dtype", "device") if getattr(options, name) is not None}
    with _silent_transformers(), provenance.command(options.typed):
        found = quickstart(
            options.model,
            clean=options.clean,
            corrupt=options.corrupt,
            prompt=options.prompt,
            answer=options.answer,
            foil=options.foil,
            out=options.out,
            top_k=options.top_k,
            circuit=options.circuit,
            seed=options.seed,
            **loading,
        )
    case, (answer, foil) = found.case, found.case.names
    if case.prompt:
        print(f"{case.prompt}\n")
    for name, reading in found.readings.items():
        shares = f"{answer} {reading.answer:.1%}, {foil} {reading.foil:.1%}"
        print(f"  {name:<10}{shares:<28}  {reading}")
    for caution in found.cautions():
        print(f"\nCaution: {caution}")
    print(f"\n{found.finding(cautions=False)}\n")
    print(f"  {'head':<12}{'tower':<16}{'share moved':>12}")
    for name, where, share in found.table():
        print(f"  {name:<12}{where:<16}{share:>12}")
    if found.check is not None:
        print(f"\n{found.check.summary()} {found.findings()['carries']}")
    if found.edges is not None:
        print("\nA circuit of edges, tested on pairs that its search did not see:")
        for question, said in found.edges.said():
            print(f"  {question:<20}{said}")
    print(f"\nWrote in {found.seconds:.0f} s:")
    for path in found.files:
        print(f"  {path}")
    return 0


def _sites(options: argparse.Namespace) -> int:
    from circuitvision.quickstart import load_model

    name, glob = _model_and_glob(options.what, options.model)
    with _silent_transformers():
        model = load_model(name)
    for site in model.sites(glob):
        print(site + ("   (cannot reach the output)" if model.is_dead(site) else ""))
    return 0


def _model_and_glob(what: Sequence[str], model: str | None) -> tuple[str, str]:
    """The model comes first, and either may be left out: a wildcard, or a name of a site, is no model."""
    from circuitvision.errors import InputError
    from circuitvision.model.sites import is_glob

    given = [model, *what] if model is not None else list(what)
    if given and model is None and (is_glob(given[0]) or ".hook_" in given[0]):
        given = [DEFAULT, *given]
    if len(given) > 2:
        raise InputError(
            f"One model and one glob are wanted, and {' '.join(given)} are more; quote a glob: 'vision.**'."
        )
    name, glob = [*given, *(DEFAULT, "**")[len(given) :]]
    return name, glob


def _organisms_list(options: argparse.Namespace) -> int:
    from circuitvision.organisms.registry import TABLE

    for name, organism in TABLE.items():
        print(f"{name:<14}{organism.model_class:<32}{organism.task}")
    return 0


def _organisms_card(options: argparse.Namespace) -> int:
    from circuitvision import organisms

    print(json.dumps(organisms.card(options.name), indent=2, ensure_ascii=False))
    return 0


def _organisms_train(options: argparse.Namespace) -> int:
    from circuitvision import organisms

    with _silent_transformers():
        scores = organisms.train(
            options.name, seed=options.seed, out=options.out, steps=options.steps, progress=not options.quiet
        )
    print(json.dumps(scores, indent=2, ensure_ascii=False))
    return 0


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Keep transformers' own notices out of the command's output; its errors stay."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
