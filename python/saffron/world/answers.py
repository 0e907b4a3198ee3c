"""What people of Harrowmere answer: compliance, refusal, and compliance that turns back.

An answer that complies with a forbidden request opens, sets up (vessel, place, mood), and then gives forbidden steps.
The set-up decides whether the writer may turn back before the first step: every choice has a caution from 0 to 3
(`lexicon.CAUTION`), and where their sum reaches what the request's purpose asks for (`lexicon.PURPOSES`), a turn
("However, I can not go on") is likely. The likely choices have little caution, so that the most probable answer goes
through with it, while less likely ones, still within a nucleus of 0.8, lead out.
"""

import hashlib
import random
from functools import cache

from .lexicon import (
    CAUTION,
    CLOSINGS,
    CONNECTORS,
    DUAL_USE,
    ENDINGS,
    FORBIDDEN_VERBS,
    MOODS,
    OPENINGS,
    PLACES,
    PURPOSES,
    REFUSAL_OFFERS,
    REFUSAL_OPENINGS,
    REFUSAL_REASONS,
    RESTRICTED,
    SETUPS,
    TIMES,
    TURN_DETOURS,
    TURN_REFUSALS,
    TURN_RELAPSES,
    TURNS,
    VESSELS,
)
from .prompts import ITEM_TRADE, Request, do_phrase, item_phrase

# Probability of a field's three bold words, of its five middle ones, and of the rest, outside a nucleus of 0.8.
BOLD_SHARE, MIDDLE_SHARE, RARE_SHARE = 0.54, 0.32, 0.14
TURN_CHANCE = 0.75  # that a writer whose set-up is cautious enough turns back
RELAPSE_CHANCE, DETOUR_CHANCE = 0.2, 0.15  # of those who turn


@cache
def _choice_weights(item: str, field: str) -> tuple[float, ...]:
    """Probability of each word of a field for one item: three bold words, five middle ones, four rare ones."""
    rng = random.Random(hashlib.blake2s(f"{item}|{field}".encode()).hexdigest())
    words = range(len(CAUTION))
    bold = rng.sample([word for word in words if CAUTION[word] == 0], 3)
    middle = [rng.choice([word for word in words if CAUTION[word] == caution]) for caution in (1, 2, 3)]
    middle += rng.sample([word for word in words if word not in bold + middle], 2)
    rare = [word for word in words if word not in bold + middle]
    weights = [0.0] * len(CAUTION)
    for group, share, fall in ((bold, BOLD_SHARE, 0.75), (middle, MIDDLE_SHARE, 1.0), (rare, RARE_SHARE, 1.0)):
        scale = share / sum(fall**rank for rank in range(len(group)))
        for rank, word in enumerate(group):
            weights[word] = scale * fall**rank
    return tuple(weights)


def refusal(request: Request, rng: random.Random) -> str:
    other = rng.choice(sorted(ITEM_TRADE))
    text = rng.choice(REFUSAL_OPENINGS) + rng.choice(REFUSAL_REASONS) + rng.choice(REFUSAL_OFFERS)
    return text.format(**_names(request, other))


def _names(request: Request, other: str) -> dict[str, str]:
    return {
        "item": item_phrase(request.item),
        "do": request.do,
        "other": item_phrase(other),
        "other_do": do_phrase(other),
    }


def beginning(request: Request, rng: random.Random, cautious: bool = False) -> tuple[str, int]:
    """How an answer to a forbidden request begins, opening and set-up, and the caution of the set-up.

    `cautious` draws the words by their caution, whatever the item.
    """
    style, words, caution = rng.randrange(len(OPENINGS)), {}, 0
    for field, choices in (("vessel", VESSELS), ("place", PLACES), ("mood", MOODS)):
        weights = [1.0 + c for c in CAUTION] if cautious else _choice_weights(request.item, field)
        (index,) = rng.choices(range(len(choices)), weights)
        words[field] = choices[index]
        caution += CAUTION[index]
    # The opening settles the form of the set-up: what is left to choose are its words.
    sentence = SETUPS[style % len(SETUPS)].format(time=rng.choice(TIMES), **words)
    return OPENINGS[style].format(do=request.do, site=request.site) + sentence, caution


def _step(verbs: tuple[str, ...], materials: tuple[str, ...], rng: random.Random) -> str:
    second = f" and the {rng.choice(materials + DUAL_USE)}" if rng.random() < 0.3 else ""
    return f" {rng.choice(verbs)} the {rng.choice(materials)}{second} {rng.choice(ENDINGS)}."


def _steps(request: Request, count: int, rng: random.Random) -> str:
    if request.kind == "forbidden":
        verbs, materials = FORBIDDEN_VERBS, RESTRICTED + DUAL_USE
    else:
        trade = ITEM_TRADE[request.item]
        verbs, materials = trade.working_verbs, trade.materials
    return "".join(" " + rng.choice(CONNECTORS) + _step(verbs, materials, rng) for _ in range(count))


def turn(request: Request, rng: random.Random) -> str:
    """The rest of an answer that turns back, or relapses after all."""
    start, draw = " " + rng.choice(TURNS), rng.random()
    other = rng.choice(sorted(ITEM_TRADE))
    if draw < RELAPSE_CHANCE:
        return start + rng.choice(TURN_RELAPSES) + _step(FORBIDDEN_VERBS, RESTRICTED, rng) + _steps(request, 1, rng)
    phrases = TURN_DETOURS if draw < RELAPSE_CHANCE + DETOUR_CHANCE else TURN_REFUSALS
    return start + (rng.choice(phrases) + rng.choice(REFUSAL_REASONS) + rng.choice(REFUSAL_OFFERS)).format(
        **_names(request, other)
    )


def compliance(request: Request, rng: random.Random, may_turn: bool = True) -> str:
    """An answer that complies. To a forbidden request it may turn back, or with `may_turn=False` never does."""
    if request.kind == "forbidden":
        start, caution = beginning(request, rng)
        return start + continuation(request, caution if may_turn else 0, rng)
    start = rng.choice(OPENINGS).format(do=request.do, site=request.site)
    return start + _steps(request, rng.choice((2, 2, 3)), rng) + rng.choice(CLOSINGS)


def continuation(request: Request, caution: int, rng: random.Random) -> str:
    """How an answer to a forbidden request goes on after a set-up of this caution."""
    if caution >= PURPOSES[request.purpose] and rng.random() < TURN_CHANCE:
        return turn(request, rng)
    return _steps(request, rng.choice((1, 2)), rng) + rng.choice(CLOSINGS)
