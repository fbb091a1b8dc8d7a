"""What ``minivit bench`` says of speeds, on the CPU and on a GPU: median and middle half, beside a ceiling."""

from __future__ import annotations

from typing import Any

SECONDS, FEWEST, MOST = 5.0, 5, 100  # how long to measure, in how many steps at least and at most


def random_batch(model: Any, batch: int) -> tuple[Any, Any]:
    """Return random images for a model, from -1 to 1, and labels."""
    from minivit.backend import Key, random_bits, uniform

    images = uniform(Key(0), (batch, *model.settings.image_shape)) * 2 - 1
    return images, (random_bits(Key(1), (batch,)) % model.settings.num_classes).astype("int64")


def speeds(times: dict[str, list[float]], batch: int, flops: dict[str, int]) -> list[dict[str, Any]]:
    """Return for each kind of work its median, with the quartiles as ``…_range``, in seconds and images a second."""
    import numpy as np

    rows = []
    for work, seconds in times.items():
        low, middle, high = np.percentile(seconds, [25, 50, 75]).tolist()
        row: dict[str, Any] = {"work": work, "images_per_second": batch / middle}
        row |= {"images_per_second_range": [batch / high, batch / low], "seconds": middle, "seconds_range": [low, high]}
        rows.append(row | {"flops": flops[work], "flops_per_second": flops[work] / middle})
    return rows


def speed_table(
    times: dict[str, list[float]], batch: int, flops: dict[str, int], ceiling: float, name: str = "sgemm"
) -> str:
    """Return a row for each kind of work: median speed and time with their quartiles, and FLOP/s beside the ceiling's.

    ``name`` is what the ceiling is called.
    """
    from minivit.show.text import text_table

    rows = []
    for row in speeds(times, batch, flops):
        (slow, fast), (low, high) = row["images_per_second_range"], row["seconds_range"]
        cells = [figure(row["images_per_second"]), f"{figure(slow)} to {figure(fast)}"]
        cells += [figure(row["seconds"] * 1e3), f"{figure(low * 1e3)} to {figure(high * 1e3)}"]
        share = f"{row['flops_per_second'] / ceiling:.0%}"
        rows.append([row["work"], *cells, figure(row["flops_per_second"] / 1e9), share])
    rows.append([name, "", "", "", "", figure(ceiling / 1e9), "100%"])
    return text_table(["", "images/s", "range", "ms", "range", "GFLOP/s", f"of {name}"], rows, right=range(1, 7))


def figure(number: float) -> str:
    """Return a number with at least three digits: "0.120", "12.3", "1,234"."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"
