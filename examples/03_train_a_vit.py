"""Train a Vision Transformer on handwritten digits in thirty lines (about fifteen seconds; `minivit train` goes on)."""

import minivit as mv

epochs, batch_size = 6, 64
train = mv.data.load("digits", split="train")
test = mv.data.load("digits", split="test")

model = mv.create_model("vit_digits")
opt = mv.optim.AdamW(model.named_parameters(), lr=2e-3, weight_decay=0.05)
step = mv.TrainStep(model, opt, clip_norm=1.0)

loader = mv.data.Loader(train, batch_size, key=mv.Key(0), mean=train.mean, std=train.std)
schedule = mv.optim.warmup_cosine(2e-3, total_steps=epochs * len(loader), warmup_steps=len(loader))

for epoch in range(epochs):
    total = 0.0
    for images, labels in loader.batches(epoch):  # (B, 1, 8, 8) float32, (B,) int64
        opt.lr = schedule(opt.steps)
        total += step(images, labels) * len(labels)
    print(f"epoch {epoch + 1}: loss {total / len(train):.4f}")

images = mv.data.standardize(test.images, train.mean, train.std)
accuracy = (mv.predict_logits(model, images).argmax(axis=1) == test.labels).mean()
print(f"test accuracy {accuracy:.1%} on {len(test)} digits by other writers")
assert accuracy > 0.9
