"""Which epochs a script of several fits trains when it is started again."""

from __future__ import annotations

import pytest

from flax_partial.callbacks._keras_epochs import FitEpochs

EPOCH = 4  # steps
Fit = tuple[int, int]  # its `initial_epoch` and its `epochs`


def trained(
    fits: list[Fit], epochs: FitEpochs, *, at: int = 0, most: int = 10**9
) -> tuple[list[list[int]], int]:
    """The epochs that each `fit` of a script trains, and those of its last one as Keras counts."""
    said: list[list[int]] = []
    of_fit = 0
    for initial, end in fits:
        said.append([])
        first = epochs.begin_fit(at * EPOCH, end)
        for epoch in range(first or initial, end):  # as Keras does
            if most == 0:
                return said, of_fit
            assert epochs.begin_epoch(epoch) == at
            said[-1].append(epoch)
            of_fit, epochs.done = epoch + 1, epochs.begin_epoch(epoch) + 1
            at, most = at + 1, most - 1
    return said, of_fit


RELATIVE, ABSOLUTE, ONE = [(0, 2), (0, 3)], [(0, 2), (2, 5)], [(0, 5)]
# A script, the epochs after which it is killed, the script then, and what each of its fits trains.
CASES: dict[str, tuple[list[Fit], int, list[Fit], list[list[int]]]] = {
    "all was done": (RELATIVE, 5, RELATIVE, [[], []]),
    "stopped in the first": (RELATIVE, 1, RELATIVE, [[1], [0, 1, 2]]),
    "stopped between two": (RELATIVE, 2, RELATIVE, [[], [0, 1, 2]]),
    "stopped in the second": (RELATIVE, 3, RELATIVE, [[], [1, 2]]),
    "one fit more": (RELATIVE, 5, [*RELATIVE, (0, 1)], [[], [], [0]]),
    "one fit in their place": (RELATIVE, 4, [(0, 7)], [[4, 5, 6]]),
    "counted on, all was done": (ABSOLUTE, 5, ABSOLUTE, [[], []]),
    "counted on, stopped in the first": (ABSOLUTE, 1, ABSOLUTE, [[1], [2, 3, 4]]),
    "counted on, stopped in the second": (ABSOLUTE, 3, ABSOLUTE, [[], [3, 4]]),
    "counted on, one fit more": (ABSOLUTE, 5, [*ABSOLUTE, (5, 6)], [[], [], [5]]),
    "one fit": (ONE, 3, ONE, [[3, 4]]),
    "one fit, more epochs": (ONE, 5, [(0, 7)], [[5, 6]]),
    "one fit, fewer epochs": (ONE, 5, [(0, 3)], [[]]),
}


@pytest.mark.parametrize("case", CASES)
def test_script_that_is_started_again_goes_on_where_it_stopped(case: str) -> None:
    before, most, after, expected = CASES[case]
    _, of_fit = trained(before, FitEpochs(), most=most)
    epochs = FitEpochs()
    epochs.restore(most * EPOCH, done=most, of_fit=of_fit)
    said, _ = trained(after, epochs, at=most)
    assert said == expected


def test_model_that_was_trained_since_begins_its_fits_as_they_say() -> None:
    epochs = FitEpochs()
    epochs.restore(8, done=2, of_fit=2)
    assert epochs.begin_fit(12, 3) is None
    assert epochs.begin_fit(8, 3) is None
