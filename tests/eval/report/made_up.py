# SPDX-License-Identifier: Apache-2.0
"""Made-up results, for reports."""

from ropewalk.eval.results import Config, Facts, Row, Run

SELFEXTEND = "selfextend(group_size=8, window=1024)"
FACTS = Facts(
    task="passkey", version=1, model="m", model_hash="h", dtype="float32", device="cpu", seed=0, commit="abc",
    versions={"torch": "2.13.0"},
)  # fmt: skip
SETTINGS = {"lengths": [4096, 8192], "depths": [0.0, 1.0], "samples": 2}


def config(task="passkey", methods=("unmodified", SELFEXTEND), **changes):
    return Config(
        **{"task": task, "version": 1, "settings": SETTINGS, "methods": methods, "model": "m", "model_hash": "h"}
        | {"seed": 0}
        | changes
    )


def row(method, score, length=4096, depth=0.0, sample=0, task="passkey", facts=FACTS, cell=None, metric="exact_match"):
    """A score that is a text is an error."""
    return Row(
        method=method,
        example=f"{length}-{depth}-{sample}",
        cell=cell or {"length": length, "depth": depth},
        scores={} if isinstance(score, str) else {metric: score},
        seconds=0.5,
        error=score if isinstance(score, str) else None,
        facts=facts.model_copy(update={"task": task}),
    )


def grid(method, score):
    """All rows that `SETTINGS` ask for, by a function of length, depth and sample."""
    return [
        row(method, score(length, depth, sample), length, depth, sample)
        for length in SETTINGS["lengths"]
        for depth in SETTINGS["depths"]
        for sample in range(SETTINGS["samples"])
    ]


def run(rows, folder="results/a", **changes):
    return Run(folder, config(**changes), tuple(rows))


def found(method):
    """The unmodified model finds what is short or at the end; others find all."""
    return lambda length, depth, sample: float(method != "unmodified" or length == 4096 or depth == 1)


def full(methods=("unmodified", SELFEXTEND), folder="results/a", **changes):
    return run([one for method in methods for one in grid(method, found(method))], folder, methods=methods, **changes)
