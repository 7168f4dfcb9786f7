"""notebooks/quickstart.ipynb: run from top to bottom in a copy of the project, and as it is stored.

After a change: jupyter execute --inplace notebooks/quickstart.ipynb
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import prepared
import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what the notebook needs; what it writes elsewhere goes beside it."""
    for name in ("temporary", "ipython", "jupyter"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))        # no kernel but this Python's
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("diffuser_lib/*.py"), ROOT / "data" / "digits.npz", NOTEBOOK):
        copy = tmp_path / "project" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path / "project"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_pictures(notebook):
    """Code cells that show a picture."""
    return [cell for cell in code_cells(notebook) if any("image/png" in out.get("data", {}) for out in cell.outputs)]


def listing(folder: Path):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def shortened():
    """The notebook with one epoch, and without outputs. The number of epochs stands in one place, so that a reader changes
    it there."""
    notebook, replaced = nbformat.read(NOTEBOOK, as_version=4), 0
    for cell in code_cells(notebook):
        cell.source, count = re.subn(r"\bepochs=\d+", "epochs=1", cell.source)
        cell.outputs, replaced = [], replaced + count
    assert replaced == 1
    return notebook


def test_all_cells_are_a_program_that_works(project):
    """One after another, as plain Python: every cell works with today's diffuser.py, figures are drawn, and nothing is
    written into the project."""
    code = "\n".join(cell.source for cell in code_cells(shortened())).replace("%matplotlib inline", "")
    before = listing(project)
    done = prepared.run("-c", code + "\nprint('figures', len(plt.get_fignums()))", cwd=project / "notebooks")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("figures ")[1]) >= 7
    assert listing(project) == before
    assert list(project.parent.glob("temporary/*/samples/*/report.html"))


@pytest.mark.slow
def test_runs_from_top_to_bottom(project):
    """In a real kernel every cell works, pictures appear, and nothing is written into the project."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook, before = shortened(), listing(project)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(project / "notebooks")}}).execute()
    assert len(with_pictures(notebook)) >= 4
    assert listing(project) == before
    assert list(project.parent.glob("temporary/*/samples/*/report.html"))


@pytest.mark.parametrize("place", [".", "notebooks"])
def test_first_cell_finds_the_project(project, place):
    """Jupyter may be started in the project's folder or in notebooks/, and the first cell may be run twice."""
    first = code_cells(nbformat.read(NOTEBOOK, as_version=4))[0].source
    look = "import importlib.util\nprint(importlib.util.find_spec('diffuser').origin, os.getcwd(), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", "\n".join([first, first, look])], cwd=project / place, text=True,
                           capture_output=True, check=True, timeout=60).stdout.splitlines()
    assert Path(found[0]) == project / "diffuser.py"
    assert project not in (Path(found[1]), *Path(found[1]).parents)


def test_stored_outputs():
    """Who opens the notebook without running it sees a whole, clean run: valid, in order, without errors, progress bars
    or paths of the machine it ran on, and small enough to keep in git."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert len(with_pictures(notebook)) >= 4
    for out in outputs:
        out.get("data", {}).pop("image/png", None)                           # base64 may spell anything
    rest = json.dumps(notebook)
    assert not re.search(r"/(tmp|work|root|home|Users|private|var|content)\b|[A-Z]:\\|\\r", rest)
    assert NOTEBOOK.stat().st_size < 700_000
