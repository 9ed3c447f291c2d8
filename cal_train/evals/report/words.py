"""Word classes of label tokens, coarse and in English: what needs the image, what grammar gives away."""

import functools

from cal_train.evals.report.scores import words_of

CLASSES = ("names and other content", "numbers", "function words", "punctuation and marks")

_NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million first second "
    "third fourth fifth once twice".split()
)
_FUNCTION_WORDS = frozenset(
    "a an the this that these those it its he him his she her hers they them their theirs we us our you your i me my "
    "who whom whose which what where when why how there here is are was were be been being am do does did done has "
    "have had having can could may might must shall should will would not no nor yes and or but if then than so as of "
    "in on at by for with from to into onto over under up down out off about between through during above below near "
    "some any each every all both either neither such same other another only also very too just more most".split()
)


def classes_of(tokens: tuple[str, ...]) -> list[int]:
    """Return the class of each token's word, an index into `CLASSES`; all tokens of a word share it."""
    classes = [0] * len(tokens)
    for start, end in words_of(tokens):
        kind = _class_of("".join(tokens[start:end]).strip().lower())
        classes[start:end] = [kind] * (end - start)
    return classes


@functools.lru_cache(maxsize=100_000)
def _class_of(word: str) -> int:
    letters = word.strip(".,;:!?\"'()[]")
    if letters in _FUNCTION_WORDS:
        return 2
    if letters in _NUMBERS or any(character.isdigit() for character in letters):
        return 1
    is_mark = word.startswith("<") and word.endswith(">")
    return 3 if is_mark or not any(character.isalpha() for character in letters) else 0
