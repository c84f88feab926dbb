"""Which sites each case must offer, written down from what the architectures are, without asking the library."""

from __future__ import annotations

from tests.zoo import SHAPES, Case

BLOCK = [
    "hook_resid_pre",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]
POOL = ["hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z"]
NO_READOUT = ("deit-teacher",)
"""Two heads read two positions: there is no single tensor that a head reads."""


def expected_sites(case: Case) -> set[str]:
    """Every site of the case, by name."""
    names: set[str] = set()
    for tower, shape in SHAPES[case.name].items():
        for layer in range(shape.n_layers):
            names |= {f"{tower}.blocks.{layer}.{site}" for site in block_sites(case, tower)}
        names |= {f"{tower}.{site}" for site in tower_sites(case, tower)}
    if "language" in case.towers:
        names |= {"projector.hook_in", "projector.hook_out"}
    return names


def block_sites(case: Case, tower: str) -> list[str]:
    """Sites of one block."""
    decoder = tower in ("language", "action")
    sites = list(BLOCK)
    if decoder or "rotary_vision" in case.tags:
        sites += ["attn.hook_rot_q", "attn.hook_rot_k"]
    if decoder or "gated_vision" in case.tags:
        sites += ["mlp.hook_pre_linear"]
    if decoder and "sandwich" in case.tags:
        sites += [f"{norm}.hook_{part}" for norm in ("ln1_post", "ln2_post") for part in ("scale", "normalized")]
    return sites


def tower_sites(case: Case, tower: str) -> list[str]:
    """Sites outside the blocks."""
    sites = ["hook_embed", "hook_input", "ln_final.hook_scale", "ln_final.hook_normalized"]
    if tower in ("vision", "vision_2", "text") and "rotary_vision" not in case.tags:
        sites += ["hook_pos_embed"]
    pooled = tower == "vision" and "dual" in case.tags and "pooling_head" in case.tags
    if pooled:
        sites += [f"pool.attn.{site}" for site in POOL]
    if has_readout(case, tower):
        sites += ["hook_readout"]
    return sites


def has_readout(case: Case, tower: str) -> bool:
    """Whether one tensor is what the head of this tower reads."""
    if case.name in NO_READOUT:
        return False
    if "dual" in case.tags or tower == "action" or case.name == "clip-vision-projection":
        return True
    if tower == "language":
        return case.family != "pi0"
    return "classifier" in case.tags
