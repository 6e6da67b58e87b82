"""Relative positions written as loops over pairs, from the definitions alone.

Nothing here uses the arithmetic of `ropewalk.maps`: a map is read only for its parameters.
"""

import math


def table(position_map, length):
    """Row m is the query, column n the key; -1 where the key is in the future."""
    rule = RULES[position_map.name]
    rows = []
    for m in range(length):
        row = []
        for n in range(length):
            if n > m:
                row.append(-1)
            elif m < position_map.start:
                row.append(m - n)
            else:
                row.append(rule(position_map, m, n))
        rows.append(row)
    return rows


def largest(position_map, length):
    """Largest entry of the table; -1 for a text without tokens."""
    return max((entry for row in table(position_map, length) for entry in row), default=-1)


def group_size(capacity, rate, group):
    """Tokens in a group of SELF."""
    return min(math.floor(capacity / (1 + (capacity - 1) * math.exp(-rate * group))), capacity - 1)


def group_of(capacity, rate, token):
    """Index of the group that holds a token."""
    group, end = 0, group_size(capacity, rate, 0)
    while token >= end:
        group += 1
        end += group_size(capacity, rate, group)
    return group


def _identity(position_map, m, n):
    return m - n


def _selfextend(position_map, m, n):
    size, window = position_map.group_size, position_map.window
    if m - n < window:
        return m - n
    return (m // size + window - window // size) - n // size


def _rerope(position_map, m, n):
    return min(m - n, position_map.window)


def _leaky_rerope(position_map, m, n):
    factor, window = position_map.factor, position_map.window
    if m - n < window:
        return m - n
    return (m / factor + window - window / factor) - n / factor


def _self(position_map, m, n):
    capacity, rate, window = position_map.capacity, position_map.rate, position_map.window
    if m - n < window:
        return m - n
    if position_map.grouping == "anchored":
        return window + group_of(capacity, rate, m - window) - group_of(capacity, rate, n)
    # By distance: walk outwards from the window, group by group, and note where the present size began.
    size, first, first_group = 1, window, 0
    end, group = window, 0
    while True:
        following = group_size(capacity, rate, group)
        if following > size:
            size, first, first_group = following, end, group
        end += following
        group += 1
        if m - n < end:
            break
    shift = window + first_group - first // size
    return m // size + shift - n // size


RULES = {
    "identity": _identity,
    "selfextend": _selfextend,
    "rerope": _rerope,
    "leaky-rerope": _leaky_rerope,
    "self": _self,
}
