"""Rollout against relevance, on one image: where attention goes, and what of it speaks for a class."""

import numpy as np

import minivit as mv

small = {"model.patch_size": 2, "model.depth": 2}  # 4 × 4 patches and a class token
run = mv.runs.train(data="digits", epochs=3, settings=small)  # about 5 s
train, test = mv.data.load("digits", split="train"), mv.data.load("digits", split="test")
images = mv.data.standardize(test.images, train.mean, train.std)

# an image on which the model hesitates: the second logit comes nearest to the first
logits = mv.predict_logits(run.model, images)  # (N, 10)
order = np.sort(logits, axis=1)
i = int((order[:, -1] - order[:, -2]).argmin())
first, second = (int(c) for c in logits[i].argsort()[:-3:-1])
trace = run.model.trace(images[i : i + 1])


def shares(matrix: np.ndarray) -> np.ndarray:
    """Return a (1, T, T) matrix over tokens as what the class token has of each patch, (4, 4), in percent."""
    over = mv.study.patch_map(trace, matrix)[0]
    return 100 * over / over.sum()


maps = {
    "rollout": shares(mv.study.rollout(trace)),
    f"relevance for {first}": shares(mv.study.relevance(trace, mv.study.attention_gradient(trace, of=first))),
    f"relevance for {second}": shares(mv.study.relevance(trace, mv.study.attention_gradient(trace, of=second))),
}

print(f"test image {i} is a {test.labels[i]}; the model says {first} ({logits[i, first]:.2f}),")
print(f"and nearly {second} ({logits[i, second]:.2f}). Of each patch, its share in percent:\n")
for row in test.images[i, 0]:  # (8, 8), from 0 to 255
    print("  " + "".join(" ░▒▓█"[int(pixel) * 5 // 256] * 2 for pixel in row))
print("\n  " + "".join(f"{name:22}" for name in maps))
for rows in zip(*maps.values(), strict=True):
    print("  " + "   ".join("".join(f"{x:4.0f} " if x >= 0.5 else "   · " for x in row)[:19] for row in rows))

likeness = np.corrcoef([m.ravel() for m in maps.values()])
print(f"\nRollout knows no class: there is one map for both. Relevance for {first} and for {second} differ:")
print(f"their correlation is {likeness[1, 2]:.2f}, and that of the first with rollout {likeness[0, 1]:.2f}.")
assert np.allclose(mv.study.rollout(trace).sum(-1), 1.0)  # of every token, all that it sees
assert likeness[1, 2] < 0.999
