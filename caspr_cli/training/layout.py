"""The first page of TensorBoard: the curves that optimizers are compared by.

It opens on TIME SERIES, whatever was written, and groups the curves there by the alphabet, so those of a comparison are
written a second time under a name that comes first. CUSTOM SCALARS shows a page that each run writes. TensorBoard puts
the pages of a directory together, and charts that are equal become one: a chart here depends on nothing but its title,
and all runs have the same categories.
"""

import re

FIRST = "comparison"
DIAGNOSTICS = ("condition", "damping_share", "residual", "graft_ratio", "adam_cosine")
Layout = dict[str, dict[str, list[str | list[str]]]]  # category: title: [kind, tags], as torch's writer takes it


def compared(metric: str) -> tuple[str, str]:
    """Return the tags of a comparison by ``metric``, as ``val/loss``."""
    return metric, "train/loss"


def layout(metric: str) -> Layout:
    return {
        FIRST: {tag: _lines(tag) for tag in compared(metric)},
        "cost": {
            "milliseconds a step": _lines("time/step_ms"),
            "units a second": ["Multiline", ["time/.*_per_second$"]],  # tokens, words, images
            "seconds of training": _lines("time/seconds"),
        },
        "optimizer": {
            **{f"{name.replace('_', ' ')} (median)": _lines(f"optim/{name}/p50") for name in DIAGNOSTICS},
            "adam cosine (largest)": _lines("optim/adam_cosine/max"),
            "norm of the update": _lines("norm/update"),
            "update over weights": _lines("norm/update_over_weights"),
        },
    }


def _lines(tag: str) -> list[str | list[str]]:
    """Return a chart with a line for each run; TensorBoard matches a regular expression from the start of a tag."""
    return ["Multiline", [f"{re.escape(tag)}$"]]
