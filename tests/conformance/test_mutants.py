"""The checks can fail: each mutant breaks the mechanism in one way that looks plausible, and a named promise must turn red."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitvision import HookedModel
from circuitvision.model import attention, block_points, branches, cache, head_forward, hooks, points, torch_hooks
from circuitvision.model.branches import AttentionBranch
from circuitvision.model.weights import linear_weight
from tests.conformance import setting as settings
from tests.conformance.cases import EVERY
from tests.conformance.promises import hold, setting_for

Mutate = Callable[[pytest.MonkeyPatch], None]


def swap_heads(patch: pytest.MonkeyPatch) -> None:
    """Heads are read, and written back, in reverse."""
    split, merge = points.split_heads, points.merge_heads
    patch.setattr(points, "split_heads", lambda v, n: split(v, n) if n is None else split(v, n).flip(-2))
    patch.setattr(points, "merge_heads", lambda v, n: merge(v, n) if n is None else merge(v.flip(-2), n))


def ignore_edits(patch: pytest.MonkeyPatch) -> None:
    """What a hook returns is thrown away."""
    run = hooks.run_hook

    def ignoring(hook: Any, value: Tensor, where: Any, tracked: bool) -> tuple[Tensor, bool]:
        run(hook, value, where, tracked)
        return value, tracked

    patch.setattr(hooks, "run_hook", ignoring)


def drop_position_zero(patch: pytest.MonkeyPatch) -> None:
    """Edits of position 0 are lost."""
    run = hooks.run_hook

    def dropping(hook: Any, value: Tensor, where: Any, tracked: bool) -> tuple[Tensor, bool]:
        returned, changed = run(hook, value, where, tracked)
        if changed and returned.ndim > 2:
            axis = settings.position_axis(where.name)
            returned = torch.cat([value.narrow(axis, 0, 1), returned.narrow(axis, 1, returned.shape[axis] - 1)], axis)
        return returned, changed

    patch.setattr(hooks, "run_hook", dropping)


def replace_the_norm_input_only(patch: pytest.MonkeyPatch) -> None:
    """resid_mid is replaced at the norm, not in the tensor that the skip path holds."""

    def apply(self: Any, call: Any, fire: Any) -> None:
        value, changed = fire(call.input())
        if changed:
            call.set_input(value)

    patch.setattr(points.SharedInput, "apply", apply)


def edit_a_copy_of_the_keys(patch: pytest.MonkeyPatch) -> None:
    """Rotated keys are edited for this attention call, not in the cache."""

    def rotated(query: Tensor, key: Tensor, stages: Any) -> tuple[Tensor, Tensor]:
        if "hook_rot_q" in stages:
            query = stages["hook_rot_q"](query.transpose(1, 2))[0].transpose(1, 2)
        if "hook_rot_k" in stages:
            before, own = key[:, :, : -query.shape[2]], key[:, :, -query.shape[2] :]
            key = torch.cat([before, stages["hook_rot_k"](own.transpose(1, 2))[0].transpose(1, 2)], 2)
        return query, key

    patch.setattr(attention, "_rotated", rotated)


def _appended(table: Any, hook: Any, with_kwargs: dict[int, bool]) -> Any:
    key = torch_hooks.next_key()
    table[key], with_kwargs[key] = hook, True
    return table, with_kwargs, key


def append_hooks(patch: pytest.MonkeyPatch) -> None:
    """Handles come after those of transformers, which has recorded the hidden state by then."""
    patch.setattr(hooks, "placed", _appended)


def rebuild_everywhere(patch: pytest.MonkeyPatch) -> None:
    """Looking at a derived site rounds the output differently."""
    patch.setattr(points, "rebuilt_where", lambda changed, actual, rebuilt: rebuilt)


def double_the_gradient(patch: pytest.MonkeyPatch) -> None:
    """The backward pass of a derived site counts its path twice."""
    right = points._Substitute.backward

    def twice(ctx: Any, *grads: Tensor) -> Any:
        return None, 2 * right(ctx, *grads)[1]

    patch.setattr(points._Substitute, "backward", staticmethod(twice))


def reverse_the_heads_of_results(patch: pytest.MonkeyPatch) -> None:
    """Head results are derived with the heads of W_O in reverse."""
    right = AttentionBranch.head_results
    patch.setattr(AttentionBranch, "head_results", lambda branch, z: right(branch, z).flip(-2))
    patch.setattr(block_points.HeadResult, "apply", _reversed_results)


def _reversed_results(self: Any, call: Any, fire: Any) -> None:
    z = points.split_heads(call.input(), self.n_heads)
    weight, _ = linear_weight(call.module, z.dtype, z.device)
    w_o = weight.reshape(self.n_heads, -1, weight.shape[-1]).flip(0)
    fire(torch.einsum("...hd,hdm->...hm", z, w_o))


def forget_in_place_changes(patch: pytest.MonkeyPatch) -> None:
    """A hook is handed the model's own tensor and may scribble over it."""

    def lenient(hook: Any, value: Tensor, where: Any, tracked: bool) -> tuple[Tensor, bool]:
        returned = hook(value, where)
        return (value, True) if returned is None else (returned, True)

    patch.setattr(hooks, "run_hook", lenient)


def never_count(patch: pytest.MonkeyPatch) -> None:
    """Nobody checks how often a site fired."""
    patch.setattr(hooks.HookEngine, "_check_fired", lambda self, *given: None)


def normalise_twice(patch: pytest.MonkeyPatch) -> None:
    """A read-out that applies the final norm to what it has normalised already."""
    right = head_forward.HeadForward._norm
    patch.setattr(head_forward.HeadForward, "_norm", lambda self, resid, ref: right(self, right(self, resid, ref), ref))


def take_groups_for_plain(patch: pytest.MonkeyPatch) -> None:
    """The columns of queries, keys and values that are fused by groups are taken as if all queries came first."""
    right = branches.qkv_columns
    patch.setattr(branches, "qkv_columns", lambda fused, *given: right(replace(fused, order="qkv"), *given))


def forget_what_stands_between_blocks(patch: pytest.MonkeyPatch) -> None:
    """What the tower's code writes between blocks is no part of the sum."""
    patch.setattr(cache.ActivationCache, "decompose_resid", _without_writers(cache.ActivationCache.decompose_resid))


def _without_writers(right: Any) -> Any:
    def decompose(self: Any, *given: Any, **options: Any) -> Any:
        stack, labels = right(self, *given, **options, return_labels=True)
        return stack[[number for number, label in enumerate(labels) if "deepstack" not in label]]

    return decompose


def skip_norms_of_sums(patch: pytest.MonkeyPatch) -> None:
    """Parts of a sum are taken as they are, whatever norm the sum passes."""
    patch.setattr(cache.ActivationCache, "_through_sum_norm", lambda self, owner, module, name, parts: (parts, []))


def forget_gates(patch: pytest.MonkeyPatch) -> None:
    """What is added is the output of the last module, whatever the block multiplies it with."""
    patch.setattr(branches.Branch, "is_gated", property(lambda self: False))


def call_cross_attention_dead(patch: pytest.MonkeyPatch) -> None:
    """Keys and values that another tower's stream is made into are said to reach nothing."""
    right = HookedModel.is_dead
    patch.setattr(
        HookedModel,
        "is_dead",
        lambda self, site, *given: site.endswith("cross_attn.hook_k") or right(self, site, *given),
    )


MUTANTS: list[tuple[Mutate, str, str]] = [
    (swap_heads, "vit", "2 equations"),
    (swap_heads, "llava-clip-llama", "2 equations"),
    (ignore_edits, "vit", "1 edits reach"),
    (drop_position_zero, "vit", "1 edits reach"),
    (drop_position_zero, "llava-clip-llama", "2 edits land"),
    (replace_the_norm_input_only, "vit", "2 resid_mid"),
    (replace_the_norm_input_only, "clip", "2 edits land"),
    (edit_a_copy_of_the_keys, "pi0", "kv to action"),
    (edit_a_copy_of_the_keys, "llava-clip-llama", "kv reach"),
    (append_hooks, "llava-clip-llama", "1 edits reach"),
    (rebuild_everywhere, "vit", "3 unchanged"),
    (double_the_gradient, "vit", "4 gradients"),
    (reverse_the_heads_of_results, "dinov2", "2 equations"),
    (forget_in_place_changes, "vit", "3 own tensor"),
    (never_count, "vit", "5 fires once"),
    (normalise_twice, "vit", "read-out"),
    (swap_heads, "synthetic-cross", "2 equations"),
    (take_groups_for_plain, "synthetic-fused-groups", "2 equations"),
    (take_groups_for_plain, "synthetic-parallel-shared", "weights"),
    (forget_what_stands_between_blocks, "synthetic-deepstack", "2 stream sum"),
    (skip_norms_of_sums, "synthetic-post-norm", "2 stream sum"),
    (forget_gates, "synthetic-tanh-gates", "2 edits land"),
    (drop_position_zero, "synthetic-third-writer-gated", "2 edits land"),
    (replace_the_norm_input_only, "synthetic-third-writer-gated", "2 resid_mid"),
    (call_cross_attention_dead, "synthetic-cross", "1 edits reach"),
    (never_count, "synthetic-packing", "5 fires once"),
]


@pytest.mark.parametrize(
    ("mutate", "name", "promise"), MUTANTS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_mutant_turns_its_promise_red(
    mutate: Mutate, name: str, promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.warm_model.cache_clear()
    mutate(monkeypatch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Exception):
                hold(promise, setting_for(promise, EVERY[name]))
    finally:
        settings.warm_model.cache_clear()
