"""What a pattern search may be told: what is out of range is refused by name. `PatternSearch` says what it means."""

import math
from collections.abc import Sequence
from typing import Any

from config.did_you_mean import one_of

ALL = ("*",)  # names of all matrices

RECOMMENDED: dict[str, Any] = dict(  # where configs/optimizer/pattern_search.yaml differs from the defaults
    radius=0.05, poll="complete", polls_per_step=384, last_group_share=0.97, one_sided=True,
    step_lengths=[0.014, 0.007, 0.0035], join_improving=True, weight_decay=0.1, contraction=1.0,
)  # fmt: skip


def check_options(options: dict[str, Any]) -> None:
    """Raise a ValueError that names the option which is out of range, or lacks another one that it needs."""
    one_of("poll", options["poll"], ("opportunistic", "complete"))
    nodes, share, polls = (options[name] for name in ("nodes_per_step", "last_group_share", "polls_per_step"))
    least = 0 if nodes else 1
    if polls is not None and polls < least:
        raise ValueError(f"polls_per_step={polls} must be at least {least}, or None (null in YAML) for no limit")
    if nodes is not None and (nodes < 1 or not options["step_lengths"]):
        raise ValueError(
            f"nodes_per_step={nodes} must be at least 1 and needs step_lengths, the search step that uses the slopes "
            "of nodes; or None (null in YAML) to poll no nodes"
        )
    rows = options["rows_per_step"]
    if rows is not None and (rows < 1 or not nodes):
        raise ValueError(
            f"rows_per_step={rows} must be at least 1 and needs nodes_per_step, the nodes that are polled on so many "
            "rows of the batch; or None (null in YAML) to poll them on all of it"
        )
    if options["orthogonalise"] and not nodes:
        raise ValueError(
            f"orthogonalise={options['orthogonalise']} needs nodes_per_step: slopes of single weights are too few and "
            "too old for it; or 0 to leave the direction of the search step as it is"
        )
    if options["orthogonalise"] and share is not None:
        raise ValueError(
            f"orthogonalise={options['orthogonalise']} and last_group_share={share} each part the weights in their own "
            "way; use orthogonalise=0 or last_group_share=None (null in YAML)"
        )
    if share is not None and options["weight_decay"] and tuple(options["weight_decay_in"]) != ALL:
        raise ValueError(
            f"weight_decay_in={list(options['weight_decay_in'])} and last_group_share={share} each part the weights in "
            'their own way; use weight_decay_in=["*"] or last_group_share=None (null in YAML)'
        )
    if share is not None and not (0 < share < 1 and polls):
        raise ValueError(
            f"last_group_share={share} must lie in (0, 1) and needs polls_per_step, the polls that are shared out; or "
            "None (null in YAML) to poll all weights equally often"
        )
    if any(not 0 < length < math.inf for length in options["step_lengths"]):
        raise ValueError(f"step_lengths={options['step_lengths']} must be above 0")
    tolerance = options["tolerance"]
    if tolerance is not None and not (0 <= tolerance < math.inf and options["search_first"]):
        raise ValueError(
            f"tolerance={tolerance} must be at least 0 and needs search_first=True, a batch that judges none of its "
            "own slopes; or None (null in YAML) to accept only what improves"
        )
    for name in ("memory", "scale_memory"):
        if options[name] is not None and not 0 <= options[name] < 1:
            raise ValueError(f"{name}={options[name]} must lie in [0, 1); 0 remembers the last slope only")
    if options["fade"] is not None and not options["fade"] > 0:
        raise ValueError(f"fade={options['fade']} must be above 0 steps, or null to never fade")
    if options["linear_decay"] and not (options["step_lengths"] and options["max_evaluations"]):
        raise ValueError(
            "linear_decay=True needs step_lengths, and max_evaluations, at which they reach 0; or use "
            "linear_decay=False for moves that stay as long"
        )


def unread_options(options: dict[str, Any]) -> dict[str, str]:
    """The options that nothing reads beside the others, each with the reason."""
    of_matrices = ("orthogonalise", "weight_decay")
    unread = {f"{name}_in": f"{name}=0 concerns no matrix" for name in of_matrices if not options[name]}
    if not options["step_lengths"]:
        no_search = "there are no step_lengths, and so no search step"
        of_search = ("join_improving", "search_first", "scale_memory", "fade", "weight_decay", "weight_decay_in")
        unread |= dict.fromkeys(of_search, no_search)
        if not options["one_sided"]:
            unread["memory"] = no_search
    elif options["search_first"]:
        unread["join_improving"] = "with search_first the search step comes before the polls"
    elif options["poll"] == "opportunistic":
        unread["join_improving"] = "poll=opportunistic makes these moves already"
    if options["polls_per_step"] == 0:
        of_polls = ("poll", "one_sided", "join_improving", "contraction", "expansion", "max_radius")
        unread |= dict.fromkeys(of_polls, "polls_per_step=0 polls no single weight")
    return unread


def check_group(group: dict[str, Any]) -> None:
    """Raise a ValueError that names what is wrong with a parameter group."""
    ranges = {
        "radius": (0 < group["radius"] < math.inf, "must be above 0 and finite"),
        "contraction": (0 < group["contraction"] <= 1, "must lie in (0, 1]; 0.5 halves the radius, 1 keeps it"),
        "expansion": (1 <= group["expansion"] < math.inf, "must be at least 1; 1 never expands"),
        "min_radius": (0 <= group["min_radius"] < math.inf, "must be at least 0"),
        "max_radius": (group["max_radius"] > 0, "must be above 0"),
        "orthogonalise": (group["orthogonalise"] >= 0, "must be at least 0 iterations; 0 orthogonalises nothing"),
        "weight_decay": (0 <= group["weight_decay"] < math.inf, "must be at least 0; 0 takes nothing off the weights"),
    }
    for name, (fits, rule) in ranges.items():
        if not fits:
            raise ValueError(f"{name}={group[name]} {rule}")


def check_shares(options: dict[str, Any], sizes: Sequence[int], shares: Sequence[float]) -> None:
    """Raise a ValueError if the shares of the polls have a step poll a group, of so many weights, more than once."""
    if len(shares) == 1:  # nothing is shared out: a pass takes each weight once
        return
    polls = options["polls_per_step"] / (1 if options["one_sided"] else 2)
    for size, share in zip(sizes, shares, strict=True):
        if polls * share + 2 > size:  # 2: what rounding may add
            raise ValueError(
                f"last_group_share={options['last_group_share']} of polls_per_step={options['polls_per_step']} polls a "
                f"group of {size} weights more than once in a step; use another share, or fewer polls"
            )
