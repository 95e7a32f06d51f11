"""What tests of runs share: the programs of a run that an earlier one of this process had, too."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from train import step
from train.run.recipes import Recipe


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Have one program for equal arguments, but not of adapters: it would keep their base alive."""
    made = functools.cache(make)

    @functools.wraps(make)
    def run(*args: Any, **options: Any) -> Any:
        return (make if options["attach"] else made)(*args, **options)

    return run


_STEP, _EVALUATION = _once(step.make_step), _once(step.make_evaluation)
_OPTIMIZER = functools.cache(Recipe.optimizer)  # its schedule is a new function otherwise


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """To trace and lower the tiny step again is two fifths of what a run of it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_step", _STEP)
        patch.setattr(step, "make_evaluation", _EVALUATION)
        patch.setattr(Recipe, "optimizer", _OPTIMIZER)
        yield
