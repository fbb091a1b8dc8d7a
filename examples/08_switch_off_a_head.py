"""Switch off a head, and see the logit change: as direct attribution said, as far as the head acts directly."""

import numpy as np

import minivit as mv

small = {"model.patch_size": 2, "model.depth": 2}
run = mv.runs.train(data="digits", epochs=3, settings=small)  # about 5 s
train, test = mv.data.load("digits", split="train"), mv.data.load("digits", split="test")
images = mv.data.standardize(test.images[:100], train.mean, train.std).astype(np.float64)
model, digits = run.model.to(np.float64), test.labels[:100]


def logits_of(trace) -> np.ndarray:
    """Return the logit of each image's own digit, (B,)."""
    return trace.logits.data[np.arange(len(digits)), digits]


trace = model.trace(images)
said = mv.study.direct_attribution(trace, digits)  # the logit of each as a sum: .heads (B, L, H), .mlp (B, L), …
print(f"mean logit of the right digit {said.logit.mean():.2f} = the sum of its {len(said.terms())} terms")
print(f"(largest difference of all {len(digits)} images: {np.abs(said.total - said.logit).max():.0e})\n")
assert np.allclose(said.total, said.logit, atol=1e-10)


def without(layer: int, head: int) -> np.ndarray:
    """Return by how much the logits fall without that head."""

    def change(block, attention):
        keep = np.ones(attention.shape[1])
        keep[head] = 0.0
        return attention * keep[:, None, None] if block == layer else attention  # (B, H, T, T)

    return logits_of(trace) - logits_of(model.trace(images, change=change))


print("layer  head   attribution   switched off    correlation over the images")
layers, heads = said.heads.shape[1:]
lost = np.stack([[without(layer, head) for head in range(heads)] for layer in range(layers)])  # (L, H, B)
wrote = said.heads.transpose(1, 2, 0)  # (B, L, H) → (L, H, B)
alike = np.array([[np.corrcoef(wrote[i, h], lost[i, h])[0, 1] for h in range(heads)] for i in range(layers)])
for layer, head in np.ndindex(layers, heads):
    means = f"{wrote[layer, head].mean():+14.2f}{lost[layer, head].mean():+15.2f}"
    print(f"{layer + 1:5}{head + 1:6}{means}{alike[layer, head]:18.2f}")

fell, wrote_first = lost[0].sum(0).mean(), wrote[0].sum(0).mean()  # of all heads of the first layer together
print(f"\nIn the last layer both tell the same images apart (mean correlation {alike[-1].mean():.2f}).")
print(f"The first layer's heads, off one at a time, cost the logit {fell:.2f} together; they wrote {wrote_first:.2f}")
print("into it: the rest is what later layers made of them, and attribution counts as theirs.")
assert alike[-1].mean() > 0.4
assert fell > wrote_first
