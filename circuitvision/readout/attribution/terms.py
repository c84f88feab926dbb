"""Terms: everything that is added up in a residual stream, with a name each.

The stream after layer ``l`` is what entered block 0 plus what every branch wrote: ``resid = input + Σ attn_out + Σ mlp_out``, and what further
branches and the tower's own code added.
Attention's share splits into heads and an output bias, ``attn_out = T(Σ_h z_h W_O^h + b_O)``, and an MLP's into neurons and a bias, ``mlp_out
= T(Σ_i post_i W_out[i] + b_out)``, where ``T`` is the identity, a LayerScale, or a sandwich norm whose denominator is held at its value in
this run: linear, so that shares add up. The input splits into patch embedding, position embedding and prefix tokens where the tower just adds
them (not where a norm follows, as in CLIP).

Names: ``input`` (or ``patch_embed``, ``pos_embed``, ``prefix``), and behind the tower's name ``vision L3.attn``, ``vision L3H7``, ``vision
L3.attn.bias``, ``vision L3.mlp``, ``vision L3N512``, ``vision L3.mlp.bias``: what :mod:`circuitvision.model.names` prints and reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.names import head_name
from circuitvision.model.weights import is_plain_linear, main_device
from circuitvision.readout.attribution.rest import is_rest, rest_of_stream
from circuitvision.readout.recorded import recorded

if TYPE_CHECKING:
    from circuitvision.model.block import Block
    from circuitvision.model.tower import Tower

SPLITS = ("component", "head", "neuron")


class Stream:
    """The terms of one tower's residual stream in one run, up to the hidden state ``end`` (0 is the input, ``l + 1`` the output of block ``l``)."""

    def __init__(self, tower: Tower, cache: ActivationCache, end: int | None = None, step: int | None = None) -> None:
        self.tower, self.cache, self.step = tower, cache, step
        self.end = max(tower.feature_layers_in(cache.inputs)) if end is None else end
        if not all(block.sums for block in tower.blocks[: self.end]):
            raise UnsupportedModelError(
                f"Blocks of the {tower.name} tower normalise the sum of their branches (post-norm), so its stream is no sum of what they added. "
                "Measure effects by edits (model.sweep), or split the stream at a run's denominators with cache.decompose_resid."
            )
        self.here: Tensor | slice = slice(None)

    def reading(self, gradient: Float[Tensor, "row pos d_model"]) -> tuple[Stream, Float[Tensor, "row here d_model"]]:
        """This stream at the positions that a gradient reads, and the gradient there: what is read at one word costs as much as one word."""
        found = Stream(self.tower, self.cache, self.end, self.step)
        found.here = (gradient != 0).any(-1).any(0).nonzero().flatten()
        return found, gradient[:, found.here]

    def site(self, name: str) -> Tensor:
        """A site of this tower (name without the tower) as ``[row …]``.

        Raises:
            InputError: the cache does not hold it, or holds several passes and no step was chosen.
        """
        value = recorded(self.cache, f"{self.tower.name}.{name}", self.step).detach()
        # A cache may have been recorded on another device than the model's.
        return value.to(main_device(self.tower.blocks[0].module))

    @property
    def final(self) -> Float[Tensor, "row pos d_model"]:
        """The stream at its end."""
        return self.site(self.tower.residual_name(self.end).split(".", 1)[1])

    # -- the input ---------------------------------------------------------------------------------------------------------------------------

    def input_parts(self) -> dict[str, Tensor]:
        """What enters block 0: patches, positions and prefix tokens where they are simply added, one part otherwise."""
        total = self.site("hook_input")
        names = [f"{self.tower.name}.{site}" for site in ("hook_embed", "hook_pos_embed")]
        if not self.tower.stack.image or any(name not in self.cache for name in names):
            return {"input": total}
        embed, table = self.site("hook_embed"), self.site("hook_pos_embed")
        if table.ndim != 3 or table.shape[1] != total.shape[1] or embed.shape[0] != total.shape[0]:
            return {"input": total}
        patches = torch.zeros_like(total)
        patches[:, -embed.shape[1] :] = embed
        positions = table.expand_as(total).clone()
        rest = total - patches - positions
        n_prefix = total.shape[1] - embed.shape[1]
        rounding = max(1e-5, 4 * torch.finfo(total.dtype).eps)
        if float(rest[:, n_prefix:].abs().amax()) > rounding * float(total.abs().amax()):
            return {"input": total}
        # Rounding at the patches stays with them, so that the parts add up to the input.
        patches[:, n_prefix:] += rest[:, n_prefix:]
        rest[:, n_prefix:] = 0
        return {"patch_embed": patches, "pos_embed": positions, **({"prefix": rest} if n_prefix else {})}

    # -- the branches ------------------------------------------------------------------------------------------------------------------------

    def denominator(self, layer: int, branch: str, at: Any = None) -> Float[Tensor, "... 1"] | None:
        """What the norm behind a branch ("attn" or "mlp") divides by in this run, at the positions read or at ``at``, an index into rows and
        positions; None where no norm follows."""

        def read(name: str) -> Tensor:
            value = self.site(name.removeprefix(f"{self.tower.name}."))
            return value[:, self.here] if at is None else value[at]

        return self.tower.blocks[layer].branch(branch).denominator_in(self.cache, read)

    def adjoint(
        self, layer: int, branch: str, gradient: Float[Tensor, "row pos d_model"]
    ) -> tuple[Float[Tensor, "row pos d_model"], Float[Tensor, " row"]]:
        """``(T' g, g·T(0))``: what one unit written before ``T`` is worth at the end, and what the norm's bias alone is worth."""
        then = self.tower.blocks[layer].branch(branch).then
        with torch.no_grad(), self.tower.hooks_disabled():
            bias = then.bias(gradient)
            constant = gradient.new_zeros(gradient.shape[0]) if bias is None else (gradient @ bias).sum(-1)
            return then.transposed(gradient, self.denominator(layer, branch)), constant

    def heads(self, layer: int) -> Float[Tensor, "row pos head d_model"]:
        """What each head of one block adds to the stream, the output bias left out."""
        z = self.site(f"blocks.{layer}.attn.hook_z")
        with torch.no_grad(), self.tower.hooks_disabled():
            return self.tower.blocks[layer].attn.share(
                "attn.hook_z", z, self.denominator(layer, "attn", (slice(None),))
            )

    def attention_bias(self, layer: int) -> Float[Tensor, "row pos d_model"]:
        """What the output bias of one block's attention adds to the stream, with the bias of a norm after it."""
        out = self.site(f"blocks.{layer}.hook_attn_out")
        with torch.no_grad(), self.tower.hooks_disabled():
            held = self.denominator(layer, "attn", (slice(None),))
            return self.tower.blocks[layer].attn.bias(out, held).expand_as(out)

    def vectors(self, by: str = "component") -> Iterator[tuple[str, Float[Tensor, "row pos d_model"]]]:
        """Every term as a tensor; they add up to :attr:`final`. ``by="neuron"`` is not offered: it would not fit into memory."""
        if by not in ("component", "head"):
            raise InputError(f"Terms are tensors by 'component' or 'head', not by {by!r}.")
        tower = self.tower.name
        yield from self.input_parts().items()
        for layer in range(self.end):
            rest = rest_of_stream(self, layer)
            for part, site in self.added(layer).items():
                out = self.site(site)
                if by == "component" or part != "attn":
                    yield f"{tower} L{layer}.{part}", out
                    continue
                results, bias = self.heads(layer), self.attention_bias(layer)
                for head in range(results.shape[2]):
                    yield head_name(layer, head, tower), results[:, :, head]
                gap = out - results.sum(2) - bias
                sizes = results.abs().sum((2, 3)) + out.abs().sum(-1)
                if is_rest(self, layer, "attn", gap.abs().sum(-1).flatten(), sizes.flatten()):
                    rest, gap = gap if rest is None else gap + rest, torch.zeros_like(gap)
                # Rounding stays with the bias, so that the terms add up to the stream.
                yield f"{tower} L{layer}.attn.bias", bias + gap
            if rest is not None:
                yield f"{tower} L{layer}.rest", rest

    def added(self, layer: int) -> dict[str, str]:
        """The sites of everything that is added in a block, and behind it up to the end of this stream, by the last word of their terms."""
        sites = self.tower.added_in(layer)
        behind = set(self.tower.writers.get(layer, ())) if layer + 1 >= self.end else set()
        words = {site: site.rpartition("hook_")[2].removesuffix("_out") for site in sites if site not in behind}
        return {word: site for site, word in words.items()}

    # -- scalar shares, of a gradient at the positions read ---------------------------------------------------------------------------------------

    def head_shares(self, layer: int, gradient: Tensor) -> tuple[Float[Tensor, "head row"], Float[Tensor, " row"]]:
        """``g·T(z_h W_O^h)`` of every head, summed over the positions read, and the share of the output bias."""
        pulled, constant = self.adjoint(layer, "attn", gradient)
        z = self.site(f"blocks.{layer}.attn.hook_z")[:, self.here].to(gradient.dtype)
        w_o, bias = self._output(self.tower.blocks[layer], gradient)
        # In two steps: all three at once would hold every head's vector at every position.
        per_head = torch.einsum("bphd,bphd->hb", z, torch.einsum("bpm,hdm->bphd", pulled, w_o))
        written = constant if bias is None else constant + (pulled @ bias).sum(-1)
        if not is_plain_linear(self.tower.blocks[layer].attn.output):
            # What a layer makes of rounding its input belongs to no head.
            written = self._rest(f"blocks.{layer}.hook_attn_out", gradient, per_head)
        return per_head, written

    def _rest(self, site: str, gradient: Tensor, shares: Float[Tensor, "part row"]) -> Float[Tensor, " row"]:
        return (self.site(site)[:, self.here].to(gradient.dtype) * gradient).flatten(1).sum(-1) - shares.sum(0)

    def source_shares(
        self, layer: int, gradient: Tensor, heads: Sequence[int] | None = None
    ) -> Float[Tensor, "head row source"]:
        """``g_i·T(A_ij v_j W_O^h)`` of every head and source ``j``, summed over queries ``i``: the head's share, split by where it looked."""
        pulled, _ = self.adjoint(layer, "attn", gradient)
        pattern = self.site(f"blocks.{layer}.attn.hook_pattern")[:, :, self.here].to(gradient.dtype)
        w_o, _ = self._output(self.tower.blocks[layer], gradient)
        pattern, values = self._all_values(layer, pattern)
        values = values.to(gradient.dtype).repeat_interleave(self.tower.cfg.n_heads // values.shape[2], dim=2)
        chosen = list(range(w_o.shape[0])) if heads is None else list(heads)
        wanted = torch.einsum("bpm,hdm->bphd", pulled, w_o[chosen])
        worth = torch.einsum("bkhd,bphd->bhpk", values[:, :, chosen], wanted)
        return (pattern[:, chosen] * worth).sum(2).transpose(0, 1)

    def source_vectors(self, layer: int, rows: Tensor, where: Tensor) -> Float[Tensor, "head source row d_model"]:
        """``T(A_ij v_j W_O^h)`` at one query ``i`` of every row: what each head takes from each source and writes there."""
        pattern = self.site(f"blocks.{layer}.attn.hook_pattern")[rows, :, where]
        pattern, values = self._all_values(layer, pattern)
        w_o, _ = self._output(self.tower.blocks[layer], pattern)
        values = values.repeat_interleave(w_o.shape[0] // values.shape[2], dim=2)
        held = self.denominator(layer, "attn", (rows, where))
        then = self.tower.blocks[layer].attn.then
        # A head at a time: with all heads at once only the sources of one row would fit into memory at real sizes.
        with torch.no_grad(), self.tower.hooks_disabled():
            written = [
                then.linear(torch.einsum("bk,bkd,dm->kbm", pattern[:, h], values[:, :, h], w_o[h]), held)
                for h in range(w_o.shape[0])
            ]
        return torch.stack(written)

    def head_vectors(self, layer: int, rows: Tensor, where: Tensor) -> Float[Tensor, "head row d_model"]:
        """What each head adds to the stream at one position of every row, the output bias left out."""
        z = self.site(f"blocks.{layer}.attn.hook_z")[rows, where]
        held = self.denominator(layer, "attn", (rows, where))
        with torch.no_grad(), self.tower.hooks_disabled():
            return self.tower.blocks[layer].attn.share("attn.hook_z", z, held).movedim(1, 0)

    def neuron_vectors(
        self, layer: int, post: Float[Tensor, "row d_mlp"], which: range, where: Tensor
    ) -> Float[Tensor, "neuron row d_model"]:
        """``T(post_i W_out[i])`` at one position of every row, of some neurons."""
        weight, _ = self.tower.blocks[layer].mlp.out.weight_and_bias(post.dtype, post.device)
        chosen = torch.arange(which.start, which.stop, device=post.device)
        written = post[:, chosen].T[..., None] * weight.detach()[chosen][:, None]
        rows = torch.arange(post.shape[0], device=post.device)
        held = self.denominator(layer, "mlp", (rows, where))
        with torch.no_grad(), self.tower.hooks_disabled():
            return self.tower.blocks[layer].mlp.then.linear(written, held)

    def _all_values(
        self, layer: int, pattern: Float[Tensor, "row ... key"]
    ) -> tuple[Float[Tensor, "row ... source"], Float[Tensor, "row source kv_head d_head"]]:
        """The values of every source (those in the key-value cache, then the pass's own), and the pattern over as many.

        The cache was filled by another tower's prefix, or by earlier passes of this one. Sources that a sliding window has left behind get nothing.
        """
        name, keys = f"blocks.{layer}.attn.hook_v", pattern.shape[-1]
        attn = self.tower.blocks[layer].attn
        own = attn.normed_heads("v", self.site(name))
        if own.shape[1] == keys:
            return pattern, own
        feeder = next((t for t in self.tower.siblings.values() if t.feeds_cache), None)
        if feeder is not None:
            # The prefix ran once, whichever denoising step is looked at.
            earlier = [feeder.blocks[layer].attn.normed_heads("v", Stream(feeder, self.cache, step=0).site(name))]
        else:
            passes = self.cache[f"{self.tower.name}.{name}"]
            number = 0 if self.step is None else self.step % len(passes)
            steps = [Stream(self.tower, self.cache, step=index).site(name) for index in range(number)]
            earlier = [attn.normed_heads("v", values) for values in steps]
        values = torch.cat([*earlier, own], dim=1)
        if values.shape[1] < keys:
            raise InputError(
                f"Attention reads {keys} keys, but the cache holds the values of {values.shape[1]} only; record the passes before this one as well."
            )
        return torch.nn.functional.pad(pattern, (values.shape[1] - keys, 0)), values

    def neuron_shares(self, layer: int, gradient: Tensor) -> tuple[Float[Tensor, "neuron row"], Float[Tensor, " row"]]:
        """``post_i g·T(W_out[i])`` of every neuron, summed over the positions read, and the share of the MLP's bias."""
        pulled, constant = self.adjoint(layer, "mlp", gradient)
        post = self.site(f"blocks.{layer}.mlp.hook_post")[:, self.here].to(gradient.dtype)
        weight, bias = self.tower.blocks[layer].mlp.out.weight_and_bias(gradient.dtype, gradient.device)
        wanted = pulled @ weight.detach().to(gradient.dtype).T
        shares = torch.einsum("bpf,bpf->fb", post, wanted)
        if not is_plain_linear(self.tower.blocks[layer].mlp.output):
            return shares, self._rest(f"blocks.{layer}.hook_mlp_out", gradient, shares)
        return shares, constant if bias is None else constant + (pulled @ bias.detach().to(gradient.dtype)).sum(-1)

    def _output(self, block: Block, like: Tensor) -> tuple[Float[Tensor, "head d_head d_model"], Any]:
        weight, bias = block.attn.out.weight_and_bias(like.dtype, like.device)
        w_o = rearrange(weight.detach().to(like.dtype), "(h d) m -> h d m", h=self.tower.cfg.n_heads)
        return w_o, None if bias is None else bias.detach().to(like.dtype)
