# SPDX-License-Identifier: Apache-2.0
import warnings

from transformers.utils import logging

from ropewalk.integrations.transformers.quiet import quiet


def test_quiet_is_undone():
    before, filters = logging.get_verbosity(), list(warnings.filters)
    with quiet():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before
    assert warnings.filters == filters
