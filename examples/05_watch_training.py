"""Watch a training run: a Trainer prints nothing, and tells an Observer of your own what it does."""

import minivit as mv


class Watch(mv.train.Observer):
    """Prints a line for each epoch, with the largest gradient of its steps, and bars for its loss."""

    def epoch_begins(self, trainer):
        self.norms = []

    def step(self, trainer, row):
        self.norms.append(row["grad_norm"])

    def epoch(self, trainer, row):
        bar = "█" * round(20 * row["loss"])
        print(
            f"epoch {row['epoch']}/{trainer.epochs}  gradient up to {max(self.norms):.1f}  loss {row['loss']:.2f} {bar}"
        )


digits = mv.data.load("digits", split="train")
train, valid = digits.split_off(0.2, mv.Key(0))
loader = mv.data.Loader(train, 64, mv.Key(1))
held = mv.data.Loader(valid, 256, mv.Key(2), mean=train.mean, std=train.std, shuffle=False)

model = mv.create_model("vit_digits", dim=32, depth=2, heads=2)
opt = mv.optim.AdamW(model.named_parameters(), lr=3e-3)
trainer = mv.Trainer(model, opt, epochs=8, clip_norm=1.0, observers=[Watch()])
rows = trainer.fit(loader, held)
print(f"accuracy on {len(valid)} images that were held out: {rows[-1]['valid_accuracy']:.1%}")
assert rows[-1]["valid_accuracy"] > 0.8
