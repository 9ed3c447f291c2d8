"""How large the corpus is."""

from collections import Counter

from hostile_corpus import KINDS, verbs_of


def test_the_corpus_has_more_than_two_hundred_different_cases_through_each_verb_that_reads_data_or_models():
    runs = [(kind, name, verb) for kind, (cases, _) in KINDS.items() for name in cases for verb in verbs_of(kind, name)]
    by_verb, by_kind = Counter(verb for _, _, verb in runs), {kind: len(cases) for kind, (cases, _) in KINDS.items()}
    print(f"{sum(by_kind.values())} cases ({by_kind}), {len(runs)} times a verb: {dict(by_verb)}")
    assert set(by_verb) == {"check_data", "train", "score", "convert", "merge"}
    assert by_verb["check_data"] >= 200 and by_verb["train"] >= 200 and by_verb["score"] >= 200


def test_the_contents_of_more_than_two_hundred_cases_differ():
    contents = {repr(case[0]) for case in KINDS["rows"][0].values()} | set(KINDS["recipes"][0].values())
    for kind in ("images", "files"):  # shards hold times
        contents |= {case[1]() for case in KINDS[kind][0].values()}
    assert len(contents) >= 200
    assert len(contents) >= 0.95 * sum(len(KINDS[kind][0]) for kind in ("rows", "recipes", "images", "files"))
