"""The same in JAX, compiled by XLA, on all cores: ``python benchmarks/jax_step.py CONFIG [train|infer]``."""

from __future__ import annotations

import functools
import resource
from typing import Any

import jax
import jax.numpy as jnp
from configs import Config, arguments, report, time_steps

LR, DECAY, BETA1, BETA2, EPS = 1e-3, 0.05, 0.9, 0.999, 1e-8


def make_parameters(config: Config, key: jax.Array) -> dict[str, Any]:
    """Return the parameters: nested dicts, the blocks in a list, weights (in, out)."""
    keys = iter(jax.random.split(key, 4 * config.depth + 3))
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    linear = lambda n, m: {"w": normal(n, m), "b": jnp.zeros(m)}
    norm = lambda: {"w": jnp.ones(dim), "b": jnp.zeros(dim)}
    dim = config.dim
    make_block = lambda: {
        "norm1": norm(), "qkv": linear(dim, 3 * dim), "proj": linear(dim, dim),
        "norm2": norm(), "fc1": linear(dim, 4 * dim), "fc2": linear(4 * dim, dim),
    }  # fmt: skip
    return {
        "patch": linear(3 * config.patch**2, dim),
        "cls": jnp.zeros((1, 1, dim)),
        "pos": normal(1, (config.image // config.patch) ** 2 + 1, dim),
        "blocks": [make_block() for _ in range(config.depth)],
        "norm": norm(),
        "head": linear(dim, 10),
    }


def linear(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def layer_norm(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p["w"] + p["b"]


def block(p: dict[str, Any], x: jax.Array, heads: int) -> jax.Array:
    b, t, d = x.shape
    qkv = linear(p["qkv"], layer_norm(p["norm1"], x)).reshape(b, t, 3, heads, d // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, heads, T, d) each
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) * (d // heads) ** -0.5)  # (B, heads, T, T)
    x = x + linear(p["proj"], (weights @ v).transpose(0, 2, 1, 3).reshape(b, t, d))
    return x + linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], layer_norm(p["norm2"], x)), approximate=False))


def logits_of(p: dict[str, Any], images: jax.Array, config: Config) -> jax.Array:
    b, side, patch = len(images), config.image // config.patch, config.patch
    x = images.reshape(b, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    x = linear(p["patch"], x.reshape(b, side * side, 3 * patch * patch))  # (B, T - 1, dim)
    x = jnp.concatenate([jnp.broadcast_to(p["cls"], (b, 1, config.dim)), x], 1) + p["pos"]
    for p_block in p["blocks"]:
        x = block(p_block, x, config.heads)
    return linear(p["head"], layer_norm(p["norm"], x[:, 0]))  # (B, 10)


def loss_of(p: dict[str, Any], images: jax.Array, labels: jax.Array, config: Config) -> jax.Array:
    log_p = jax.nn.log_softmax(logits_of(p, images, config))
    return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def adamw_step(state: tuple[Any, ...], images: jax.Array, labels: jax.Array, config: Config) -> tuple[Any, jax.Array]:
    """Return the new (parameters, first moments, second moments, steps), in the old ones' memory, and the loss."""
    p, m, v, t = state
    loss, g = jax.value_and_grad(loss_of)(p, images, labels, config)
    t = t + 1
    m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, g)
    v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, g)

    def update(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return p * (1 - LR * DECAY) - LR * (m / (1 - BETA1**t)) / (jnp.sqrt(v / (1 - BETA2**t)) + EPS)

    return (jax.tree.map(update, p, m, v), m, v, t), loss


def main() -> None:
    config, name, args = arguments(__doc__)
    for_parameters, for_images, for_labels = jax.random.split(jax.random.key(0), 3)
    parameters = make_parameters(config, for_parameters)
    images = jax.random.normal(for_images, (config.batch, 3, config.image, config.image))
    labels = jax.random.randint(for_labels, (config.batch,), 0, 10)
    losses: list[float] = []
    if args.mode == "train":
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        state = (parameters, zeros(parameters), zeros(parameters), jnp.float32(0))

        def step(images: jax.Array, labels: jax.Array) -> None:
            nonlocal state
            state, loss = adamw_step(state, images, labels, config)
            losses.append(float(loss))  # waits for the step's end
    else:
        forward = jax.jit(functools.partial(logits_of, config=config))
        step = lambda images, labels: forward(parameters, images).block_until_ready()
    times = time_steps(step, images, labels, config.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report(f"JAX {name}", config, times, losses, peak)


if __name__ == "__main__":
    main()
