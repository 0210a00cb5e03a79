from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from qsm_rl.training import UserError, common_frames, curves_of, plot_curves, read_reference
from qsm_rl.training.grids import curves


def rows(curve, seed, returns, env="A-v0"):
    key = {"env": env, "curve": curve, "seed": seed}
    return [{**key, "frames": frames, "return_mean": value} for frames, value in returns.items()]


def legend(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written; intervals from the lowest to the highest seed, which take less time."""
    monkeypatch.setattr(
        curves, "curve_intervals", lambda returns: tuple(f(returns, 0) for f in (np.mean, np.min, np.max))
    )
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure) or save(figure, path, dpi=20))
    return figures


def test_a_panel_has_its_environment_s_curves_in_colours_that_are_the_same_in_all(tmp_path, drawn):
    given = curves_of(
        [
            *(*rows("b", 0, {10: 1.0, 20: 3.0}), *rows("b", 1, {20: 5.0, 10: 3.0})),
            *(*rows("b", 0, {10: 7.0}, "B-v0"), *rows("a", 0, {10: 8.0}, "B-v0"), *rows("a", 0, {5: 9.0}, "C-v0")),
        ]
    )
    assert list(given) == [("A-v0", "b"), ("B-v0", "a"), ("B-v0", "b"), ("C-v0", "a")]
    plot_curves(given, [], tmp_path / "a.png")
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["A-v0", "B-v0", "C-v0"], "the fourth place is empty"
    assert len({panel.get_position().x0 for panel in panels}) == 2
    assert drawn[0].get_size_inches().tolist() == [11.2, 8.4]
    (line,) = panels[0].lines
    assert [*zip(*line.get_data(), strict=True)] == [(10, 2.0), (20, 4.0)] and line.get_label() == "b, 2 seeds"
    (band,) = panels[0].collections
    assert band.get_datalim(panels[0].transData).extents.tolist() == [10, 1, 20, 5]
    assert line.get_marker() == "o", "a curve of one evaluation would not show"
    assert [one.get_label() for one in panels[1].lines] == legend(panels[1]) == ["a, 1 seed", "b, 1 seed"]
    for panel in panels:
        for one, band in zip(panel.lines, panel.collections, strict=True):
            assert band.get_facecolor()[0, :3].tolist() == [*to_rgb(one.get_color())]
    colors = {panel.get_title() + one.get_label()[0]: one.get_color() for panel in panels for one in panel.lines}
    assert colors["A-v0b"] == colors["B-v0b"] != colors["B-v0a"] == colors["C-v0a"]


def test_points_come_in_the_order_of_their_frames():
    assert common_frames({0: {16: 1.0, 15: 2.0, 3: 0.0}, 1: {15: 1.0, 16: 2.0}}) == [15, 16]


def test_a_reference_is_dashed_in_its_environment_and_of_one_point_a_level(tmp_path, drawn):
    path = tmp_path / "reference.csv"
    path.write_text("env,curve,frames,return_mean,source\nA-v0,x,2e1,2,s\nA-v0,x,10,1,s\nA-v0,y,10,7,s\nB-v0,z,1,1,s\n")
    reference = read_reference(path)
    assert reference[0] == {"env": "A-v0", "curve": "x", "frames": 20, "return_mean": 2.0, "source": "s"}
    plot_curves(curves_of(rows("a", 0, {10: 7.0})), reference, tmp_path / "a.png")
    _, line, level = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[10, 1], [20, 2]] and line.get_linestyle() == "--"
    assert level.get_ydata() == [7.0, 7.0] and level.get_label() == "y"
    panel = drawn[0].axes[0]
    assert legend(panel) == ["a, 1 seed", "x", "y"] and panel.get_xlabel() == "frames"
    assert panel.get_legend().get_window_extent().y1 < panel.bbox.y0, "long names would hide curves"
    many = [{"env": "A-v0", "curve": str(n), "frames": 1, "return_mean": n} for n in range(9)]
    plot_curves(curves_of(rows("a", 0, {10: 7.0})), many, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env,curve,frames\nA-v0,x,1\n", "needs the columns"),
        ("env,curve,frames,return_mean\n", "needs the columns"),
        ("env,curve,frames,return_mean\nA-v0,x,1\n", "must contain numbers"),  # a row cut short
        ("env,curve,frames,return_mean\nA-v0,x,1,high\n", "must contain numbers"),
        (None, "does not exist"),
    ],
)
def test_a_reference_that_cannot_be_drawn_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "reference.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_reference(tmp_path / "reference.csv")


def test_runs_that_make_no_curve_are_refused():
    with pytest.raises(UserError, match="two runs of A-v0, a have seed 0"):
        curves_of([*rows("a", 0, {10: 1.0}), *rows("a", 0, {10: 2.0})])
    with pytest.raises(UserError, match="the seeds of A-v0, a were never evaluated at the same frame"):
        curves_of([*rows("a", 0, {10: 1.0}), *rows("a", 1, {20: 2.0})])
