"""PI0: the prefix reaches the action through keys and values alone, in one evaluation and over the denoising steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from circuitvision.errors import InputError
from tests.conformance.setting import Setting, bare_output, close, disturb, eager, needs_eager, same

KEYS_AND_VALUES = ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k", "hook_k_input", "hook_v_input")


def is_pi0(setting: Setting) -> bool:
    return setting.case.family == "pi0"


def prefix_keys_and_values_reach_the_action(setting: Setting) -> None:
    """Every head and every real position of every K/V site of the prefix moves the velocity, in every layer."""
    if not is_pi0(setting):
        return
    model = setting.model()
    names = [name for name in model.sites("language.blocks.*.**") if name.split(".", 3)[3] in KEYS_AND_VALUES]
    assert len(names) == len(KEYS_AND_VALUES) * model.language.cfg.n_layers
    for padding in (None, "left", "right"):
        inputs = setting.inputs(model, batch=12, padding=padding)
        real = inputs["attention_mask"] == 1
        count = real.shape[1]
        # Each example is edited at a position of its own; two runs meet every position.
        for shift in (0, count - 12):
            chosen = torch.eye(count, dtype=torch.bool)[shift : shift + 12]

            def here(value: Tensor, chosen: Tensor = chosen) -> Tensor:
                return chosen.view(*chosen.shape, *[1] * (value.ndim - 2)).expand_as(value)

            expected = real[chosen]
            for name in names if padding is None else names[:: len(KEYS_AND_VALUES) + 1]:
                with setting.mode():
                    clean = model.run_with_hooks(inputs, [(name, lambda value, hook: None)])
                    out = model.run_with_hooks(inputs, [(name, disturb(where=here))])
                moved = (out - clean).detach().abs().flatten(1).amax(1) > 0
                assert torch.equal(moved, expected), (
                    f"{name} from position {shift}, padding {padding}: {moved.tolist()}"
                )


def edited_keys_equal_an_edited_module(setting: Setting) -> None:
    """Scaling one prefix key or value through the hook is scaling it in the module's weights: same action, same samples."""
    if not is_pi0(setting):
        return
    model = setting.model()
    inputs = setting.inputs(model)
    for letter in ("k", "v"):
        module: Any = setting.copy()
        layer: Any = module.model.vlm.language_model.layers[1].self_attn
        with torch.no_grad():
            getattr(layer, f"{letter}_proj").weight[3] *= 2.5
            expected = bare_output(module, inputs)

            def scaled(value: Tensor, hook: Any) -> Tensor:
                value[..., 3] *= 2.5
                return value

            hooks = [(f"language.blocks.1.attn.hook_{letter}", scaled)]
            close(model.run_with_hooks(inputs, hooks), expected, f"velocity after scaling {letter}")
            sampling = {name: value for name, value in inputs.items() if name != "timestep"}
            with model.hooks(hooks):
                close(
                    model.sample_actions(inputs), module.sample_actions(**sampling), f"actions after scaling {letter}"
                )


def denoising_steps_are_numbered(setting: Setting) -> None:
    """sample_actions gives the bare actions; the prefix runs once, the expert once per step; a recording has a step axis."""
    if not is_pi0(setting):
        return
    model, bare = setting.model(), setting.copy()
    inputs = setting.inputs(bare, padding="right")
    sampling: dict[str, Any] = {name: value for name, value in inputs.items() if name != "timestep"}
    expected: Any = bare.sample_actions(**sampling, num_steps=4)  # type: ignore[operator]
    same(model.sample_actions(inputs, num_steps=4), expected, "sample_actions without hooks")
    steps: dict[str, list[int]] = {}

    def note(value: Tensor, hook: Any) -> None:
        steps.setdefault(hook.name, []).append(hook.step)

    fused = [name for name in model.sites() if not needs_eager(name)]
    with model.hooks([(fused, note)]):
        same(model.sample_actions(inputs, num_steps=4), expected, "sample_actions with hooks")
    for name, seen in steps.items():
        assert seen == ([0, 1, 2, 3] if name.startswith("action") else [0]), f"{name} fired in steps {seen}"
    with eager(bare):
        expected = bare.sample_actions(**sampling, num_steps=4)  # type: ignore[operator]
    with model.record("**") as cache:
        same(model.sample_actions(inputs, num_steps=4), expected, "sample_actions while recording everything")
    assert set(cache) == set(model.sites())
    for name in cache:
        assert cache[name].shape[0] == (4 if name.startswith("action") else 1), f"{name} has no step axis"
    assert (cache["action.hook_input"][0] - cache["action.hook_input"][1]).abs().max() > 1e-3

    def second_only(value: Tensor, hook: Any) -> Tensor | None:
        return disturb()(value, hook) if hook.step == 2 else None

    with model.hooks([("action.blocks.0.hook_resid_post", second_only)]), model.record("action.hook_input") as edited:
        model.sample_actions(inputs, num_steps=4)
    with model.record("action.hook_input") as clean:
        model.sample_actions(inputs, num_steps=4)
    gaps = [float((edited["action.hook_input"][s] - clean["action.hook_input"][s]).abs().max()) for s in range(4)]
    assert gaps[:3] == [0.0] * 3, f"an edit of step 2 changed earlier steps: {gaps}"
    assert gaps[3] > 1e-4, "an edit of step 2 must reach step 3"


def randomness_is_refused(setting: Setting) -> None:
    """Without noise or timestep the model would draw them: a call raises, `inputs` fills them from the seed."""
    if not is_pi0(setting):
        return
    model = setting.model()
    inputs = setting.inputs(model)
    for missing in ("noise", "timestep"):
        partial = {name: value for name, value in inputs.items() if name != missing}
        try:
            model(copy.copy(partial))
        except InputError as error:
            assert missing in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"a run without {missing} must raise")
    base = {name: value for name, value in inputs.items() if name not in ("noise", "timestep")}
    one, two, other = model.inputs(**base), model.inputs(**base), model.inputs(**base, seed=1)
    same(one["noise"], two["noise"], "noise of one seed")
    assert not torch.equal(one["noise"], other["noise"])
    assert model(one).isfinite().all()
