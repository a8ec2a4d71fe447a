"""msdiff boundary: a noise level in the conventions of different code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from ..conventions import CONVENTIONS, STEPS, Boundary, boundary, boundary_lines
from .options import one_of, print_json, say


@dataclass(kw_only=True)
class ConvertBoundary:
    """Print a boundary between experts, given in one convention, in all others.

    Two-expert models compare a time with the boundary. It must be clear whether that is the time before the shift (t-flow,
    index, step) or after it (t-shifted, boundary-ratio): with a shift of 5, boundary_ratio 0.9 is t-flow 0.643.

    Examples
      msdiff boundary 0.9 --as boundary-ratio --shift 5
      msdiff boundary 0.417 --as index --shift 5
      msdiff boundary 2.5103 --json
    """

    value: Annotated[Positional[float], tyro.conf.arg(metavar="VALUE")]
    """The boundary."""
    convention: Annotated[str, tyro.conf.arg(name="as", metavar=one_of(CONVENTIONS))] = "sigma"
    """What VALUE is."""
    shift: float = 1.0
    """Shift of rectified flow's times; 1 is none."""
    steps: int = STEPS
    """Number of steps."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        """Run the command."""
        found = boundary(self.value, self.convention, shift=self.shift, steps=self.steps)
        if self.json:
            print_json(boundary_json(found))
        else:
            say("\n".join(boundary_lines(found)))


def boundary_json(found: Boundary) -> dict[str, Any]:
    """Return a boundary in all conventions as JSON."""
    named = {name.replace("-", "_"): value for name, value in found.conventions().items()}
    return {**dataclasses.asdict(found), **named, "steps_above": found.steps_above}
