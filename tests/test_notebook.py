import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "sink.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_the_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    matplotlib.use("agg")
    found: dict[str, Any] = {}
    try:
        for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), found)
        shares, evaluation, figure = (found[name] for name in ("shares", "evaluation", "figure"))
        assert shares["blind attack"] > shares["benign"] + 0.2
        assert shares["recovery-aware attack"] < shares["blind attack"]
        assert evaluation["sink_gap"] > 0.1
        assert evaluation["clean"]["accuracy"] > 0.8
        assert len(figure.axes) == 2
    finally:
        plt.close("all")


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)
