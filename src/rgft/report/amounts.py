"""Numbers as people read them: FLOPs, bytes, seconds, shares, counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "n/a"
_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si_unit(value: float) -> tuple[float, str]:
    """The largest SI step that fits into `value`, and its prefix.

    Example:
        >>> si_unit(3.2e12)
        (1000000000000.0, 'T')
    """
    return next(((size, prefix) for size, prefix in _SI if abs(value) >= size), (1.0, ""))


def flops(value: float) -> str:
    """Floating-point operations.

    Example:
        >>> flops(3.214e12)
        '3.21 TFLOP'
    """
    if not math.isfinite(value):
        return MISSING
    size, prefix = si_unit(value)
    return f"{value / size:.3g} {prefix}FLOP"


def count(value: float) -> str:
    """How many of something.

    Example:
        >>> count(22_713_216)
        '22.7 M'
    """
    if not math.isfinite(value):
        return MISSING
    size, prefix = si_unit(value)
    return f"{value / size:.3g} {prefix}".strip()


def memory(value: float) -> str:
    """Bytes.

    Example:
        >>> memory(1_503_238_553)
        '1.4 GiB'
    """
    if not math.isfinite(value):
        return MISSING
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Wall-clock time.

    Example:
        >>> duration(42.31), duration(125), duration(7380)
        ('42.3 s', '2 min 5 s', '2 h 3 min')
    """
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def share(value: float) -> str:
    """A part of a whole, in percent.

    Example:
        >>> share(0.3117)
        '31.2%'
    """
    return f"{100 * value:.1f}%" if math.isfinite(value) else MISSING


def share_ticks(top: float) -> list[float]:
    """Round shares from 0 to `top` that lie about evenly on a square-root scale.

    Example:
        >>> share_ticks(0.51)
        [0.0, 0.02, 0.08, 0.2, 0.3, 0.5]
    """
    rounded = {float(f"{top * (part / 5) ** 2:.1g}") for part in range(6)}
    return sorted(value for value in rounded if value <= top)


def metric(value: float | None) -> str:
    """A metric or a loss.

    Example:
        >>> metric(0.93449), metric(12.5), metric(None)
        ('0.934', '12.5', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def labels(names: Sequence[str], limit: int) -> list[str]:
    """Dotted names as labels of at most `limit` characters.

    Words without which the names still differ are left out, the commonest first, until all fit;
    those before a number stay. What is still too long loses its middle.

    Example:
        >>> labels([f"bert.encoder.layer.{i}.output.dense.lora.default" for i in (0, 1)], 20)
        ['layer.0.lora.default', 'layer.1.lora.default']
        >>> labels(["bert.pooler", "classifier"], 20)
        ['bert.pooler', 'classifier']
    """
    words = [name.split(".") for name in names]
    counts = Counter(word for parts in words for word in dict.fromkeys(parts))
    kept = {parts[i] for parts in words for i in range(len(parts) - 1) if parts[i + 1].isdigit()}
    for word, _ in counts.most_common():
        if max(len(".".join(parts)) for parts in words) <= limit:
            break
        if word in kept or word.isdigit():
            continue
        fewer = [[one for one in parts if one != word] or parts for parts in words]
        if len(set(map(tuple, fewer))) == len(set(map(tuple, words))):
            words = fewer
    return [shortened(".".join(parts), limit) for parts in words]


def stages(auto: Mapping[str, Any]) -> str:
    """What each stage of a run with `--budget auto` came to.

    >>> found = [{"share": 0.1, "validation": 0.8}, {"share": 0.2, "validation": 0.79}]
    >>> stages({"stages": found, "chosen": 0})
    '10% 0.8 (kept), 20% 0.79'
    """
    return ", ".join(
        f"{stage['share']:.0%} {stage['validation']:.4g}" + " (kept)" * (i == auto["chosen"])
        for i, stage in enumerate(auto["stages"])
    )


def forgetting(found: Mapping[str, Any]) -> str:
    """What an ability was before and after.

    >>> forgetting({"of": "stsb", "metric": "spearman", "before": 0.8212, "after": 0.79})
    'stsb: spearman 0.8212 before, 0.79 after'
    """
    before, after = (
        f"{value:.4g}" if value is not None and math.isfinite(value) else "not finite"
        for value in (found["before"], found["after"])
    )
    return f"{found['of']}: {found['metric']} {before} before, {after} after"


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters; the middle gives way to an ellipsis.

    Example:
        >>> shortened("encoder.layer.11.attention", 12)
        'encode…ntion'
    """
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"
