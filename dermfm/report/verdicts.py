"""What a study's effects allow one to say, in words, by rule: no more than the numbers carry.

An effect is a paired difference on the primary endpoint with its interval and its p-value after Holm's correction.
"better" and "worse" need an interval without zero, a corrected p below LEVEL and MIN_SEEDS seeds; "same" needs an
interval inside ± MARGIN; everything else is "unclear", and is said to be so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

IMAGE_ONLY, LABEL, WITHIN_CLASS = "image-only", "label", "shuffled_within_class"
AGAINST = (IMAGE_ONLY, LABEL, WITHIN_CLASS)
CONTROLS = (IMAGE_ONLY, LABEL, "shuffled", WITHIN_CLASS)
LEVEL, MARGIN, MIN_SEEDS = 0.05, 0.02, 3
BETTER, WORSE, SAME, UNCLEAR, NO_TEST = "better", "worse", "same", "unclear", "no test"
QUESTIONS = {
    IMAGE_ONLY: "Do notes help under shift?",
    LABEL: "Do they help beyond the class name?",
    WITHIN_CLASS: "Is it the note of this very image that helps?",
}
NAMES = {IMAGE_ONLY: "image-only", LABEL: "the class name alone", WITHIN_CLASS: "other images' notes of the same class"}


@dataclasses.dataclass(frozen=True)
class Effect:
    """A strategy minus a control: difference, interval, p before and after Holm's correction, one difference a seed."""

    endpoint: str
    strategy: str
    against: str
    difference: float
    ci_low: float | None
    ci_high: float | None
    p: float | None
    p_holm: float | None
    seeds: Sequence[float]
    primary: bool
    n_groups: int | None
    tier: int | str | None
    tested: bool = True

    @property
    def verdict(self) -> str:
        """better, worse, same, unclear, or no test."""
        if not self.tested:
            return NO_TEST
        if self.ci_low is None or self.ci_high is None or len(self.seeds) < MIN_SEEDS:
            return UNCLEAR
        corrected = self.p_holm
        if corrected is not None and corrected < LEVEL and (self.ci_low > 0 or self.ci_high < 0):
            return BETTER if self.ci_low > 0 else WORSE
        return SAME if self.ci_low > -MARGIN and self.ci_high < MARGIN else UNCLEAR

    @property
    def agreeing(self) -> int:
        """Seeds whose difference has the sign of the whole."""
        return sum(seed * self.difference > 0 for seed in self.seeds)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question of the study: the short answer, a class for its colour, and a sentence for each strategy."""

    question: str
    short: str
    kind: str
    sentences: list[str]


def numbers(effect: Effect) -> str:
    """The difference with its interval, corrected p and seeds, in brackets' style."""
    told = signed(effect.difference)
    if effect.ci_low is not None and effect.ci_high is not None:
        told += f" (95 % interval {signed(effect.ci_low)} to {signed(effect.ci_high)}"
        told += f", corrected p {_p(effect.p_holm)})" if effect.p_holm is not None else ")"
    return told


def sentence(effect: Effect) -> str:
    """What one effect says."""
    strategy, other, told = effect.strategy, NAMES.get(effect.against, effect.against), numbers(effect)
    if effect.verdict == NO_TEST:
        return f"{strategy}: more than half of its notes fell back to the template; not a test of this strategy."
    if effect.verdict in (BETTER, WORSE):
        seeds = f"{effect.agreeing} of {len(effect.seeds)} seeds agree"
        small = f"; the effect may be smaller than {MARGIN:g}" if min(map(abs, _bounds(effect))) < MARGIN else ""
        return f"{strategy} is {effect.verdict} than {other}: {told}; {seeds}{small}."
    if effect.verdict == SAME:
        return f"{strategy} and {other} differ by less than {MARGIN:g} either way: {told}."
    return f"{strategy} against {other}: the evidence does not suffice, {told}{_why(effect)}."


def answers(effects: Iterable[Effect]) -> list[Answer]:
    """One answer for each question that the primary effects of one tier bear on."""
    primary = [e for e in effects if e.primary and e.strategy not in CONTROLS]
    return [_answer(against, own) for against in AGAINST if (own := [e for e in primary if e.against == against])]


def conclusion(effects: Iterable[Effect]) -> str:
    """The one sentence at the top: which strategies pass all three comparisons, and if none, that the claim fails."""
    verdicts: dict[str, dict[str, str]] = {}
    for effect in effects:
        if effect.primary and effect.strategy not in CONTROLS and effect.tested:
            verdicts.setdefault(effect.strategy, {})[effect.against] = effect.verdict
    if not verdicts:
        return "There is no tested strategy yet, so nothing can be said."
    whole = [s for s, v in verdicts.items() if all(v.get(against) == BETTER for against in AGAINST)]
    if whole:
        return (
            f"{listed(whole)} {_verb(whole, 'beats', 'beat')} image-only, the class name alone and other images' notes "
            "of the same class: here the notes help, beyond the label, and by what they say of the image."
        )
    beyond = [s for s, v in verdicts.items() if v.get(IMAGE_ONLY) == BETTER and v.get(LABEL) == BETTER]
    if beyond:
        return (
            f"{listed(beyond)} {_verb(beyond, 'beats', 'beat')} image-only and the class name alone, but not shown is "
            "that the notes of other images of the same class would not do as well."
        )
    helped = [s for s, v in verdicts.items() if v.get(IMAGE_ONLY) == BETTER]
    if helped:
        return (
            f"{listed(helped)} {_verb(helped, 'beats', 'beat')} image-only; that {_verb(helped, 'it does', 'they do')} "
            "so by more than the class name is not shown."
        )
    if all(v.get(IMAGE_ONLY) in (SAME, WORSE) for v in verdicts.values()):
        return f"No strategy helps under shift: every effect against image-only is below {MARGIN:g} or negative."
    return (
        "No strategy is shown to be better than image-only under shift: the evidence does not suffice for that claim."
    )


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign, a true minus before negative ones."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _answer(against: str, effects: list[Effect]) -> Answer:
    by_verdict = {v: [e.strategy for e in effects if e.verdict == v] for v in (BETTER, WORSE, SAME, UNCLEAR, NO_TEST)}
    order = [BETTER, WORSE, UNCLEAR, SAME, NO_TEST]
    told = [sentence(e) for e in sorted(effects, key=lambda e: (order.index(e.verdict), -e.difference))]
    if by_verdict[BETTER]:
        rest = [*by_verdict[UNCLEAR], *by_verdict[SAME], *by_verdict[WORSE]]
        short = f"Yes for {listed(by_verdict[BETTER])}" + (f"; not shown for {listed(rest)}." if rest else ".")
        return Answer(QUESTIONS[against], short, BETTER, told)
    if by_verdict[UNCLEAR]:
        return Answer(QUESTIONS[against], "Not shown: the evidence does not suffice.", UNCLEAR, told)
    if by_verdict[SAME] or by_verdict[WORSE]:
        worse = (
            f"; {listed(by_verdict[WORSE])} {_verb(by_verdict[WORSE], 'is', 'are')} worse" if by_verdict[WORSE] else ""
        )
        same = f"no gain of {MARGIN:g} or more" if by_verdict[SAME] else "no gain"
        return Answer(QUESTIONS[against], f"No: {same}{worse}.", WORSE if by_verdict[WORSE] else SAME, told)
    return Answer(QUESTIONS[against], "Not tested.", NO_TEST, told)


def _why(effect: Effect) -> str:
    """What keeps an effect unclear."""
    if len(effect.seeds) < MIN_SEEDS:
        told = "1 seed is" if len(effect.seeds) == 1 else f"{len(effect.seeds)} seeds are"
        return f"; {told} too few, {MIN_SEEDS} are needed"
    if effect.ci_low is None or effect.ci_high is None:
        return "; it has no interval"
    if effect.ci_low > 0 or effect.ci_high < 0:
        return "; the interval leaves out zero, but not after correction for the number of comparisons"
    reach = []
    if effect.ci_high >= MARGIN:
        reach.append(f"a gain of {effect.ci_high:.3f}")
    if effect.ci_low <= -MARGIN:
        reach.append(f"a loss of {-effect.ci_low:.3f}")
    return f"; {' and '.join(reach)} would fit the data as well as none"


def _bounds(effect: Effect) -> tuple[float, float]:
    assert effect.ci_low is not None
    assert effect.ci_high is not None
    return effect.ci_low, effect.ci_high


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _verb(names: Sequence[str], one: str, many: str) -> str:
    return one if len(names) == 1 else many
