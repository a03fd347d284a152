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


def interpret(command: str) -> list[str]:
    """The actions of a command; words are separated by single spaces.

    >>> interpret("jump left after walk twice")
    ['I_WALK', 'I_WALK', 'I_TURN_LEFT', 'I_JUMP']

    Raises:
        ValueError: the command is not in the grammar.
    """
    known = sentences()
    if command in known:
        return list(known[command])
    for word in ("and", "after"):
        left, _, right = command.partition(f" {word} ")
        if left in known and right in known:
            return known[left] + known[right] if word == "and" else known[right] + known[left]
    unknown = [word for word in command.split() if word not in WORDS]
    why = f"unknown words: {', '.join(unknown)}" if unknown else "a command is like: walk left twice and run"
    raise ValueError(f"{command!r} is not in the grammar of SCAN ({why})")


@cache
def corpus() -> dict[str, list[str]]:
    """All 20,910 commands and their actions."""
    short = list(sentences())
    pairs = [f"{a} {word} {b}" for a in short for word in ("and", "after") for b in short]
    return {command: interpret(command) for command in (*short, *pairs)}
