from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outgrow.errors import OutgrowError
from outgrow.spaces import Dense, Lift, copies, identity, isometry, mean, pad

SIZES = st.tuples(st.integers(1, 40), st.integers(0, 60)).map(lambda pair: (pair[0], pair[0] + pair[1]))
CONSTRUCTORS = [copies, isometry, pad]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@given(sizes=SIZES)
def test_reading_undoes_writing(constructor, sizes):
    assert constructor(*sizes).identity_error() < 1e-12


@given(sizes=SIZES)
def test_isometry_keeps_lengths(sizes):
    lift = isometry(*sizes)
    x = np.random.default_rng(0).normal(size=sizes[0])
    assert np.isclose(np.linalg.norm(lift.along(x, 0, "write")), np.linalg.norm(x), rtol=1e-12)


def test_copies_are_exact_in_any_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float64):
        tensor = torch.arange(6).to(dtype).reshape(2, 3)
        moved = copies(3, 7).along(tensor, 1, "write")
        assert moved.dtype == dtype
        assert torch.equal(moved, tensor[:, [0, 1, 2, 0, 1, 2, 0]])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_whole_numbers_are_copied_and_not_computed_with(kind):
    whole = kind(np.arange(6).reshape(2, 3))
    for lift, role in ((copies(3, 7), "read"), (isometry(3, 7), "write"), (mean(3, 7), "write"), (Dense(np.ones((7, 3))), "read")):
        with pytest.raises(OutgrowError, match="int64 holds none but whole numbers; give floats"):
            lift.along(whole, 1, role)


def test_the_dual_of_the_dual_is_the_lift():
    lift = isometry(5, 8)
    twice = lift.dual().dual()
    for role in ("write", "read", "gain"):
        np.testing.assert_allclose(twice.scale(role), lift.scale(role))


def test_identity_changes_nothing():
    array = np.random.default_rng(0).normal(size=4)
    np.testing.assert_array_equal(identity(4).along(array, 0, "read"), array)


def test_numpy_and_torch_agree():
    array = np.random.default_rng(0).normal(size=(4, 5))
    lift = isometry(5, 9)
    np.testing.assert_array_equal(lift.along(array, 1, "read"), lift.along(torch.from_numpy(array), 1, "read").numpy())


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@given(
    sources=st.lists(st.tuples(st.integers(-2, 39), st.integers(1, 60)), min_size=1, max_size=8), axis=st.integers(0, 2), scattered=st.booleans()
)  # fmt: skip
def test_runs_of_any_length_move_entry_by_entry(kind, sources, axis, scattered):
    source = np.concatenate([(first + np.arange(length)) % 40 if first >= 0 else np.full(length, first) for first, length in sources])
    if scattered:
        source = np.random.default_rng(0).permutation(source)
    weights = np.random.default_rng(1).uniform(0.5, 2.0, len(source))
    lift = Lift(40, source, weights, weights, weights)
    array = np.random.default_rng(2).normal(size=[40 if place == axis else 3 for place in range(3)])
    old = np.moveaxis(array, axis, 0)
    expected = [w * (old[i] if i >= 0 else 0 * old[0] if i == -1 else old.mean(0)) for i, w in zip(source, weights, strict=True)]
    moved = np.moveaxis(np.asarray(lift.along(kind(array), axis, "write")), axis, 0)
    np.testing.assert_allclose(moved, expected, rtol=1e-14)
    assert not np.signbit(moved[source == -1]).any()


def test_what_a_mark_stands_for_holds_no_number_of_the_source():
    array = np.array([[np.nan, -1.0], [np.inf, -2.0]])
    for size in (3, 60):
        np.testing.assert_array_equal(pad(2, size).along(array, 1, "write")[:, 2:], 0.0)
    assert np.isnan(mean(2, 3).along(array, 1, "write")[0, 2])


def test_mistakes_name_both_sizes():
    with pytest.raises(OutgrowError, match="space of 8 to 5"):
        copies(8, 5)
    with pytest.raises(OutgrowError, match=r"size 4.*space of 3"):
        copies(3, 6).along(np.zeros(4), 0, "write")
    assert isinstance(identity(2), Lift)
