"""An attention map and its gradient, from ten lines: what the model looks at, and what the logit would gain by it.

A row of P sums to 1: what is looked at more takes from the rest, so that differences along a row of ∂logit/∂P count.
"""

import numpy as np

import minivit as mv

small = {"model.patch_size": 2, "model.depth": 2}  # 4 × 4 patches and a class token
run = mv.runs.train(data="digits", epochs=3, settings=small)  # about 5 s
train, test = mv.data.load("digits", split="train"), mv.data.load("digits", split="test")
images = mv.data.standardize(test.images[:1], train.mean, train.std).astype(np.float64)  # (1, 1, 8, 8)
digit, model = int(test.labels[0]), run.model.to(np.float64)

trace = model.trace(images)
attention = trace.attention[-1].data  # P of the last block, (1, H, T, T): row 0 is what the class token attends to
gradient = mv.study.attention_gradient(trace, of=digit)[-1]  # ∂(logit of that digit)/∂P, the same shape

# ---- a picture in text ----
print(f"a {digit}, and of each head of the last block P and ∂logit/∂P in the class token's row, times 100\n")
for row in test.images[0, 0]:  # (8, 8), from 0 to 255
    print("  " + "".join(" ░▒▓█"[int(pixel) * 5 // 256] * 2 for pixel in row))
for head, (p, dp) in enumerate(zip(attention[0, :, 0, 1:], gradient[0, :, 0, 1:], strict=True)):
    print(f"\n  head {head + 1}: attention    gradient")
    for seen, flow in zip(p.reshape(4, 4), dp.reshape(4, 4), strict=True):
        print("  " + "".join(f"{100 * x:4.0f}" for x in seen) + "   " + "".join(f"{100 * x:+5.0f}" for x in flow))

# ---- is that number true? add a millionth to one entry of P, and see what the logit does ----
head, patch = divmod(int(np.abs(gradient[0, :, 0, 1:]).argmax()), 16)
nudge = np.zeros_like(attention)
nudge[0, head, 0, 1 + patch] = 1e-6
up, down = (
    model.trace(images, change=lambda block, p, sign=sign: p + sign * nudge if block == 1 else p).logits
    for sign in (1.0, -1.0)
)
measured, engine = (up - down).data[0, digit] / 2e-6, gradient[0, head, 0, 1 + patch]
print(f"\nhead {head + 1}, patch {patch + 1}: the gradient says {engine:.6f}, a nudged attention {measured:.6f}")
assert abs(measured - engine) < 1e-6 * abs(engine)
assert np.allclose(attention.sum(-1), 1.0)
