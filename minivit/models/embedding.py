"""What is added to patches, and put before them: the positions of the paper's Table 8, and tokens beside patches."""

from __future__ import annotations

from typing import Any

from minivit import ops
from minivit.nn import init
from minivit.nn.layers import PatchEmbed, Tokenizer
from minivit.nn.module import Constant, Module, Parameter, shape_text
from minivit.nn.scored import RelativePositions
from minivit.nn.token_attention import TokenPerformer, TokensToToken, TokenTransformer
from minivit.nn.tokenizers import ConvStem, NormedPatchEmbed, ShiftedPatchEmbed


class Positions2D(Module):
    """Learned positions (1, T, dim) of rows and columns: half of a patch's numbers are its column's, half its row's.

    Dosovitskiy et al. 2020, appendix D.4 ("2-dimensional"). ``prefix`` tokens before the patches have their own.
    """

    def __init__(self, grid: tuple[int, int], dim: int, prefix: int) -> None:
        self.rows: Any = Parameter(init.normal(grid[0], dim // 2, std=0.02), decays=False)
        self.columns: Any = Parameter(init.normal(grid[1], dim // 2, std=0.02), decays=False)
        self.prefix = Parameter(init.normal(1, prefix, dim, std=0.02), decays=False) if prefix else None

    def extra_repr(self) -> str:
        """Return the patches, and the length of a token."""
        return f"{shape_text((len(self.rows.data), len(self.columns.data)))} patches, {2 * self.rows.shape[1]}"

    def forward(self) -> Any:
        """Return the positions (1, T, dim)."""
        (h, half), w = self.rows.shape, self.columns.shape[0]
        x = ops.broadcast_to(self.columns.reshape((1, w, half)), (h, w, half))
        y = ops.broadcast_to(self.rows.reshape((h, 1, half)), (h, w, half))
        patches = ops.concat([x, y], axis=2).reshape((1, h * w, 2 * half))  # (h, w, dim) → (1, N, dim)
        return patches if self.prefix is None else ops.concat([self.prefix, patches], axis=1)  # → (1, T, dim)


_NORMED = {"normed": NormedPatchEmbed, "shifted": ShiftedPatchEmbed, "conv_stem": ConvStem}


def make_patches(s: Any) -> Tokenizer:
    """Return what makes tokens of images as the settings of a ViT say."""
    sizes = s.image_size, s.patch_size, s.in_channels, s.dim
    if s.tokenizer == "patch":
        return PatchEmbed(*sizes)
    if s.tokenizer in _NORMED:
        return _NORMED[s.tokenizer](*sizes, s.norm_eps)
    kind = TokenPerformer if s.tokenizer == "t2t" else TokenTransformer
    return TokensToToken(*sizes, kind, eps=s.norm_eps)


def make_positions(s: Any) -> Any:
    """Return what is added to tokens as the settings of a ViT say: a Parameter, Constant or Module, or None.

    It holds, or makes, (1, T, dim), or (1, N, dim) of the patches only.
    """
    rows, columns = s.grid
    prefix = 0 if s.no_embed_class else sum(s.prefix.values())
    if s.position == "learned":
        return Parameter(init.normal(1, prefix + rows * columns, s.dim, std=0.02), decays=False)
    if s.position == "learned_2d":
        return Positions2D(s.grid, s.dim, prefix)
    if s.position == "sincos_1d":
        return Constant(init.sincos_1d(prefix + rows * columns, s.dim)[None])
    return Constant(init.sincos_2d(s.grid, s.dim)[None]) if s.position == "sincos_2d" else None


def make_relative(s: Any) -> RelativePositions | None:
    """Return a table of relative positions, if the settings of a ViT ask for them."""
    if s.position != "relative":
        return None
    return RelativePositions(s.grid, s.heads, sum(s.prefix.values()))


def make_token(s: Any, name: str) -> Parameter | None:
    """Return the tokens (1, n, dim) that the parameter ``name`` puts before the patches, or None."""
    n = s.prefix.get(name, 0)
    if not n:
        return None
    # the class token is 0 as in the paper's code, the others as DeiT's and the registers of timm are
    std = {"dist_token": 0.02, "reg_token": 1e-6}.get(name)
    return Parameter(init.zeros(1, n, s.dim) if std is None else init.normal(1, n, s.dim, std=std), decays=False)


def put_together(patches: Any, tokens: list[Parameter | None], positions: Any) -> Any:
    """Return the tokens that enter the encoder, (B, N, dim) → (B, T, dim): those before the patches, plus positions.

    ``positions`` (1, T, dim), or (1, N, dim) of the patches only, are added; None: nothing is.
    """
    given = [token for token in tokens if token is not None]
    first = given[0] if len(given) == 1 else ops.concat(given, axis=1) if given else None  # (1, P, dim)
    of_patches = first is not None and positions is not None and positions.shape[1] == patches.shape[1]
    if of_patches:
        patches, positions = patches + positions, None
    return ops.embed_tokens(patches, first, positions)
