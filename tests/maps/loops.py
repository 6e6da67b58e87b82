# SPDX-License-Identifier: Apache-2.0
"""Relative positions written as loops over pairs, from the definitions alone.

Nothing here uses the arithmetic of `ropewalk.maps`: a map is read only for its parameters. A map that has a loop here
is held to it by the generic tests.
"""

import math


def table(position_map, length):
    """Row m is the query, column n the key; -1 where the key is not seen: in the future, or hidden."""
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


def released_group_of(capacity, rate, token):
    """Index that the authors' kernel writes for a token: pass by pass over the group sizes, as it does, each pass
    from where the one before ended, and over what that wrote."""

    def edge(size):
        return (math.log(size * capacity - size) - math.log(capacity - size)) / rate

    # Of each size its first and last group; what the kernel never fills in stays 0, which counts as one group.
    first, last = [0] * (capacity + 1), [0] * (capacity + 1)
    for size in range(1, capacity - 1):
        first[size], last[size] = math.ceil(edge(size)), math.floor(edge(size + 1))
        if last[size] == edge(size + 1):
            last[size] -= 1
    last[0] = -1
    written, begin = 0, 0
    for size in range(1, capacity):
        groups, next_groups = (last[s] - first[s] + 1 for s in (size, size + 1))
        if groups <= 0 or next_groups <= 0:
            continue
        end = begin + size * groups
        # Nothing is ever written for token 0.
        if 0 < token >= begin and (token <= end or size == capacity - 1):
            written = last[size - 1] + (token - begin + size - 1) // size
        begin = end
    return written


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
    if position_map.grouping != "distance":
        group = group_of if position_map.grouping == "anchored" else released_group_of
        return window + group(capacity, rate, m - window) - group(capacity, rate, n)
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


def _dual_chunk(position_map, m, n):
    s, c = position_map.chunk_size, position_map.chunk_size + position_map.window
    # The paper's lists of positions, each for one chunk: eq. 2, 5 and 7.
    keys = list(range(s))
    intra, inter = keys, [c - 1] * s
    successive = ([s + i for i in range(c - s)] + [c - 1] * s)[:s]
    chunks_between = m // s - n // s
    queries = intra if chunks_between == 0 else successive if chunks_between == 1 else inter
    return queries[m % s] - keys[n % s]


def _streaming_llm(position_map, m, n):
    # Positions are places among the tokens that are kept.
    kept = [t for t in range(m + 1) if t < position_map.sinks or t > m - position_map.window]
    return kept.index(m) - kept.index(n) if n in kept else -1


def _lm_infinite(position_map, m, n):
    if n < position_map.sinks or m - n < position_map.window:
        return min(m - n, position_map.window)
    return -1


def _sliding_window(position_map, m, n):
    return m - n if m - n < position_map.window else -1


def _infinite(position_map, m, n):
    w = position_map.window
    return m % w - n % w if m // w == n // w else -1


RULES = {
    "identity": _identity,
    "selfextend": _selfextend,
    "rerope": _rerope,
    "leaky-rerope": _leaky_rerope,
    "self": _self,
    "dual-chunk": _dual_chunk,
    "streaming-llm": _streaming_llm,
    "lm-infinite": _lm_infinite,
    "sliding-window": _sliding_window,
    "infinite": _infinite,
}
