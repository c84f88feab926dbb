"""Which sites each case must offer, written down from what the architectures are, without asking the library."""

from __future__ import annotations

from tests.conformance.cases import BLOCK_SHAPES, SHAPES
from tests.zoo import Case

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
PRE = ("mlp.hook_pre_linear",)
LN1, LN2, LN3, LN1_POST, LN2_POST, Q, K, V = (
    (f"{name}.hook_scale", f"{name}.hook_normalized")
    for name in ("ln1", "ln2", "ln3", "ln1_post", "ln2_post", "attn.q_norm", "attn.k_norm", "attn.v_norm")
)
ADAPTER = ("hook_adapter_in", "hook_adapter_out")
MLP = ("hook_mlp_in", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out")
THIRD = (*ADAPTER, *LN3, "hook_resid_mid_adapter")
DIFFERENCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": ((), ()),
    "fused": ((), ()),
    "fused_groups": (PRE, ()),
    "norms_of_heads": ((*PRE, *Q, *K, *V), ()),
    "norms_heads_first": ((*Q, *K), ()),
    "norms_of_all_heads": ((*Q, *K, *V), ()),
    "vector_gates": ((), ()),
    "tanh_gates": ((), ()),
    "gates_behind_norms": ((*LN1_POST, *LN2_POST), (*LN1, *LN2)),
    "norms_behind": ((*LN1_POST, *LN2_POST), (*LN1, *LN2)),
    "third_writer": (THIRD, ()),
    "third_writer_gated": (THIRD, ()),
    "parallel": ((), ("hook_resid_mid",)),
    "parallel_shared": ((), ("hook_resid_mid", *LN2)),
    "parallel_gated": (ADAPTER, ("hook_resid_mid", *LN2)),
    "post_norm": (("ln1.hook_in", "ln2.hook_in"), ()),
    "post_norm_gated": (("ln1.hook_in", "ln2.hook_in"), ()),
    "deepstack": ((), ()),
    "kinds_by_layer": ((), ()),
    "flat": ((), ()),
}
"""Shapes of synthetic blocks: which sites they have beside those of ``BLOCK``, and which of those they lack."""
CROSS = [f"cross_attn.hook_{site}" for site in ("q_input", "q", "k", "v", "attn_scores", "pattern", "z", "result")]
CROSSING = (
    BLOCK,
    [
        *(site for site in BLOCK if "attn" not in site and site[:7] not in ("hook_q_", "hook_k_", "hook_v_")),
        *CROSS,
        "hook_cross_attn_out",
    ],
    [*BLOCK, *CROSS, *LN3, "hook_cross_attn_out", "hook_resid_mid_cross_attn"],
)
"""The blocks of the synthetic language tower that attends to a vision tower, one by one."""
NO_READOUT = ("deit-teacher",)
"""Two heads read two positions: there is no single tensor that a head reads."""


def expected_sites(case: Case) -> set[str]:
    """Every site of the case, by name."""
    names: set[str] = set()
    for tower, shape in SHAPES[case.name].items():
        for layer in range(shape.n_layers):
            names |= {f"{tower}.blocks.{layer}.{site}" for site in block_sites(case, tower, layer)}
        names |= {f"{tower}.{site}" for site in tower_sites(case, tower)}
    if "language" in case.towers:
        names |= {"projector.hook_in", "projector.hook_out"}
    return names


def block_sites(case: Case, tower: str, layer: int) -> list[str]:
    """Sites of one block."""
    if case.name in BLOCK_SHAPES:
        more, less = DIFFERENCES[BLOCK_SHAPES[case.name]]
        more += ("hook_deepstack",) if case.name == "synthetic-deepstack" and layer < 2 else ()
        if case.name == "synthetic-kinds-by-layer" and layer == 1:
            more, less = ADAPTER, MLP
        return [*(site for site in BLOCK if site not in less), *more]
    if "cross_attention" in case.tags and tower == "language":
        return CROSSING[layer]
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
    if tower in ("vision", "vision_2", "text") and not case.tags & {"rotary_vision", "synthetic_blocks", "merged"}:
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
