"""Writes a run's report into its folder."""

from pathlib import Path

from ofb.engine.checkpoint import write_text
from ofb.engine.run_folder import REPORT_FOLDER
from ofb.report.run import Run

PAGE_FILE = "index.html"


def write_report(folder: str | Path) -> Path:
    """Write RUN/report: index.html, which needs no other file, and the charts of each part as PNG.

    Args:
        folder: a run folder, finished or not.

    Returns:
        The page.

    Raises:
        ValueError: it is no run folder, or something in it was not written by this package.
        ModuleNotFoundError: the package's extra [cli] is not installed.
    """
    # matplotlib is an extra, and none of the other commands needs it.
    from ofb.report.page import page
    from ofb.report.png import save
    from ofb.report.sections import sections

    run, report = Run.read(folder), Path(folder) / REPORT_FOLDER
    try:
        parts = sections(run)
        html = page(run, parts)
        for part in parts:
            if part.all_charts:
                save(report / f"{part.name}.png", part.all_charts)
        write_text(report / PAGE_FILE, html)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"run: {folder} holds files that this package did not write: {error!r}") from error
    return report / PAGE_FILE
