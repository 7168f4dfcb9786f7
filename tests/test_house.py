"""The house: who imports whom, and what the ground floor knows of."""

import ast
import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_FLAGS, same, tiny_training

import diffuser
import edit

# What each file may import of the project; everything else of it stands above.
FILES = "diffuser_lib.files"
GROUND_FLOOR = {f"diffuser_lib.{name}" for name in ("files", "images", "sources", "cpu_kernels", "machine", "processes", "spellings", "metrics", "tensors", "judge", "copies", "listing")}
BELOW = {
    "diffuser_lib": set(),
    FILES: set(),
    "diffuser_lib.cpu_kernels": set(),
    "diffuser_lib.listing": set(),
    "diffuser_lib.images": {FILES, "diffuser_lib.listing"},
    "diffuser_lib.sources": {FILES, "diffuser_lib.images", "diffuser_lib.listing"},
    "diffuser_lib.processes": {FILES},
    "diffuser_lib.machine": set(),
    "diffuser_lib.spellings": {FILES},
    "diffuser_lib.metrics": {FILES},
    "diffuser_lib.tensors": {FILES},
    "diffuser_lib.judge": {FILES, "diffuser_lib.cpu_kernels", "diffuser_lib.images", "diffuser_lib.tensors"},
    "diffuser_lib.copies": {FILES, "diffuser_lib.images"},
    "plot_loss": {FILES},
    "report": {FILES, "plot_loss"},
    "diffuser": {*GROUND_FLOOR, "report"},
    **{script: {*GROUND_FLOOR, "diffuser"} for script in ("convert", "edit", "evaluate")},
    "runs": {*GROUND_FLOOR, "diffuser", "plot_loss"},
    "app": {*GROUND_FLOOR, "diffuser", "convert", "edit", "report", "runs"},
}


def source(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    return path if path.exists() else ROOT / module / "__init__.py"


def imports(module):
    """The modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & set(BELOW)) - {module, "diffuser_lib"}


def test_every_file_has_its_place():
    """A new file of the project gets a line in BELOW, or the next test would not see it."""
    files = {path.stem for path in ROOT.glob("*.py")} | {f"diffuser_lib.{path.stem}" for path in (ROOT / "diffuser_lib").glob("*.py")}
    assert files - {"diffuser_lib.__init__"} == set(BELOW) - {"diffuser_lib"}


@pytest.mark.parametrize("module", BELOW)
def test_arrows_point_down(module):
    """A file imports only what stands below it, so there is no circle, and no file is loaded twice as __main__."""
    assert imports(module) <= BELOW[module]


@pytest.mark.parametrize("module, absent", [
    (FILES, ("torch", "numpy", "PIL")), ("plot_loss", ("torch",)), ("report", ("torch",)), ("diffuser_lib.spellings", ("diffuser", "torch")),
    ("diffuser_lib.listing", ("torch", "PIL"))])
def test_importing_brings_no_more_than_needed(tmp_path, module, absent):
    """The ground floor and the small scripts load alone, without torch where they need none, and write nothing."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not list(tmp_path.iterdir())


# What needs torch and what it must not bring.
WITH_TORCH = {
    "diffuser_lib.cpu_kernels": ("diffuser", FILES, "PIL"), "diffuser_lib.images": ("diffuser",), "diffuser_lib.machine": ("diffuser", "PIL"),
    "diffuser_lib.processes": ("diffuser",), "diffuser_lib.metrics": ("diffuser", "wandb", "tensorboard")}


def test_importing_brings_no_more_than_torch(tmp_path):
    """The same of what needs torch, which takes seconds: it is imported once, and each file in a fork of that process."""
    code = (f"import importlib, os, sys, torch; sys.path.insert(0, {str(ROOT)!r})\n"
            f"for module, absent in {WITH_TORCH}.items():\n"
            "    if os.fork() == 0:\n"
            "        importlib.import_module(module)\n"
            "        print(module, [name for name in absent if name in sys.modules], flush=True)\n"
            "        os._exit(0)\n"
            "    os.wait()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in WITH_TORCH] and not list(tmp_path.iterdir())


def test_chapters_of_the_lecture_know_no_settings():
    """Chapters 2 to 5 of diffuser.py name no settings, files, devices, ranks or printing."""
    text = (ROOT / "diffuser.py").read_text(encoding="utf-8")
    lecture = text[text.index("# ---- 2  "):text.index("# ---- 6  ")]
    names = {node.id for node in ast.walk(ast.parse(lecture)) if isinstance(node, ast.Name)}
    assert names & {"cfg", "Config", "FIELDS", "Path", "open", "print", "Devices", "Processes", "UserError", "os"} == set()


def test_an_entry_in_a_registry_is_enough(folder, monkeypatch, capsys):
    """A schedule, a loss, a dataset and a sampler of one's own: one entry each, and flags, help, checks, training, drawing
    and editing know them; a value more in Progress is saved and read back."""
    def dots(cfg, train):
        images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
        images[::2, :, 2:5, 2:5] = 255
        return diffuser.ImageData(images, torch.arange(40) % 2, ["dot", "nothing"])

    def noisy(denoise, xT, ts, alpha_bar, draw_noise, *, eta=0.0):
        yield from diffuser.ddim(denoise, xT, ts, alpha_bar, draw_noise, eta=eta)

    monkeypatch.setitem(diffuser.SCHEDULES, "flat", lambda T, beta_start, beta_end, s: torch.full((T,), 0.2, dtype=torch.float64))
    monkeypatch.setitem(diffuser.LOSSES, "cubic", lambda out, target, reduction: (out - target).abs() ** 3)
    monkeypatch.setitem(diffuser.DATASETS, "dots", diffuser.DatasetSpec(dots, "dots", (1, 8, 8), classes=("dot", "nothing")))
    monkeypatch.setitem(diffuser.SAMPLERS, "mine", diffuser.Sampler(
        noisy, steps=3, options=("eta",), adds_noise=lambda options: options["eta"] > 0))

    flags = ["--mode", "train", "--dataset", "dots", "--schedule_type", "flat", "--loss_fn", "cubic", "--timesteps", "20",
             "--iterations", "4", "--batch_size", "8", *TINY_FLAGS]
    assert diffuser.main(flags) == 0
    path = next(folder.rglob("*.pt"))
    drawing = ["--mode", "inference", "--model_path", str(path), "--classes", "dot", "--num_images", "2", "--sampler", "mine"]
    assert diffuser.main([*drawing, "--save_dir", "out", "--eta", "0.5"]) == 0
    assert "mine, 3 steps" in capsys.readouterr().out
    assert diffuser.main([*drawing, "--variance", "large"]) == 2
    assert edit.main([str(path), "interpolate", "--sampler", "mine", "--eta", "0.5"]) == 2
    assert edit.main([str(path), "interpolate", "--sampler", "mine", "--num_images", "3", "--save_dir", "between"]) == 0
    assert "mine" in diffuser.option_help("sampler")


def test_one_line_saves_a_number_more(folder, monkeypatch):
    """Progress and CHECKPOINT agree: every field of the one is an entry of the other, written and read back."""
    keys = {field.metadata["key"]: field.name for field in dataclasses.fields(diffuser.Progress)}
    assert set(keys) < set(diffuser.CHECKPOINT)
    run = diffuser.Trainer(tiny_training(), diffuser.Devices(tiny_training()))
    run.train_step()
    state = run.state()
    assert list(state) == list(diffuser.CHECKPOINT)
    again = diffuser.Progress.from_checkpoint(diffuser.check_state(state), torch.device("cpu"))
    for name in keys.values():
        assert same(getattr(again, name), getattr(run.progress, name)), name
    with pytest.raises(TypeError, match="surprise"):
        diffuser.new_checkpoint(**{k: v for k, v in state.items() if k != "format"}, surprise=1)


def test_pillow_is_told_which_formats_to_read():
    """By content it would know fifty more, one of which starts Ghostscript: each Image.open names the formats it takes."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("diffuser_lib/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in [keyword.arg for keyword in node.keywords], f"{path.name}, line {node.lineno}"
