"""Values between the stages."""

from cal_train.types import DropCount, Problem


def test_a_row_that_comes_up_again_is_counted_once():
    rows = [*range(250), *range(250), 7]
    dropped = DropCount()
    new = [dropped.add(Problem("a.json", row, f"id-{row}", "broken", "mend it")) for row in rows]
    assert dropped.count == sum(new) == 250 and all(new[:250])
    assert dropped.add(Problem("b.json", 7, "id-7", "broken", "mend it"))
    assert [problem.row for problem in dropped.problems] == list(range(100))
