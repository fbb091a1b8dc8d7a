"""The encoder of a ViT: its blocks as the settings say, or a module that somebody else has written.

::

    @mv.register_encoder("mixer")
    def mixer(s):                              # the settings of the ViT: s.dim, s.depth, s.grid, …
        return MyMixer(s.dim, s.depth)         # a Module of tokens (B, T, dim) → (B, T, dim), or a list of them

    model = mv.ViT(32, 4, transformer="mixer")

Its checkpoints keep the name: who loads one imports the file that registers it first. ``transformer=MyMixer(…)`` will
do for a model that is not saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from minivit.errors import ConfigError, value_text
from minivit.models.embedding import make_positions, make_relative
from minivit.nn.attention import EncoderBlock
from minivit.nn.blocks import ParallelBlock, Plugged, PostNormBlock, ResidualPostNormBlock
from minivit.nn.layers import LayerNorm
from minivit.nn.module import Constant, Module
from minivit.nn.refined import RMSNorm, SwiGLU
from minivit.nn.scored import RelativePositions, ScoredAttention

BLOCKS = {"pre": EncoderBlock, "post": PostNormBlock, "res_post": ResidualPostNormBlock, "parallel": ParallelBlock}
"""Blocks by the setting ``block``."""

NORMS: dict[str, Any] = {"layer": LayerNorm, "rms": RMSNorm}
"""Norms by the setting ``norm``."""

ENCODERS: dict[str, Callable[[Any], Any]] = {}
"""Encoders of somebody else's, by their names: functions of the settings that return a Module, or a list of them."""


def register_encoder(name: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Enter a function of a ViT's settings, which returns its encoder, as ``name``; a decorator."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the encoder's name {value_text(name)} is no text", 'give it one: @register_encoder("mine")')

    def enter(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        before = ENCODERS.get(name, make)  # defined again, as in a notebook, it replaces itself
        if (before.__module__, before.__qualname__) != (make.__module__, make.__qualname__):
            raise ConfigError(f"two encoders {name!r}", "give one another name")
        ENCODERS[name] = make
        return make

    return enter


def encoder_name(name: str, value: Any) -> Any:
    """The name of a registered encoder, or a Module; None for the ViT's own blocks."""
    if value is None or isinstance(value, Module):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value_text(value)}", "give the name of a registered encoder, or a Module")
    if value not in ENCODERS:
        known = f"; registered are {', '.join(map(value_text, ENCODERS))}" if ENCODERS else ""
        raise ConfigError(
            f"{name} is {value_text(value)}, and no encoder is registered so",
            f"import the file that registers it (minivit.register_encoder){known}",
        )
    return value


def make_blocks(s: Any, positions: Any, relative: RelativePositions | None) -> list[Any]:
    """Return the encoder blocks of a ViT with the settings ``s``.

    ``positions`` and ``relative`` are the model's own: what all blocks share if they share.
    """
    if s.transformer is not None:
        made = s.transformer if isinstance(s.transformer, Module) else ENCODERS[s.transformer](s)
        modules = list(made) if isinstance(made, list | tuple) else [made]
        if not modules or not all(isinstance(module, Module) for module in modules):
            what = f"the encoder {value_text(s.transformer)} made {value_text(made)}"
            raise ConfigError(what, "let it return a minivit.nn.Module, or a list of them")
        return [m if isinstance(m, EncoderBlock) else Plugged(m, s.recompute) for m in modules]
    blocks = []
    for i in range(s.depth):
        blocks.append(make_block(s, i, relative or make_relative(s)))
        if i > 0 and positions is not None and s.position_at in ("layers", "shared"):  # the first has the input's
            alike = s.position_at == "shared" or isinstance(positions, Constant)
            blocks[i].pos_embed = positions if alike else make_positions(s)
    return blocks


def make_block(s: Any, number: int, relative: RelativePositions | None) -> EncoderBlock:
    """Return block ``number`` of a ViT with the settings ``s``."""
    norm = partial(NORMS[s.norm], eps=s.norm_eps)
    attn, mlp = None, None
    if s.qk_norm or s.lsa or relative is not None:
        attn = ScoredAttention(
            s.dim, s.heads, s.dim_head, s.qkv_bias, s.attention_dropout, s.dropout,
            qk_norm=norm if s.qk_norm else None, temperature=s.lsa, rel_pos=relative,
        )  # fmt: skip
    if s.mlp == "swiglu":
        mlp = SwiGLU(s.dim, s.mlp_dim or 4 * s.dim, s.dropout)
    return BLOCKS[s.block](
        s.dim, s.heads, s.mlp_dim or 4 * s.dim, s.dim_head, s.qkv_bias, s.activation, s.norm_eps, s.dropout,
        s.attention_dropout, s.drop_path * number / max(s.depth - 1, 1), s.recompute,
        norm=NORMS[s.norm], attn=attn, mlp=mlp, layer_scale=s.layer_scale,
    )  # fmt: skip
