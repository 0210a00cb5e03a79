"""Summarises the cells of a grid as a readable table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from qsm_rl.training.grids.grid import Cell, CellTable
from qsm_rl.training.grids.statistics import mean_interval

__all__ = ["final_rows", "markdown_table"]


def final_rows(cells: Sequence[Cell], table: CellTable) -> dict[str, dict[str, list[dict[str, str]]]]:
    """The last evaluation of every finished cell, by environment and variant, one row per seed.

    Ways of acting that were evaluated in addition to the policy's own appear as ``"VARIANT, WAY"``.
    """
    rows: dict[str, dict[str, list[dict[str, str]]]] = {}
    ways = sorted({row["way"] for row in table.rows})
    for cell in cells:
        for way in ways:
            if found := table.rows_of(cell, way):
                name = f"{cell.variant}, {way}" if way else cell.variant
                rows.setdefault(cell.env, defaultdict(list))[name].append(found[-1])
    return rows


def markdown_table(cells: Sequence[Cell], table: CellTable) -> str:
    """For each task, a table with one line per variant, the best first: return, interval, seeds, speed and time.

    Args:
        cells: the grid.
        table: its results.

    Returns:
        Markdown; tasks without a finished cell are left out.

    Raises:
        UserError: if rliable is not installed.
    """
    lines = []
    for env, variants in final_rows(cells, table).items():
        frames = sorted({int(row["frames"]) for rows in variants.values() for row in rows})
        lines += [
            f"**{env}, {' and '.join(f'{count:,}' for count in frames)} frames**",
            "",
            "| setting | mean return | 95 % interval | seeds | updates/s | minutes |",
            "|---|---|---|---|---|---|",
        ]
        means = {name: _mean(rows, "return_mean") for name, rows in variants.items()}
        for name in sorted(variants, key=lambda name: -means[name]):
            values = [float(row["return_mean"]) for row in variants[name]]
            mean, low, high = mean_interval([[value] for value in values])
            seeds = ", ".join(f"{value:.0f}" for value in values)
            interval = f"{low:.0f} to {high:.0f}" if len(values) > 1 else "one seed"
            rate, minutes = _mean(variants[name], "updates_per_second"), _mean(variants[name], "elapsed_seconds") / 60
            lines.append(f"| {name} | {mean:.0f} | {interval} | {seeds} | {_text(rate)} | {_text(minutes)} |")
        lines.append("")
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, str]], name: str) -> float:
    values = [float(row[name]) for row in rows if row[name]]
    return sum(values) / len(values) if values else float("nan")


def _text(value: float) -> str:
    return "" if value != value else f"{value:.0f}"
