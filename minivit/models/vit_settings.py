"""What can be set of a Vision Transformer, and which settings contradict each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minivit import ops
from minivit.errors import ConfigError
from minivit.models.encoder import encoder_name
from minivit.models.registry import Settings, setting
from minivit.nn import rules
from minivit.nn.rules import Size, choice, count, flag, optional, pair, rate, size

FIXED = ("sincos_1d", "sincos_2d")
"""Positions that are not learned."""

MOST_FIXED = 1 << 26
"""Numbers of fixed positions at most: a checkpoint does not hold them, so that a small one could ask for any size."""


@dataclass(frozen=True)
class ViTSettings(Settings):
    """Settings of a :class:`ViT`."""

    divisor = "patch_size"
    image_size: Size = setting(32, size, "height and width of the images, an int or (height, width)")
    patch_size: Size = setting(4, size, "height and width of a patch; it divides the image's")
    in_channels: int = setting(3, count, "channels of the images")
    num_classes: int = setting(10, count, "classes, the length of the logits")
    dim: int = setting(192, count, "length of a token")
    depth: int = setting(6, rules.depth, "encoder blocks")
    heads: int = setting(3, count, "heads of the attention")
    mlp_dim: int | None = setting(None, optional(count), "hidden numbers of the MLP, 4·dim unless given")
    dim_head: int | None = setting(None, optional(count), "numbers of a head, dim/heads unless given")
    qkv_bias: bool = setting(True, flag, "whether queries, keys and values have a bias")
    activation: str = setting("gelu", rules.named(ops.ACTIVATIONS), "of the MLP: gelu, gelu_tanh, relu, silu, tanh")
    norm_eps: float = setting(1e-6, rules.epsilon, "what layer normalisation adds to the variance")
    dropout: float = setting(0.0, rate, "dropout after the attention's projection and in the MLP")
    attention_dropout: float = setting(0.0, rate, "dropout of the attention probabilities")
    embed_dropout: float = setting(0.0, rate, "dropout after the positions are added")
    drop_path: float = setting(0.0, rate, "drop path of the last block; it rises linearly from 0")
    patch_drop: float = setting(0.0, rate, "share of each image's patches that training leaves out")
    pool: str = setting(
        "cls",
        choice("cls", "mean", "none", "map", "map_all"),
        "cls, a token; mean, of patches; none, logits for each; map, attention over patches; map_all, over all tokens",
    )
    class_token: bool | None = setting(None, optional(flag), "whether there is one; with pool cls only unless given")
    registers: int = setting(0, rules.few, "tokens beside the patches that no head reads")
    distilled: bool = setting(False, flag, "a second token and head, which learn from a teacher (DeiT)")
    fc_norm: bool = setting(False, flag, "the final norm after pooling instead of before")
    position: str = setting(
        "learned", choice("learned", "learned_2d", "relative", *FIXED, "none"),
        "learned, learned_2d (x and y), relative (a bias of attention), sincos_1d or sincos_2d (fixed), none",
    )  # fmt: skip
    position_at: str | None = setting(
        None, optional(choice("input", "layers", "shared")),
        "input; layers, each its own; shared by all; relative ones are in layers unless given, others at the input",
    )  # fmt: skip
    no_embed_class: bool = setting(False, flag, "positions for patches only, not for the tokens beside")
    head: str = setting("linear", choice("linear", "mlp"), "linear or, for pre-training, mlp: one hidden tanh layer")
    block: str = setting(
        "pre", choice("pre", "post", "res_post", "parallel"),
        "where norms are: pre, post, res_post (at a branch's end); parallel, attention and MLP side by side",
    )  # fmt: skip
    norm: str = setting("layer", choice("layer", "rms"), "layer, LayerNorm, or rms, RMSNorm")
    mlp: str = setting("mlp", choice("mlp", "swiglu"), "mlp, or swiglu, gated by silu")
    layer_scale: float | None = setting(None, optional(rules.positive), "what factors of each branch start with, 1e-5")
    qk_norm: bool = setting(False, flag, "queries and keys are normalised")
    lsa: bool = setting(False, flag, "a learned temperature, and no token attends to itself: for few images")
    transformer: str | None = setting(None, encoder_name, "a registered encoder in the place of the blocks")
    tokenizer: str = setting(
        "patch", choice("patch", "normed", "shifted", "conv_stem", "t2t", "t2t_transformer"),
        "patch, a linear map; normed, normalised before and after; shifted, with those around (SPT); "
        "conv_stem, convolutions; t2t, tokens to tokens by performers; t2t_transformer, by full attention",
    )  # fmt: skip
    weight_init: str = setting("paper", choice("paper", "mimetic"), "as the paper's code; mimetic is for few images")
    seed: int = setting(0, rules.seed, "what the parameters are drawn from")
    recompute: bool = setting(False, flag, "blocks keep their input only and run again on the way back", kept=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for wrong, what, remedy in self.contradictions():
            if wrong:
                raise ConfigError(what, remedy)

    def contradictions(self) -> list[tuple[bool, str, str]]:
        """Return what cannot be together: whether it is, in words, and what to do."""
        s, pos = self, f"position {self.position!r}"
        own = None if s.transformer is None else f"transformer {s.transformer!r} takes the place of the blocks"
        placed = s.position_at in ("layers", "shared")
        t2t = s.tokenizer in ("t2t", "t2t_transformer")
        return [
            (t2t and pair("patch_size", s.patch_size) not in ((4, 4), (8, 8), (16, 16)),
             f"tokenizer {s.tokenizer!r} makes no tokens {s.patch_size} pixels apart", "set patch_size to 16, 8 or 4"),
            (s.pool == "cls" and s.class_token is False,
             "pool 'cls' reads the class token, and there is none", "set pool to mean, none or map"),
            (s.distilled and s.pool != "cls",
             f"distilled needs the class token to be read, and pool is {s.pool!r}", "set pool to cls"),
            (s.distilled and s.head == "mlp",
             "distilled has two linear heads, and head is 'mlp'", "set head to linear"),
            (s.distilled and s.fc_norm,
             "distilled reads two tokens after the final norm, and fc_norm has it after pooling", "set fc_norm=False"),
            (s.position == "none" and s.position_at is not None,
             f"{pos} has nothing to add at {s.position_at!r}", "choose positions, or leave position_at out"),
            (s.position == "relative" and s.position_at == "input",
             f"{pos} is a bias of the attention, not of the input", "set position_at to layers or shared"),
            (s.no_embed_class and s.position in ("none", "relative"),
             f"{pos} adds nothing to tokens that could be left out", "leave no_embed_class out, or choose others"),
            (s.position == "learned_2d" and s.dim % 2 == 1,
             f"{pos} has half of a token for x and half for y, and dim is {s.dim}", "choose an even dim"),
            (s.position in FIXED and math.prod(s.grid) * s.dim > MOST_FIXED,
             f"{pos} of {math.prod(s.grid):,} patches of {s.dim} numbers are too many", "use larger patches"),
            (s.patch_drop > 0 and (placed or s.position == "relative"),
             "patch_drop takes from blocks the patches that their positions are for", "add positions at the input"),
            (s.patch_drop > 0 and s.pool == "none",
             "patch_drop leaves patches out, and pool 'none' has logits for each", "set patch_drop=0"),
            (s.mlp == "swiglu" and s.activation not in ("gelu", "silu"),
             f"swiglu is gated by silu, and activation is {s.activation!r}", "leave activation out"),
            (s.weight_init == "mimetic" and s.position not in ("learned", "none"),
             f"mimetic weights begin learned positions as sines, and {pos} has none", "set position to learned"),
            (own is not None and (placed or s.position == "relative"),
             f"{own}, to which {pos} in every layer belongs", "add positions at the input"),
            (own is not None and s.weight_init == "mimetic",
             f"{own}, whose weights mimetic draws", "set weight_init to paper"),
        ]  # fmt: skip

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        (h, w), (p, q) = pair("image_size", self.image_size), pair("patch_size", self.patch_size)
        return h // max(p, 1), w // max(q, 1)

    @property
    def prefix(self) -> dict[str, int]:
        """How many tokens each parameter puts before the patches, by its name, in their order."""
        with_class = self.pool == "cls" if self.class_token is None else self.class_token
        found = {"cls_token": int(with_class), "dist_token": int(self.distilled), "reg_token": self.registers}
        return {name: tokens for name, tokens in found.items() if tokens}

    def largest_array(self) -> tuple[int, str]:
        """Return the numbers of the attention probabilities of one image."""
        patches = math.prod(self.grid)
        if self.tokenizer == "t2t_transformer":  # attends among 4 by 4 in the place of each first
            return max(self.heads, 256) * patches**2, f"{16 * patches:,} first windows, whose attention"
        attention = self.heads * patches**2, f"{patches:,} patches, whose attention"
        if self.tokenizer == "conv_stem":  # of the windows that its convolutions see, the first or the second are most
            channels, h, w = self.image_shape
            first = self.dim // max(pair("patch_size", self.patch_size)[0] // 2, 1)
            numbers = max(9 * channels, first, 9 * first // 4) * (h // 2) * (w // 2)
            return max(attention, (numbers, f"windows of {h // 2:,} × {w // 2:,} places, an array that"))
        return attention

    def written_out(self) -> dict[str, Any]:
        """Return ``config`` with what follows from others: sizes of MLP and heads, and where positions are added."""
        patch = pair("patch_size", self.patch_size)
        usual = {"relative": "layers", "none": None}.get(self.position, "input")
        return self.config | {
            "patch_size": patch[0] if patch[0] == patch[1] else patch,
            "mlp_dim": self.mlp_dim or 4 * self.dim,
            "dim_head": self.dim_head or self.dim // self.heads,
            "position_at": self.position_at or usual,
        }
