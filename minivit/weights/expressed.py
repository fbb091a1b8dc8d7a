"""What another system's layout can express of a ViT, and the model's arrays under that layout's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minivit.backend import to_numpy
from minivit.errors import ConfigError
from minivit.models import Model
from minivit.nn.attention import table
from minivit.weights import google, huggingface
from minivit.weights.configs import TIMM_STAGES
from minivit.weights.names import Sizes

TIMM, HF, GOOGLE, ONNX = SYSTEMS = ("timm", "huggingface", "google", "onnx")
"""What a model can be exported to."""

FIRST_EPS = 1e-6
"""The eps that timm's and Google's code has, which neither a config.json of timm's nor Google's layout says."""


class Feature(NamedTuple):
    """What not every ViT has: whether one has it, by its settings; in words; and the layouts that can say it."""

    of: Callable[[Any], bool]
    words: str
    layouts: tuple[str, ...] = ()


def _beside(s: Any) -> bool:
    return bool(s.prefix)


def _hybrid(s: Any) -> bool:
    return hasattr(s, "stem_eps")


FEATURES = (
    Feature(lambda s: s.tokenizer == "normed", "norms on both sides of the patches (tokenizer 'normed')"),
    Feature(lambda s: s.tokenizer == "shifted", "tokens of shifted patches (tokenizer 'shifted')"),
    Feature(lambda s: s.tokenizer == "conv_stem", "tokens made by convolutions (tokenizer 'conv_stem')"),
    Feature(lambda s: s.tokenizer[:3] == "t2t", "tokens made of tokens (tokenizer 't2t')"),
    Feature(_hybrid, "a ResNet before the patches", (TIMM, GOOGLE)),
    Feature(lambda s: _hybrid(s) and s.distilled, "a distillation token after a ResNet"),
    Feature(lambda s: _hybrid(s) and s.stages not in TIMM_STAGES, "a ResNet of other stages than timm's", (GOOGLE,)),
    Feature(lambda s: _hybrid(s) and s.width != 64, "a ResNet whose width is not 64", (GOOGLE,)),
    Feature(lambda s: _hybrid(s) and s.stem_eps != "timm", "stem_eps 'google'", (GOOGLE,)),
    Feature(lambda s: _hybrid(s) and s.stem_eps != "google", "stem_eps 'timm'", (TIMM,)),
    Feature(lambda s: s.head == "mlp", "a hidden layer in its head (head 'mlp')", (GOOGLE,)),
    Feature(lambda s: s.pool == "none", "logits for every patch (pool 'none')"),
    Feature(lambda s: s.pool == "mean" and not _beside(s), "pool 'mean'", (TIMM, GOOGLE)),
    Feature(lambda s: s.pool == "mean" and _beside(s), "pool 'mean' with other tokens beside the patches", (TIMM,)),
    Feature(lambda s: s.pool[:3] == "map" and not _beside(s), "attention pooling (pool 'map')", (TIMM, GOOGLE)),
    Feature(lambda s: s.pool[:3] == "map" and _beside(s), "attention pooling with tokens beside the patches", (TIMM,)),
    Feature(lambda s: s.pool[:3] == "map" and not s.qkv_bias, "attention pooling without qkv_bias"),
    Feature(lambda s: s.distilled, "a distillation token", (TIMM, HF)),
    Feature(lambda s: s.distilled and s.registers > 0, "a distillation token and registers"),
    Feature(lambda s: s.registers > 0, "register tokens", (TIMM,)),
    Feature(lambda s: s.fc_norm, "the final norm after pooling (fc_norm)", (TIMM,)),
    Feature(lambda s: s.layer_scale is not None, "LayerScale", (TIMM,)),
    Feature(lambda s: s.qk_norm, "norms of queries and keys (qk_norm)", (TIMM,)),
    Feature(lambda s: s.norm == "rms", "RMSNorm (norm 'rms')", (TIMM,)),
    Feature(lambda s: s.mlp == "swiglu", "a gated MLP (mlp 'swiglu')"),
    Feature(lambda s: s.lsa, "a learned temperature and a masked diagonal (lsa)"),
    Feature(lambda s: s.block != "pre", "blocks that are not pre-norm"),
    Feature(lambda s: s.position == "relative", "relative positions"),
    Feature(lambda s: s.position_at in ("layers", "shared") and s.position != "relative", "positions in every layer"),
    Feature(lambda s: not s.qkv_bias, "no qkv_bias", (TIMM, HF)),
    Feature(lambda s: (s.dim_head or s.dim // s.heads) * s.heads != s.dim, "heads · dim_head other than dim"),
    Feature(lambda s: s.activation not in ("gelu", "gelu_tanh"), "an activation other than GELU", (TIMM, HF)),
    Feature(lambda s: s.norm_eps != FIRST_EPS, f"a norm_eps other than {FIRST_EPS:g}", (HF,)),
)
"""What layouts differ in. The encoder of somebody else's is in none of them."""


KNOWN = {
    "image_size", "patch_size", "in_channels", "num_classes", "dim", "depth", "heads", "mlp_dim", "dim_head",
    "qkv_bias", "activation", "norm_eps", "dropout", "attention_dropout", "embed_dropout", "drop_path",
    "patch_drop", "pool", "class_token", "registers", "distilled", "fc_norm", "position", "position_at",
    "no_embed_class", "head", "block", "norm", "mlp", "layer_scale", "qk_norm", "lsa", "transformer", "weight_init",
    "seed", "recompute", "tokenizer", "stages", "width", "stem_eps", "kernel", "convs", "depths", "group",
}  # fmt: skip
"""The settings whose meaning for the numbers is known here: of another one only the default can be exported."""


KINDS = {
    TIMM: ("vit", "hybrid"),
    HF: ("vit", "hybrid"),
    GOOGLE: ("vit", "hybrid"),
    ONNX: ("vit", "hybrid", "cct", "resnet"),
}
"""The kinds of models whose layouts are known here."""


def check_kind(model: Any, to: str) -> None:
    """Raise ConfigError for a model of a kind that ``to`` has no place for, or whose blocks are somebody else's."""
    kind = getattr(model, "kind", "") or type(model).__name__
    keep = "keep it as minivit's own checkpoint, an .npz that np.load opens: mv.save(model, path)"
    if not isinstance(model, Model) or kind not in KINDS[to]:
        able = [other for other in SYSTEMS if kind in KINDS[other]] if isinstance(model, Model) else []
        what = f"the model is a {kind}, for which {_NAMES[to]} has no place"
        raise ConfigError(what, f"export it --to {' or '.join(able)}, or {keep}" if able else keep)
    s = model.settings
    if (own := getattr(s, "transformer", None)) is not None:
        raise ConfigError(f"the encoder {own!r} in the place of the blocks is no other system's", keep)
    for name, described in s.described.items():
        if name not in KNOWN and (value := getattr(s, name)) != described.default:
            what = f"a {kind} whose {name} is {value!r} cannot be exported: no other system's layout for it is known"
            raise ConfigError(what, keep)


def check_expressible(s: Any, to: str) -> None:
    """Raise ConfigError if the layout ``to`` cannot express the settings ``s`` of a ViT: what, and which layout can."""
    lacking = [f for f in FEATURES if f.of(s) and to not in f.layouts]
    if not lacking:
        return
    able = [x for x in (TIMM, HF, GOOGLE) if all(x in f.layouts for f in FEATURES if f.of(s))]
    what = f"{_NAMES[to]} has no place for what this model has: {'; '.join(f.words for f in lacking)}"
    raise ConfigError(what, f"export it --to {' or '.join([*able, ONNX])}, which can say it")


_NAMES = {
    TIMM: "timm's config.json",
    HF: "Hugging Face's ViT",
    GOOGLE: "Google's layout",
    ONNX: "ONNX, as written here,",
}


def arrays_for(model: Any, to: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return a ViT's arrays under the names of the layout ``to``, views where that can be, and what is not as it was.

    Raises ConfigError for what the layout cannot express: see :data:`FEATURES`.
    """
    s, notes = model.settings, []
    check_expressible(s, to)
    state = {name: np.asarray(array) for name, array in model.state_dict().items()}
    positions = _positions(model, to, state.get("pos_embed"))
    if positions is not state.get("pos_embed"):
        state = {name: array for name, array in state.items() if name.split(".")[0] != "pos_embed"}
        state["pos_embed"] = positions
        notes.append(f"positions ({s.position}) are written as the numbers they are, one vector for each token")
    if to == TIMM:
        return state, notes
    layout = google.LAYOUT if to == GOOGLE else huggingface.DEIT if s.distilled else huggingface.LAYOUT
    sizes = Sizes(s.heads, model.patch_embed.patch_size)
    if to == GOOGLE:
        for name, array in state.items():
            if array.dtype.itemsize < 4:  # NumPy has no name for JAX's bfloat16, and vit_jax asks for float32
                state[name] = array.astype(np.float32)
    return layout.written(state, sizes), notes


def _positions(model: Any, to: str, learned: np.ndarray | None) -> Any:
    """Return the positions (1, T, dim) that a layout holds, ``learned`` itself if they are such; None for none."""
    s = model.settings
    made = table(model.pos_embed, model.patch_embed.proj.weight)
    if made is None and to != HF:
        return None
    patches, beside = model.patch_embed.num_patches, model.prefix
    dtype = to_numpy(model.patch_embed.proj.weight.data).dtype
    found = np.zeros((1, patches, s.dim), dtype) if made is None else to_numpy(made.data)
    apart = to == TIMM and not s.distilled  # timm's no_embed_class
    if found.shape[1] == patches and beside and not apart:  # those of the tokens beside are 0
        return np.concatenate([np.zeros((1, beside, s.dim), found.dtype), found], axis=1)  # → (1, T, dim)
    return found if learned is None or learned.shape != found.shape else learned
