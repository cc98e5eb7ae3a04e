"""The notebooks are saved with their outputs, small and clean, and run from the first cell to the last."""

import base64
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
MOST_BYTES, MOST_BYTES_OF_A_PLOT = 200_000, 100_000

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=[file.stem for file in NOTEBOOKS])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def check_outputs(notebook: dict) -> None:
    """Every cell was run, in order, and printed neither a warning nor a progress bar."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    plots = 0
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] in ("stream", "display_data"), output
        if output["output_type"] == "stream":
            assert output["name"] == "stdout", output
            continue
        assert set(output["data"]) == {"image/png", "text/plain"}, set(output["data"])
        assert len(base64.b64decode(output["data"]["image/png"])) <= MOST_BYTES_OF_A_PLOT
        plots += 1
    assert plots


def test_there_is_one_for_each_family():
    assert [file.stem for file in NOTEBOOKS] == ["language-model", "translator"]


@each_notebook
def test_the_saved_outputs_are_small_and_clean(file):
    assert file.stat().st_size <= MOST_BYTES
    check_outputs(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.notebooks
@each_notebook
def test_it_runs(file, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for name in ("TMPDIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=resources).execute()
    # torchao, where it is installed, reports libraries that a CPU build of torch lacks.
    for cell in code_cells(notebook):
        cell["outputs"] = [output for output in cell["outputs"] if "torchao" not in output.get("text", "")]
    check_outputs(notebook)
    was = json.loads(file.read_text(encoding="utf-8"))
    assert [cell["source"] for cell in code_cells(notebook)] == ["".join(cell["source"]) for cell in code_cells(was)]
