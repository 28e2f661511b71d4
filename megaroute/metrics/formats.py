"""Numbers as people read them, for log lines and the report."""

import math

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 12.3k, or 12.3 kFLOP/s with a unit."""
    space = " " if unit else ""
    for factor, prefix in _PREFIXES:
        # 999.5 and above would round to 1e+03 under the smaller prefix.
        if math.isfinite(value) and abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{space}{prefix}{unit}"
    return f"{value:.3g}{space}{unit}"


def duration(seconds: float) -> str:
    """45s, 1m 32s, 5h 03m, 2d 07h."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = max(0, round(seconds))
    for big, small, labels in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= big:
            return f"{whole // big}{labels[0]} {whole % big // small:02d}{labels[1]}"
    return f"{whole}s"


def percent(share: float) -> str:
    """0.4127 as 41.3 %."""
    return f"{100 * share:.1f} %"


def unit_name(label: str) -> str:
    """A routed unit in words: `layer 7`, or `layer 7 mlp`."""
    return f"layer {label}"
