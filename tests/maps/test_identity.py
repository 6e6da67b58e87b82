# SPDX-License-Identifier: Apache-2.0
import pytest

from ropewalk import Identity
from ropewalk.maps import LengthError


def test_true_distances():
    assert Identity().relative_positions(3).tolist() == [[0, -1, -1], [1, 0, -1], [2, 1, 0]]
    assert Identity().max_length(4096) == 4096
    assert Identity().recommended_length(4096) == 4096


def test_for_length_goes_up_to_the_trained_window():
    assert Identity.for_length(4096, 4096) == Identity()
    with pytest.raises(LengthError, match=r"4096.*not 4097"):
        Identity.for_length(4097, 4096)
