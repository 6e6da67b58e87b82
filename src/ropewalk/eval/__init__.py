# SPDX-License-Identifier: Apache-2.0
"""Quality on real input. Nothing here imports `ropewalk.ops`."""
