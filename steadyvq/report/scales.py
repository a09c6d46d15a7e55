# SPDX-License-Identifier: Apache-2.0
"""Axes: ranges, ticks at round numbers, and their labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# From this ratio of the largest to the smallest value on, a linear axis shows a flat line and a spike.
LOG_FROM = 30.0
Number = int | float
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """Maps values to positions along an axis.

    Attributes:
        low: value at the start of the axis.
        high: value at its end.
        start: position of `low`.
        end: position of `high`.
        log: whether equal ratios, not equal differences, are equally long.
    """

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        """Return the position of a value."""
        low, high, at = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values within the range."""
        return _log_ticks(self.low, self.high, count) if self.log else _linear_ticks(self.low, self.high, count)


def value_scale(values: Sequence[float], start: Number, end: Number, limits: tuple[float, float] | None) -> Scale:
    """Choose the range of an axis for values: the given limits, or linear or logarithmic as the values ask for."""
    if limits is not None:
        return Scale(min(limits[0], *values), max(limits[1], *values), start, end)
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_FROM:
        return Scale(low / 1.15, high * 1.15, start, end, log=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(high) * 0.1 or 1.0
        return Scale(low - margin, high + margin, start, end)
    margin = 0.06 * (high - low)
    # Zero is worth showing where it costs little of the picture.
    bottom = 0.0 if 0 <= low < 0.4 * high else low - margin
    return Scale(bottom, high + margin, start, end)


def tick_label(value: Number, percent: bool = False) -> str:
    """Return a short text for a round number."""
    if percent:
        return f"{float(f'{100 * value:.6g}'):g} %"
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        exponent = math.floor(math.log10(size) + 1e-9)
        mantissa = float(f"{value / 10.0**exponent:.6g}")
        power = f"10{str(exponent).translate(_SUPERSCRIPT)}"
        return power if mantissa == 1 else f"{mantissa:g}·{power}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            divisor = 1e3 if letter == "k" else unit
            return f"{float(f'{value / divisor:.6g}'):g}{letter}"
    return f"{float(f'{value:.6g}'):,.10g}"


def value_label(value: float, percent: bool = False) -> str:
    """Return a measured number with three to four digits."""
    if percent:
        return f"{100 * value:.1f} %"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:#.4g}".rstrip(".") if abs(value) >= 1 else f"{value:#.3g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.2e}"


def _linear_ticks(low: Number, high: Number, count: int) -> list[float]:
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.7 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: Number, high: Number, count: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, -(-(last - first) // (count + 1)))
    candidates = [10.0**e for e in range(first, last + 1) if e % stride == 0]
    inside = [tick for tick in candidates if low <= tick <= high]
    if len(inside) >= 3:
        return inside
    finer = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    return [tick for tick in finer if low <= tick <= high]
