"""Run functions: what one run of a model is where it is more than one forward pass.

A run function is called ``(model, inputs, edits)`` and returns what a metric reads, first axis ``example``. :func:`act` denoises actions
(``functools.partial(act, num_steps=5)`` in fewer steps), :func:`generated` generates text; there may be others of one's own.
``model.sweep(…, run=act)`` and the recipes built on it take one; None is a forward pass, ``model.run``.

A run function makes several *passes* of a tower: denoising steps of an action tower, or the prompt and every later token. Edits name them by
``steps``; values that one run lends to another belong to the pass of the same number (:func:`per_pass`).

Not covered: what a tower that says tokens computes behind the prompt of another run, since the tokens differ from run to run: of its passes the
prompt's alone is lent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.digests import NamedFunction
from circuitvision.errors import HookError, InputError, UnsupportedModelError
from circuitvision.links import marked
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.values import Steps, TensorRef
from circuitvision.model.generation import setting
from circuitvision.model.registrations import Recorder, Registration
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.edits.windows import Mode

RunFunction = Callable[..., Tensor]
"""``(model, inputs, edits)`` → ``[example …]``."""


def act(
    model: Any, inputs: Mapping[str, Any], edits: Edit | Sequence[Edit] = (), **options: Any
) -> Float[Tensor, "example step dim"]:
    """The actions of a policy under edits.

    PI0: the denoised chunk from ``inputs["noise"]``, normalised as the model is trained (``num_steps=`` sets the denoising steps). OpenVLA: the
    greedy action as a chunk of one step, in the units of a data set (``unnorm_key=``).

    Raises:
        UnsupportedModelError: a model that does not act.
        InputError: edits that do not fit, before anything runs.
    """
    refuse_still(model)
    own = model.family.act
    with torch.no_grad():
        if own is None:
            return marked(model.sample_actions(inputs, edits=edits, **options), "none")
        return marked(own(model, inputs, edits, **options), "none")


def acts(model: Any) -> bool:
    """Whether a model acts."""
    return model.family.act is not None or hasattr(model.module, "sample_actions")


def refuse_still(model: Any) -> None:
    """Raise UnsupportedModelError for a model that does not act."""
    if not acts(model):
        raise UnsupportedModelError(
            f"A {model.family.name} model does not act: give a policy, such as reach-pi0 (cv.organisms.load) or an OpenVLA."
        )


def checked_run(run: Any) -> RunFunction | None:
    """A run function, or None; raises InputError for anything else."""
    if run is not None and not callable(run):
        raise InputError(
            f"run={run!r:.80} is no function (model, inputs, edits) such as circuitvision.steering.act; leave it out for one forward pass."
        )
    found: RunFunction | None = run
    return found


def described_run(run: RunFunction | None) -> dict[str, Any]:
    """What a provenance says of what one run is."""
    return {} if run is None else {"run": NamedFunction.of(run).name}


@dataclass(frozen=True)
class Generated:
    """See :func:`generated`."""

    max_new_tokens: int

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], edits: Edit | Sequence[Edit] = ()
    ) -> Float[Tensor, "example new vocab"]:
        """The logits from which every new token is taken."""
        with torch.no_grad():
            out = model.generate(
                inputs,
                edits=edits,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.stack(list(out.logits), 1)
        ids = out.sequences[:, -logits.shape[1] :]
        ends = torch.as_tensor(setting(model.module, {}, "eos_token_id") or [], device=ids.device).reshape(-1)
        ended = torch.isin(ids, ends).int().cumsum(1).roll(1, 1).bool()
        ended[:, 0] = False
        whole = logits.new_full((len(ids), self.max_new_tokens, logits.shape[-1]), torch.nan)
        whole[:, : logits.shape[1]] = logits.masked_fill(ended[..., None], torch.nan)
        return whole


def generated(max_new_tokens: int) -> Generated:
    """A run function that lets the model generate greedily with its cache, and returns the logits of every new token, ``[example new vocab]``.

    New tokens are counted from 0, the one that the prompt's last position says; metrics read one by its number (``logit_diff(…, position=2)``).
    Behind the end of a text there is no number (NaN). Of edits ``steps="prefill"`` is the prompt, ``"decode"`` what is said: the first new token is
    read, and the second said, in step 1.

    Raises:
        InputError: fewer than one token.
        UnsupportedModelError: when called: a model that does not generate text.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens!r}: give how many tokens are generated, from 1.")
    return Generated(max_new_tokens)


def passes_of(model: Any, run: RunFunction) -> int | None:
    """How often the tower that runs several times does so in a run function, where it is one of this module; else None."""
    if isinstance(run, Generated):
        return run.max_new_tokens
    whole, keywords = getattr(run, "func", run), getattr(run, "keywords", {})
    if whole is act and model.family.act is None:
        return int(keywords.get("num_steps") or model.config.num_inference_steps)
    return None


def mode_of(model: Any) -> Mode:
    """The kind of run in which most edits of a model have a meaning: what its run functions may do, and how often is not known."""
    if model.family.tower_that_runs("per_denoising_step"):
        return "act"
    return "generate" if model.family.tower_that_runs("per_token") else "run"


def values_of_passes(
    model: Any, run: RunFunction, inputs: Mapping[str, Any], sites: Sequence[str]
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The output of an unedited run, and the detached values of sites in each of its passes.

    Raises:
        HookError: a site that the run never reached.
        InputError: runs that lend no values.
    """
    if not sites:
        return run(model, inputs, []), {}
    if not getattr(run, "lends", True):
        raise InputError(
            f"Runs of {NamedFunction.of(run).__name__} see different things after their first step, so that they lend each other no values: patch "
            "one run of the policy (run=act), or measure edits that take no values from another run."
        )
    recorder, names = Recorder(), frozenset(sites)
    with model.engine.registered(Registration(recorder=recorder, recorded=names, exact=names)):
        output = run(model, inputs, [])
    missing = [name for name in sites if name not in recorder.values]
    if missing:
        raise HookError(f"The run never reached {missing[0]}, so it has no value there.")
    growing = model.family.tower_that_runs("per_token")
    return output, {
        name: recorder.values[name][: 1 if SiteName.parse(name).tower == growing else None] for name in sites
    }


def per_pass(edit: Edit, values: Mapping[str, Sequence[Tensor]]) -> list[Edit]:
    """One edit for each site and pass in which an edit with a source acts: there it takes the value that another run had in the same pass.

    ``values`` are those of :func:`values_of_passes`, for every site of the edit.
    """
    return [
        dataclasses.replace(edit, site=site, source=TensorRef.of(value), steps=Steps.of(number))  # type: ignore[call-arg]
        for site, passes in values.items()
        for number, value in enumerate(passes)
        if edit.steps.acts(number)
    ]
