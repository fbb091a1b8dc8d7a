"""What a trained model does, and the gradients through it: functions of a trace, NumPy arrays out.

::

    trace = mv.study.trace_model(model, images)          # images (B, C, H, W), standardised as in training
    flow = mv.study.attention_gradient(trace, of=3)      # ∂(logit of class 3)/∂P, (B, H, T, T) for every block
    seen = mv.study.patch_map(trace, mv.study.relevance(trace, flow))   # (B, rows, columns)

B images, L blocks, H heads, T tokens (the class token first, if there is one, then N patches row by row), K classes.
"""

from minivit.study.attribution import Attribution, direct_attribution
from minivit.study.batches import HeadStatistics, head_statistics, predicted, trace_model, traces
from minivit.study.components import (
    Components,
    feature_components,
    filter_components,
    outlying_tokens,
    position_similarity,
    token_norms,
    update_ratios,
)
from minivit.study.distance import attention_distance
from minivit.study.flow import attention_gradient, flows, gradient_flow
from minivit.study.heads import Entropy, entropy, head_importance
from minivit.study.lens import lens_gradient, logit_lens
from minivit.study.maps import class_attention, gradient_attention, patch_map
from minivit.study.rollout import legrad, relevance, rollout
from minivit.study.untrained import untrained_like

__all__ = [
    "Attribution",
    "Components",
    "Entropy",
    "HeadStatistics",
    "attention_distance",
    "attention_gradient",
    "class_attention",
    "direct_attribution",
    "entropy",
    "feature_components",
    "filter_components",
    "flows",
    "gradient_attention",
    "gradient_flow",
    "head_importance",
    "head_statistics",
    "legrad",
    "lens_gradient",
    "logit_lens",
    "outlying_tokens",
    "patch_map",
    "position_similarity",
    "predicted",
    "relevance",
    "rollout",
    "token_norms",
    "trace_model",
    "traces",
    "untrained_like",
    "update_ratios",
]
