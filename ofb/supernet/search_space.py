"""Candidate sizes of each kind of submodule (OFB, CVPR 2024, section 4.1 and its released search space), and a user's
wishes for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

Size = tuple[int, int]  # heads, channels of each
Listed = (
    Sequence[int] | Mapping[str, Sequence[int]]
)  # a user's sizes for a submodule; of attention {"heads": …, "channels": …}

FEWEST_ROUNDED = 4  # rounding that would leave fewer sizes is left undone: small submodules need a choice, too
HEAD_MULTIPLE = 8  # channels of a head are rounded to no more than this
TOKENS = "tokens"  # the submodule of the number of patches


@dataclass(frozen=True)
class Candidates:
    """The grid of sizes a submodule may end with: each head count with each channel count of a head.

    A submodule without heads has one head. Both tuples ascend, and their last entries are the full size.

    Attributes:
        heads: head counts.
        channels: channel counts of a head.
        excluded: sizes of the grid that are no candidates; the full size may be among them.
    """

    heads: tuple[int, ...]
    channels: tuple[int, ...]
    excluded: frozenset[Size] = frozenset()

    @property
    def full(self) -> Size:
        return self.heads[-1], self.channels[-1]

    @property
    def units(self) -> int:
        return self.heads[-1] * self.channels[-1]

    @property
    def sizes(self) -> list[Size]:
        """The grid, row by row, without what is excluded."""
        return [size for size in product(self.heads, self.channels) if size not in self.excluded]


def embed_candidates(embed_dim: int) -> Candidates:
    """Residual widths D/2 … D in steps of min(D/32, 12), counted down from D."""
    step = max(1, min(embed_dim // 32, 12))
    return Candidates((1,), tuple(sorted(range(embed_dim, (embed_dim + 1) // 2 - 1, -step))))


def attention_candidates(heads: int, head_dim: int) -> Candidates:
    """Heads 2 … H in steps of 2, H itself always among them, times channels d/4 … d in steps of d/8."""
    return Candidates(tuple(sorted({*range(2, heads + 1, 2), heads})), _eighths(head_dim))


def mlp_candidates(hidden: int) -> Candidates:
    """Hidden channels h/4 … h in steps of h/8."""
    return Candidates((1,), _eighths(hidden))


def token_candidates(patches: int, all_patches: int) -> Candidates:
    """Numbers of patches: half to all of those in an image, in steps of an eighth, and as many as there are now."""
    shares = {round(all_patches * eighths / 8) for eighths in range(4, 9)}
    return Candidates((1,), tuple(sorted({patches, *(share for share in shares if 1 <= share < patches)})))


@dataclass(frozen=True)
class SearchSpace:
    """What a user wants of the sizes: each wish narrows the candidates that a submodule has by itself.

    Submodules are named by patterns as of file names: "embed", "mlp*", "attn[0-3]". Where several patterns of one
    option match a submodule, the last one counts; a frozen submodule heeds nothing else.

    Args:
        round_to: residual widths and hidden sizes are moved to the nearest multiple of it, channels of a head to that
            of `round_to` or 8, whichever is smaller. The full size stays as it is, multiple or not. A submodule that
            would be left with fewer than 4 sizes keeps its sizes as they are; 1 rounds nothing.
        freeze: patterns of the submodules that are not searched; they keep their full size.
        candidates: the sizes of the submodules that match a pattern instead of their own, taken as they are: a list;
            for attention {"heads": list, "channels": list} or one of the two. Listed not in the list, the full one
            included, are not chosen.
        bounds: (low, high), as shares of the full size in units (for attention heads × channels), between which the
            candidates of the submodules that match a pattern have to lie, both ends included.
        tokens: whether the number of patches is searched as well, as submodule "tokens"; it is not rounded.

    Raises:
        ValueError: a wish that no model could grant.
    """

    round_to: int = 8
    freeze: Sequence[str] = ()
    candidates: Mapping[str, Listed] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tokens: bool = False

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise ValueError(f"round_to: expected at least 1, got {self.round_to}")
        if isinstance(self.freeze, str):
            raise ValueError(f"freeze: expected a list of patterns, got {self.freeze!r}")
        for pattern, (low, high) in self.bounds.items():
            if not 0 <= low <= high <= 1:
                raise ValueError(f"bounds: expected 0 <= low <= high <= 1 for {pattern!r}, got {low:g} and {high:g}")

    @classmethod
    def parse(
        cls,
        round_to: int = 8,
        freeze: Iterable[str] = (),
        candidates: Iterable[str] = (),
        bounds: Iterable[str] = (),
        tokens: bool = False,
    ) -> "SearchSpace":
        """A search space from text such as a command line has.

        Args:
            round_to: a number.
            freeze: patterns.
            candidates: PATTERN=SIZES each, such as "mlp0=64,96,128"; for attention HEADSxCHANNELS, such as
                "attn*=2,4x32,64", "attn*=2,4x" or "attn*=x32,64".
            bounds: PATTERN=LOW:HIGH each, such as "mlp*=0.5:1".
            tokens: a flag.

        Raises:
            ValueError: it does not look like that.
        """
        lists = _parse_each("candidates", candidates, _parse_sizes, "PATTERN=64,96,128 or PATTERN=2,4x32,64")
        shares = _parse_each("bounds", bounds, _parse_shares, "PATTERN=LOW:HIGH such as mlp*=0.5:1")
        return cls(round_to, tuple(freeze), lists, shares, tokens)

    def narrow(self, candidates: Mapping[str, Candidates]) -> dict[str, Candidates]:
        """The candidates of all submodules of a model after these wishes; the full sizes are the same.

        Args:
            candidates: of each submodule by itself.

        Raises:
            ValueError: a pattern matches no submodule, a size is none that the submodule can have, bounds leave no
                candidate, or nothing is left to search.
        """
        for option in ("freeze", "candidates", "bounds"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(name, pattern) for name in candidates):
                    raise ValueError(f"{option}: expected a pattern of {', '.join(candidates)}, got {pattern!r}")
        narrowed = {name: self._narrow(name, own) for name, own in candidates.items()}
        if all(len(each.sizes) == 1 for each in narrowed.values()):
            raise ValueError(
                "freeze: expected a submodule left to search, got a single size for each; freeze fewer of "
                f"{', '.join(candidates)}, widen bounds or list more candidates"
            )
        return narrowed

    def _narrow(self, name: str, own: Candidates) -> Candidates:
        heads, channels = own.full
        if any(fnmatchcase(name, pattern) for pattern in self.freeze) or (name == TOKENS and not self.tokens):
            return Candidates((heads,), (channels,))
        rounded = own.channels if name == TOKENS else _round(own.channels, self._multiple(name))
        listed = _last_match(name, self.candidates)
        grid = Candidates(own.heads, rounded) if listed is None else _listed(name, own, rounded, listed)
        low, high = _last_match(name, self.bounds) or (0, 1)
        allowed = {(h, c) for h, c in grid.sizes if low <= h * c / own.units <= high}
        if not allowed:
            sizes = ", ".join(f"{h * c / own.units:.3g}" for h, c in grid.sizes)
            raise ValueError(
                f"bounds: expected some candidate of {name} within, got {low:g} to {high:g} of its full size where the "
                f"candidates are {sizes}; widen them or list other candidates"
            )
        return _spanned(allowed, own.full)

    def _multiple(self, name: str) -> int:
        return min(self.round_to, HEAD_MULTIPLE) if _has_heads(name) else self.round_to


def _has_heads(name: str) -> bool:
    return name.startswith("attn")


def _eighths(size: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(size * eighths / 8)) for eighths in range(2, 9)}))


def _round(sizes: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """Each but the last, which is the full size, at the nearest multiple, the larger one of two; see `SearchSpace`."""
    *smaller, full = sizes
    nearest = (max(1, (2 * size + multiple) // (2 * multiple)) * multiple for size in smaller)
    rounded = tuple(sorted({full, *(min(size, full) for size in nearest)}))
    return rounded if len(rounded) >= FEWEST_ROUNDED else sizes


def _listed(name: str, own: Candidates, rounded: tuple[int, ...], listed: Listed) -> Candidates:
    """The grid that a user lists for a submodule; where attention's heads or channels are not listed, its own."""
    if not _has_heads(name):
        if isinstance(listed, Mapping):
            raise ValueError(f"candidates: expected a list of sizes for {name}, which has no heads, got {dict(listed)}")
        return _spanned({(1, size) for size in _checked(name, "sizes", listed, own.channels)}, own.full)
    if not isinstance(listed, Mapping) or not listed or set(listed) - {"heads", "channels"}:
        raise ValueError(
            f'candidates: expected {{"heads": …, "channels": …}} (HEADSxCHANNELS on the command line) for {name}, '
            f"got {listed!r}"
        )
    heads, channels = own.heads, rounded
    if "heads" in listed:
        heads = _checked(name, "heads", listed["heads"], (1, own.full[0]))
    if "channels" in listed:
        channels = _checked(name, "channels", listed["channels"], own.channels)
    return _spanned(set(product(heads, channels)), own.full)


def _checked(name: str, what: str, sizes: Sequence[int], own: tuple[int, ...]) -> tuple[int, ...]:
    """The listed sizes, if a submodule whose own ones are `own` can have them."""
    full = own[-1]
    if not sizes:
        raise ValueError(f"candidates: expected at least one of the {what} of {name}, got an empty list")
    if len(own) == 1 and set(sizes) != {full}:
        raise ValueError(f"candidates: expected {full} alone as the {what} of {name}, which stay, got {list(sizes)}")
    wrong = [size for size in sizes if size != int(size) or not 1 <= size <= full]
    if wrong:
        raise ValueError(f"candidates: expected whole numbers from 1 to {full} as the {what} of {name}, got {wrong}")
    return tuple(sorted(set(sizes)))


def _spanned(sizes: set[Size], full: Size) -> Candidates:
    """The smallest grid that holds these sizes and the full one, all others excluded."""
    heads = tuple(sorted({h for h, _ in sizes} | {full[0]}))
    channels = tuple(sorted({c for _, c in sizes} | {full[1]}))
    return Candidates(heads, channels, frozenset(product(heads, channels)) - sizes)


def _last_match(name: str, wishes: Mapping[str, Any]) -> Any:
    return next((wish for pattern, wish in reversed(wishes.items()) if fnmatchcase(name, pattern)), None)


def _parse_each(option: str, texts: Iterable[str], parse: Any, expected: str) -> dict[str, Any]:
    found = {}
    for text in texts:
        pattern, equals, value = text.partition("=")
        try:
            if not pattern or not equals:
                raise ValueError
            found[pattern] = parse(value)
        except ValueError:
            raise ValueError(f"{option}: expected {expected}, got {text!r}") from None
    return found


def _parse_sizes(text: str) -> Listed:
    heads, times, channels = text.partition("x")
    if not times:
        return _parse_list(text)
    return {key: _parse_list(part) for key, part in (("heads", heads), ("channels", channels)) if part.strip()}


def _parse_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")] if text.strip() else []


def _parse_shares(text: str) -> tuple[float, float]:
    low, high = text.split(":")
    return float(low), float(high)
