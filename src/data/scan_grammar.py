"""The grammar of SCAN (Lake and Baroni 2018, "Generalization without Systematicity", supplement).

    C -> S and S | S after S | S
    S -> V twice | V thrice | V
    V -> D opposite/around form | D | U
    D -> U left | U right | turn left | turn right
    U -> walk | look | run | jump

It makes 20,910 commands, all of the released data; `scan_data.py` makes tasks of them.
"""

from functools import cache

VERBS = {"walk": "I_WALK", "look": "I_LOOK", "run": "I_RUN", "jump": "I_JUMP"}
TURNS = {"left": "I_TURN_LEFT", "right": "I_TURN_RIGHT"}
WORDS = (*VERBS, "turn", *TURNS, "opposite", "around", "twice", "thrice", "and", "after")
ACTIONS = (*VERBS.values(), *TURNS.values())


@cache
def sentences() -> dict[str, list[str]]:
    """The 102 commands without "and" and "after" (S in the grammar) and their actions."""
    phrases = {verb: [action] for verb, action in VERBS.items()}  # V in the grammar
    for verb in (*VERBS, "turn"):
        action = [VERBS[verb]] if verb in VERBS else []
        for direction, turn in TURNS.items():
            phrases[f"{verb} {direction}"] = [turn, *action]
            phrases[f"{verb} opposite {direction}"] = [turn, turn, *action]
            phrases[f"{verb} around {direction}"] = [turn, *action] * 4
    repeats = {"": 1, " twice": 2, " thrice": 3}
    return {phrase + word: actions * n for phrase, actions in phrases.items() for word, n in repeats.items()}


@cache
def corpus() -> dict[str, list[str]]:
    """All 20,910 commands and their actions."""
    short, pairs = sentences(), dict[str, list[str]]()
    for a in short:
        pairs |= {f"{a} and {b}": short[a] + short[b] for b in short}
        pairs |= {f"{a} after {b}": short[b] + short[a] for b in short}
    return short | pairs
