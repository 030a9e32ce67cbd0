"""Counts that come out as a person works them out on paper."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal


def exact_count(factor: float | Decimal, num_rows: int) -> int:
    """factor · num_rows as decimals, rounded half up: 3.5 · 1000 = 3500, 0.0999 · 1000 = 100, 1.005 · 1000 = 1005."""
    return int((Decimal(str(factor)) * num_rows).quantize(Decimal(1), rounding=ROUND_HALF_UP))
