# SPDX-License-Identifier: Apache-2.0
from ropewalk.integrations.transformers.versions import versions


def test_versions():
    assert set(versions()) == {"ropewalk", "torch", "transformers", "python"}
