"""The table of the results, as docs/serving.md shows it."""

from collections.abc import Iterator, Mapping
from typing import Any

_PROGRAMS = {"vllm": "vLLM", "mlx": "mlx-lm"}


def rows_of_table(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table for each program, and of one for what mlx-lm quantised."""
    for program, title in _PROGRAMS.items():
        if program not in results:
            continue
        found = results[program]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        yield from (
            f"{title} ({versions})",
            "",
            "| | loads | same tokens | largest difference, nats |",
            "|---|---|--:|--:|",
        )
        for row in found["rows"].values():
            yield f"| {row['what']}{' ¹' if row.get('stand_in') else ''} | {_said(row)} |"
        yield ""
        if quantised := found.get("quantised"):
            yield from (
                "| quantised by mlx-lm | weights | equal to ours | in the dtype of the scales |",
                "|---|--:|--:|--:|",
            )
            for name, row in quantised.items():
                told = f"{row} | |" if isinstance(row, str) else _counts(row)
                yield f"| {name} | {told} |"
            yield ""


def _said(row: Mapping[str, Any]) -> str:
    if "error" in row:
        control = row.get("written_by_transformers")
        also = (
            ""
            if control is None
            else " (nor what transformers wrote)"
            if control != "loads"
            else " (what transformers wrote loads)"
        )
        return f"no: {row['error'][:160]}{also} | | "
    if row.get("because"):
        return f"yes | {row['same']} of {row['tokens']} | {row['largest']:.1e} ({row['because']})"
    return f"yes | {row['same']} of {row['tokens']} | {row['largest']:.1e}{'' if row['agrees'] else ' **differs**'}"


def _counts(row: Mapping[str, Any]) -> str:
    return f"{row['tensors']} | {row['equal']} | {row['equal_in_own_dtype']}"
