"""`precis compare`: the comparison as a table on the terminal, as JSON and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from model_store.store import Store
from quantizers.errors import InvalidInput
from server.comparison import Comparison, Row, compare
from server.console import output
from server.plot import check_picture, plot_comparison
from server.settings import Settings


def compare_models(settings: Settings, models: Sequence[str], *, json: Path | None, plot: Path | None) -> None:
    """Print the table, and write the files that are asked for. Raises InvalidInput for a file that cannot be written, and as `compare`."""
    if plot is not None:
        check_picture(plot)
    with Store(settings.data_dir) as store:
        found = compare(store, models)
    output().print(_table(found))
    said = Console(stderr=True)
    for each in found.left_out:
        said.print(f"{each.id} {each.reason}", highlight=False, soft_wrap=True)
    try:
        if json is not None:
            json.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if plot is not None:
            plot_comparison(found, plot)
    except OSError as error:
        raise InvalidInput(f"{error.filename} cannot be written: {error.strerror}") from error


def _table(found: Comparison) -> Table:
    title = f"{found.checkpoint} on {found.text}, {found.windows} windows of {found.window_tokens} tokens, {found.device}"
    table = Table("recipe", title=title, title_justify="left")
    for column in ("KL to fp32", "kernels add", "KL p99", "top-1", "perplexity", "MB", "on disk", "tokens/s", "made in s", "peak MB"):
        table.add_column(column, justify="right")
    table.add_column("worst layer")
    for row in found.variants:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    report, made, worst = row.report, row.report.quantization, row.worst_layer
    predicted = "" if made is None or made.predicted_peak_bytes is None else f" (predicted {made.predicted_peak_bytes / 1e6:.0f})"
    return [
        report.recipe,
        f"{report.kl_divergence:.5f}",
        "" if row.kernel_difference is None else f"{row.kernel_difference:+.1%}",
        f"{report.kl_divergence_p99:.4f}",
        f"{report.top1_agreement:.1%}",
        f"{report.perplexity:.3f}",
        f"{row.memory_bytes / 1e6:.1f}",
        "" if row.stored_bytes is None else f"{row.stored_bytes / 1e6:.1f}",
        f"{report.decode_tokens_per_second:.1f}",
        "" if made is None else f"{made.seconds:.1f}",
        "" if made is None else f"{made.peak_bytes / 1e6:.0f}{predicted}",
        "" if worst is None else f"{worst.name} {worst.relative_error:.3f}",
    ]
