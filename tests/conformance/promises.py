"""The table's columns: a short name for every check, in the order of the promises."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.conformance import checks_actions, checks_maths, checks_model, checks_sites, checks_tokens
from tests.conformance.cases import in_tables
from tests.conformance.setting import Setting
from tests.zoo import Case

Check = Callable[[Setting], None]

PROMISES: dict[str, Check] = {
    "1 edits reach": checks_sites.edits_reach_the_output_unless_declared_dead,
    "1 dead warn": checks_sites.editing_a_dead_site_warns,
    "2 equations": checks_maths.sites_follow_from_those_before,
    "2 edits land": checks_maths.edits_land_where_they_were_made,
    "2 stream sum": checks_maths.inputs_and_writes_add_up_to_the_stream,
    "2 resid_mid": checks_maths.resid_mid_reaches_norm_and_skip_path,
    "3 unchanged": checks_sites.returning_the_tensor_changes_nothing,
    "3 own tensor": checks_sites.hooks_own_their_tensor,
    "4 gradients": checks_maths.gradients_match_finite_differences,
    "4 grad mode": checks_maths.values_do_not_depend_on_grad_mode,
    "4 backward": checks_maths.backward_hooks_see_the_gradient,
    "5 fires once": checks_sites.sites_fire_once_per_pass,
    "6 site list": checks_sites.exactly_the_expected_sites_exist,
    "bare output": checks_model.wrapped_output_is_the_bare_output,
    "first run": checks_model.first_run_equals_later_runs,
    "unwrap": checks_model.unwrapping_leaves_the_module_as_it_was,
    "weights": checks_model.weights_are_the_modules_own,
    "read-out": checks_model.readout_of_the_last_layer_is_the_output,
    "generate": checks_model.generation_gives_the_same_tokens,
    "kv reach": checks_model.edits_of_keys_and_values_reach_the_next_step,
    "token kinds": checks_tokens.positions_are_what_the_map_says,
    "patch values": checks_tokens.patch_positions_carry_their_patch,
    "pixel boxes": checks_tokens.a_box_holds_the_pixels_of_its_patch,
    "tiles": checks_tokens.tiles_cover_the_image,
    "padding": checks_tokens.edits_of_padding_change_no_real_position,
    "kv to action": checks_actions.prefix_keys_and_values_reach_the_action,
    "kv as weights": checks_actions.edited_keys_equal_an_edited_module,
    "denoising": checks_actions.denoising_steps_are_numbered,
    "noise": checks_actions.randomness_is_refused,
}

EXACT = ("4 gradients",)
"""Checks that compare with finite differences and need float64."""


def applies(promise: str, case: Case) -> bool:
    """Whether a promise says anything about a case."""
    pi0, vlm = case.family == "pi0", "language" in case.towers
    if promise in ("kv to action", "kv as weights", "denoising", "noise"):
        return pi0
    if promise == "kv reach":
        return "generates" in case.tags
    if promise == "padding":
        return vlm and not pi0 and "padding_left" in case.tags
    if promise == "2 resid_mid":
        # Parallel branches read what enters the block: there is no stream between them.
        return not case.name.startswith("synthetic-parallel")
    if promise == "patch values":
        return vlm and not case.tags & {"resampled", "cross_attention"}
    if promise == "tiles":
        return "tiles" in case.tags
    if promise == "pixel boxes":
        return "tiles" not in case.tags and "packed_patches" not in case.tags
    return True


def hold(promise: str, setting: Setting) -> None:
    """Run a check with the case's family in the tables."""
    with in_tables(setting.case):
        PROMISES[promise](setting)


def setting_for(promise: str, case: Case) -> Setting:
    """The setting of the default suite: float32, no grad, after a forward, batch 3; float64 with grad for gradients."""
    return Setting(case, torch.float64, grad=True) if promise in EXACT else Setting(case)
