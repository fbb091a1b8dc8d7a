"""With the pieces that the text gives: two residual steps, and one function that walks a branch back."""

from minivit.learn.given import (
    gelu,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    self_attention,
    self_attention_backward,
)


def walk(x, boxes):
    inputs = []
    for box, _, parameters in boxes:
        inputs.append(x)
        x = box(x, *parameters)
    return x, inputs


def walk_back(g, inputs, boxes):
    found = []
    for x, (_, back, parameters) in zip(reversed(inputs), reversed(boxes), strict=True):
        result = back(g, x, *parameters)
        g, *own = result if isinstance(result, tuple) else (result,)
        found = own + found
    return g, found


def branches(norm1_weight, norm1_bias, wqkv, bqkv, wproj, bproj, norm2_weight, norm2_bias, w1, b1, w2, b2, heads):
    lin, norm = (linear, linear_backward), (layer_norm, layer_norm_backward)
    first = [(*norm, (norm1_weight, norm1_bias)), (*lin, (wqkv, bqkv)),
             (self_attention, self_attention_backward, (heads,)), (*lin, (wproj, bproj))]  # fmt: skip
    second = [(*norm, (norm2_weight, norm2_bias)), (*lin, (w1, b1)), (gelu, gelu_backward, ()), (*lin, (w2, b2))]
    return first, second


def forward(x, *parameters):
    for branch in branches(*parameters):
        x = x + walk(x, branch)[0]
    return x


def backward(g, x, *parameters):
    first, second = branches(*parameters)
    attended, inputs1 = walk(x, first)
    _, inputs2 = walk(x + attended, second)
    back, found2 = walk_back(g, inputs2, second)
    g = g + back
    back, found1 = walk_back(g, inputs1, first)
    return g + back, *found1, *found2
