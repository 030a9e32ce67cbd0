"""A `Report` as rich tables, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlmtune.data.checks.report import Part, Report, histogram, kinds, longest
from vlmtune.errors import DataError

_EXAMPLES = 3  # bad rows that are shown of each kind
_KINDS = 12  # kinds that are shown
_BAR = 24  # characters of the longest bar


def render(report: Report, listed: Path | None = None) -> Iterator[RenderableType]:
    """The report, piece by piece, the verdict last; `listed` is the file with all bad rows."""
    yield _sources(report.train, "Training rows", mixed=True)
    if report.eval:
        yield Text()
        yield _sources(report.eval, "Eval rows", mixed=False)
    yield Text()
    if not report.quick and len(report.train.lengths):
        yield _lengths(report)
        yield Text()
    if report.train.total("images"):
        yield _pictures(report)
        yield Text()
    if report.plan:
        yield _arithmetic(report)
        yield Text()
    yield from _notes(report)
    yield from _bad(report, listed)
    yield _verdict(report)


def _sources(part: Part, title: str, *, mixed: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("source", overflow="fold")
    keys = ["rows", "bad", "dropped", "images", *(["embedded"] if part.total("embedded") else []), "tokens"]
    columns = [*keys, "trained"]
    for column in [*columns, "an epoch"] if mixed else columns:
        table.add_column(column, justify="right", no_wrap=True)
    rows = part.as_rows()
    if len(rows) > 1:
        numbers = {key: part.total(key) for key in rows[0] if key not in ("name", "mixing")}
        rows.append({"name": "all", "mixing": "", **numbers})
    for row in rows:
        share = f"{row['trained_tokens'] / row['tokens']:.1%}" if row["tokens"] else "–"
        counts = ["–" if row[key] is None else f"{row[key]:,}" for key in keys]
        if row["bad"]:
            counts[1] = f"[red]{counts[1]}[/]"
        name = escape(row["name"])
        if mixed and row["mixing"] not in ("", "repeat 1"):
            name += f" [dim]({row['mixing']})[/]"
        table.add_row(name, *counts, share, *([f"{row['epoch_rows']:,}"] if mixed else []))
    return table


def _lengths(report: Report) -> Table:
    table = Table(title="Tokens per row", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("up to", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("")
    bins = histogram(report.train.lengths)
    most = max(rows for _, rows in bins)
    for limit, rows in bins:
        table.add_row(f"{limit:,}", f"{rows:,}", "█" * max(round(_BAR * rows / most), 1 if rows else 0))
    end = longest(report.train)
    if end:
        table.caption = (
            f"longest: {escape(end['origin'])}, {end['tokens']:,} of {report.max_length:,} (data.max_length)"
        )
        table.caption_justify = "left"
    return table


def _pictures(report: Report) -> Text:
    """What the pictures and frames of the usable rows take, and how they are seen."""
    images, visual, tokens = (report.train.total(name) for name in ("images", "visual_tokens", "tokens"))
    share = f", {_percent(visual / tokens)} of all" if tokens else ""
    seen = f"; {report.about_pictures}" if report.about_pictures else ""
    return Text.assemble(
        ("Pictures: ", "bold"), f"{images:,} (with frames of videos), {_counted(visual, 'token')}{share}{seen}"
    )


def _arithmetic(report: Report) -> Text:
    """What a step takes, and how many there are."""
    assert report.plan is not None
    numbers = report.plan.arithmetic()
    devices = _counted(numbers["devices"], "device")
    text = Text()
    text.append("A step: ", "bold")
    if report.packed:
        rows = numbers.get("global_batch_size")
        size = f"{_counted(numbers.get('global_batch_tokens', 0), 'token')} (global_batch_tokens)"
        text.append(
            f"{_counted(rows, 'row') + ' (global_batch_size)' if rows else size} in "
            f"{_counted(numbers['micro_batches_per_step'], 'pack')} of at most {numbers['max_length']:,} "
            f"tokens = {numbers['accumulation']} accumulated × {devices}; packs are {_percent(numbers['fill'])} full\n"
        )
    else:
        text.append(
            f"{numbers['micro_batch_size']} (micro_batch_size) × {numbers['accumulation']} accumulated × {devices} = "
            f"{_counted(numbers['global_batch_size'], 'row')} (global_batch_size)\n"
        )
    text.append("An epoch: ", "bold")
    text.append(
        f"{_counted(numbers['rows_per_epoch'], 'row')}, {_counted(numbers['tokens_per_epoch'], 'token')}, "
        f"{_counted(numbers['packs_per_epoch'], 'pack') + ', ' if report.packed else ''}"
        f"{_counted(numbers['steps_per_epoch'], 'step')}\n"
    )
    text.append("The run: ", "bold")
    text.append(f"{_counted(numbers['num_steps'], 'step')} = ")
    text.append("1 epoch" if numbers["epochs"] == 1 else f"{numbers['epochs']:.4g} epochs")
    return text


def _counted(number: float, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    """Rounded down, so that 100% is said of nothing less."""
    return f"{int(1000 * share) / 10:g}%"


def _notes(report: Report) -> Iterator[RenderableType]:
    notes = [Text(f"Note: this model cannot pack ({report.why_not_packed}); rows are padded instead.")]
    notes = notes if report.why_not_packed else []
    dropped = report.train.total("dropped")
    if dropped:
        rows = "1 row is" if dropped == 1 else f"{dropped:,} rows are"
        notes.append(Text(f"Note: {rows} longer than {report.max_length:,} tokens and dropped (data.too_long)."))
    unread = report.train.measured.unknown_keys.most_common(8)
    if unread:
        keys = ", ".join(f"{key} ({n:,} row{'' if n == 1 else 's'})" for key, n in unread)
        notes.append(Text(f"Note: keys that nothing reads: {keys}."))
    notes += [Text(f"Warning: {warning}", "yellow") for warning in report.warnings]
    if notes:
        yield from notes
        yield Text()


def _bad(report: Report, listed: Path | None) -> Iterator[RenderableType]:
    """The bad rows by kind, a few of each; `listed` has all of them."""
    groups = kinds(report.bad)
    for _, rows in groups[:_KINDS]:
        yield Text("1 row:" if len(rows) == 1 else f"{len(rows):,} rows with the same kind of mistake:", "bold red")
        for row in rows[:_EXAMPLES]:
            yield Padding(Text.assemble((row.origin, "bold"), f"  {row.reason}"), (0, 0, 0, 2))
        if len(rows) > _EXAMPLES:
            yield Padding(Text(f"… and {len(rows) - _EXAMPLES:,} more", "dim"), (0, 0, 0, 2))
    if len(groups) > _KINDS:
        left = sum(len(rows) for _, rows in groups[_KINDS:])
        yield Text(f"… and {left:,} rows with {len(groups) - _KINDS:,} more kinds of mistakes", "dim")
    if listed is not None:
        yield Text(f"All of them, one JSON object a line: {listed}", overflow="fold")
    if groups:
        yield Text()


def _verdict(report: Report) -> Text:
    rows = "1 bad row" if len(report.bad) == 1 else f"{len(report.bad):,} bad rows"
    if report.refusal is not None:
        refused = "a run would refuse to start."
        counted = report.bad and report.refusal.where != "data.max_bad_share" and report.refusal is not report.no_plan
        why = DataError(report.refusal.found, where=report.refusal.where or "data", expected=report.refusal.expected)
        return Text(f"{rows}: {refused}" if counted else f"{why} So {refused}", "bold red")
    if report.bad:
        dropped = f"{rows} would be dropped (data.bad_rows; data.max_bad_share allows {report.max_bad_share:.2%})."
        return Text(f"{dropped} Every other row can be trained.", "bold yellow")
    if report.quick:
        hint = ("  Lengths are not known: without --quick all rows are tokenised as well.", "dim")
        return Text.assemble(("No row is bad.", "bold green"), hint)
    if report.decoded or not (report.train.total("images") or report.train.total("embedded")):
        return Text("Every row can be trained.", "bold green")
    media = "Pictures and embeddings" if report.train.total("embedded") else "Pictures"
    hint = (f"  {media} were read up to their headers; --decode reads all of them.", "dim")
    return Text.assemble(("Every row can be trained.", "bold green"), hint)
