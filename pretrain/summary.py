"""The table at the end of a run, read back from its metrics."""

from rich.console import Console
from rich.table import Table

from peerlearn.run_dir import RunDirectory


def print_summary(run: RunDirectory, dataset: str) -> None:
    """Print kNN top-1 of raw pixels, of the untrained and of the trained networks, and where everything lies."""
    rows = [row for row in run.metric_rows() if "ensemble/knn_top1" in row]
    console = Console()
    if rows:
        first, last = rows[0], rows[-1]
        table = Table(
            title=f"kNN top-1 (%) on {dataset}",
            caption=f"k {last['knn/k']}, temperature {last['knn/temperature']}, "
            f"n {last['knn/test_images']:,}",
        )
        table.add_column("features of")
        table.add_column("untrained", justify="right")
        table.add_column(f"epoch {last['epoch']:.0f}", justify="right")
        if "pixels/knn_top1" in first:
            table.add_row("raw pixels", f"{first['pixels/knn_top1']:.2f}", "")
        for key in (key for key in last if key.endswith("/knn_top1")):
            name = key.removesuffix("/knn_top1").replace("net/", "network ")
            table.add_row(name, f"{first[key]:.2f}", f"{last[key]:.2f}")
        console.print(table)
    console.print(f"run directory: {run.root}", highlight=False)
