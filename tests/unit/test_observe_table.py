import io

from rich.console import Console

from megafuse.observe.table import StageRow, stage_table


def rendered(rows: list[StageRow]) -> tuple[str, list[list[str]], str]:
    table, markdown = stage_table(rows)
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    lines = markdown.splitlines()
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in (lines[0], *lines[2:])]
    return out.getvalue(), cells, markdown


def test_values_changes_and_alignment() -> None:
    rows = [
        StageRow("before", 0.5, 0.45, {"b": 0.4, "a": 0.6}, -1.25, -1.0),
        StageRow("after FuseSFT", 0.5625, None, {"a": 0.5}, -1.0, -1.125, 12345.6),
    ]
    terminal, cells, markdown = rendered(rows)
    assert cells == [
        ["stage", "intra %", "cross %", "a %", "b %", "best logp", "worst logp", "tokens/s"],
        ["before", "50.0", "45.0", "60.0", "40.0", "-1.2500", "-1.0000", "-"],
        ["after FuseSFT", "56.2 (+6.2)", "-", "50.0 (-10.0)", "-", "-1.0000 (+0.2500)", "-1.1250 (-0.1250)", "12,346"],
    ]
    assert len({len(line) for line in markdown.splitlines()}) == 1
    assert markdown.splitlines()[1].startswith("| ------------- | ----------: |")
    assert all(cell in terminal for line in cells for cell in line)


def test_columns_that_nobody_fills_are_left_out() -> None:
    _, cells, _ = rendered([StageRow("a|b", intra=0.25), StageRow("c")])
    assert cells == [["stage", "intra %"], ["a\\|b", "25.0"], ["c", "-"]]


def test_no_change_is_shown_where_the_first_row_has_no_number() -> None:
    _, cells, _ = rendered([StageRow("x"), StageRow("y", cross=0.5), StageRow("z", cross=1.0)])
    assert cells[2:] == [["y", "50.0"], ["z", "100.0"]]


def test_no_rows() -> None:
    assert stage_table([])[1].splitlines() == ["| stage |", "| ----- |"]
