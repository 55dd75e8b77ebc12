"""Which configurations a call's kernels have, and the call with one of them."""

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from ofb_kernels.kernels import tuning

Run = Callable[[], object]


class Choice(NamedTuple):
    """A configuration of a kernel, for a launch with these sizes."""

    kernel: str
    sizes: tuple[int, ...]
    configuration: dict

    def __str__(self) -> str:
        """Short: "backward_query 64×32 w4 s2" of masked_attention.backward_query with its tile, warps and stages."""
        tile = "×".join(str(value) for name, value in self.configuration.items() if not name.startswith("num_"))
        numbers = {"w": "num_warps", "s": "num_stages"}
        counts = [f"{sign}{self.configuration[name]}" for sign, name in numbers.items() if name in self.configuration]
        return " ".join([self.kernel.split()[0].split(".")[-1], tile, *counts])


def defaults_and_others(run: Run) -> tuple[list[Choice], list[Choice]]:
    """The default configuration of every kernel of a call that has several, and the other ones that are shipped."""
    defaults, others = {}, {}

    def look(kernel, candidates, sizes, like, launch):
        if len(candidates) > 1:
            defaults[kernel] = Choice(kernel, tuple(sizes), candidates[0])
            others[kernel] = [Choice(kernel, tuple(sizes), each) for each in candidates[1:]]
        return candidates[0]

    with mock.patch.object(tuning, "choose", look):
        run()
    return list(defaults.values()), [choice for each in others.values() for choice in each]


def with_defaults(run: Run, but: Choice | None = None) -> Run:
    """The call with every kernel in its default configuration, whatever was measured; but one kernel in another."""

    def choose(kernel, candidates, sizes, like, launch):
        return but.configuration if but is not None and kernel == but.kernel else candidates[0]

    def configured() -> object:
        with mock.patch.object(tuning, "choose", choose):
            return run()

    return configured

