"""What a target means: one budget or several, each an amount of some kind of cost."""

from collections.abc import Mapping

from ofb.supernet.cost import readable

Target = str | float | Mapping[str, str | float]
Limits = Mapping[str, float]  # most of each kind of cost

LEAST = 1000  # MACs, or parameters: an amount below cannot be meant
UNITS = {"macs": "MACs", "params": "parameters", "latency_ms": "ms"}
EXAMPLES = {"macs": '"50%", "0.5", "1.1G", "300M"', "params": '"40%", "0.4", "5M"', "latency_ms": '"60%", "2.5"'}


def amounts(target: Target) -> dict[str, str | float]:
    """The amount of each kind of cost in a target, as it was written.

    A target is an amount of MACs, or {"macs": …, "params": …, "latency_ms": …} with any of these, or the same as
    "macs=…,params=…".

    Raises:
        ValueError: a kind is unknown or comes twice, or there is none.
    """
    if isinstance(target, str) and "=" in target:
        pairs = [[side.strip() for side in part.split("=", 1)] for part in target.split(",") if "=" in part]
        if len(pairs) < target.count(",") + 1 or len({pair[0] for pair in pairs}) < len(pairs):
            raise ValueError(
                f"target: expected KIND=AMOUNT, each kind once, such as macs=50%,params=40%, got {target!r}"
            )
        target = dict(pairs)
    if not isinstance(target, Mapping):
        return {"macs": target}
    if not target:
        raise ValueError(f"target: expected at least one of {', '.join(UNITS)}, got an empty mapping; name a cost")
    unknown = [kind for kind in target if kind not in UNITS]
    if unknown:
        raise ValueError(f"target: expected costs among {', '.join(UNITS)}, got {unknown[0]!r}; rename or remove it")
    return dict(target)


def parse_target(target: Target, dense: Mapping[str, float]) -> dict[str, float]:
    """Limit of each kind of cost: "50%" is a share of the dense network's, "1.1G" or "300M" or a number is an amount.

    Of MACs and parameters, a number up to 1 is a share as well; of milliseconds it is an amount.

    Args:
        target: as `amounts` takes it.
        dense: costs of the dense network.

    Raises:
        ValueError: the target cannot be read.
    """
    return {kind: _limit(kind, amount, dense[kind]) for kind, amount in amounts(target).items()}


def describe_amount(kind: str, amount: float) -> str:
    """An amount with its unit: 2.3 G MACs, 5.5 M parameters, 2.5 ms."""
    return f"{amount:.3g} ms" if kind == "latency_ms" else f"{readable(amount)} {UNITS[kind]}"


def describe_limits(limits: Limits) -> str:
    """All limits of a target with their units."""
    return " and ".join(describe_amount(kind, limit) for kind, limit in limits.items())


def _limit(kind: str, amount: str | float, dense: float) -> float:
    is_counted = kind != "latency_ms"
    factors = {"%": dense / 100} | ({"G": 1e9, "M": 1e6, "K": 1e3} if is_counted else {})
    try:
        text = str(amount).strip()
        factor = factors.get(text[-1:])
        value = float(text if factor is None else text[:-1])
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(
            f"target: expected {UNITS[kind]} such as {EXAMPLES[kind]} or a positive number, got {amount!r}"
        )
    if factor is not None:
        return value * factor if not is_counted else round(value * factor)
    if is_counted and value <= 1:
        return round(value * dense)
    if is_counted and value < LEAST:
        meant = f"{text}%" if value <= 100 else f"{text}M"
        raise ValueError(
            f"target: expected {UNITS[kind]} such as {EXAMPLES[kind]} or a number from {LEAST:,} on, got {amount}; did "
            f"you mean {meant}?"
        )
    return round(value) if is_counted else value
