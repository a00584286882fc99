"""Write quantities for people: three or four digits and a unit."""

from collections.abc import Sequence


def count(number: int) -> str:
    """Write a number of parameters."""
    if number < 1e4:
        return str(number)
    if number < 1e6:
        return f"{number / 1e3:.4g} k"
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def size(number: float) -> str:
    """Write a number of bytes."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def perplexity(value: float) -> str:
    """Write a perplexity."""
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def some(names: Sequence[str], most: int = 3) -> str:
    """Write the first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def duration(seconds: float) -> str:
    """Write a time as people do: 40 seconds, 1.7 minutes, 12 minutes, 3.5 hours, 2.1 days."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if (value := seconds / length) >= 1.5:
            return f"{value:.1f} {unit}" if value < 10 and value != round(value) else f"{value:,.0f} {unit}"
    whole = max(1, round(seconds))
    return f"{whole} second{'s' * (whole > 1)}"
