"""The plot of `benchmarks.engine`: tokens a second by streams, with the machine's limit."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engine_report import EngineReport


def draw(report: EngineReport, path: Path) -> None:
    """Draws the first kind of load: greedy, short prompts.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "realtime-ai-serve"
    from matplotlib import pyplot

    first = next(load for load, _ in report.rounds)
    kind = (first.prompt_tokens, first.output_tokens, first.temperature)
    loads = [
        load
        for load in dict.fromkeys(load for load, _ in report.rounds)
        if (load.prompt_tokens, load.output_tokens, load.temperature) == kind
    ]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(name for _, name in report.rounds):
        points = [
            (load.streams, report.of_load(load)[name].tokens_per_s)
            for load in loads
            if name in report.of_load(load)
        ]
        if not points:
            continue
        label = name if report.http[name] else f"{name} (in process)"
        style = "-" if report.http[name] else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label)
    limits = [(load.streams, limit) for load in loads if (limit := report.limit_of(load))]
    if limits:
        axes.plot(*zip(*limits, strict=True), ":", color="black", label="the machine's limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([load.streams for load in loads], [str(load.streams) for load in loads])
    axes.set_xlabel("streams")
    axes.set_ylabel("output tokens a second")
    axes.set_title(f"{report.model}: prompt {kind[0]}, output {kind[1]}, greedy")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
