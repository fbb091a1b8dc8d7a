"""The training steps that are compared (batch, image, patch, dim, depth, heads), and how many steps are measured."""

CONFIGS = {
    "digits": (64, 8, 2, 64, 4, 4),
    "cifar": (128, 32, 4, 192, 6, 3),
    "ti16": (8, 224, 16, 192, 12, 3),
}
STEPS = {"digits": 60, "cifar": 7, "ti16": 7}


def report(name: str, config: str, times: list[float], peak_bytes: int) -> None:
    """Print the median speed of all but the first three steps, and the peak memory, in the form that is compared."""
    steps = sorted(times[3:])
    speed = CONFIGS[config][0] / steps[len(steps) // 2]
    print(f"{name} {config}: img/s {speed:.1f}  rss_mb {peak_bytes / 2**20:.0f}")
