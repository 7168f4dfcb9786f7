"""Chapter 7 of diffuser.py: how a network is run on the device at hand: precision, memory, compilation."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STATUS, TINY_FLAGS, cli, tiny_training, trained_before

import diffuser
from diffuser import ComputeConfig, Devices, Trainer, choose_compute, load_checkpoint, train

CPU = torch.device("cpu")


@pytest.fixture
def units(monkeypatch):
    """Pretend that this CPU multiplies bf16 by AMX, by AVX-512, or not at all."""
    def have(amx: bool, avx512: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)

    return have


@pytest.mark.parametrize("amx, avx512, channels, expected", [
    (False, False, 64, "fp32"), (True, True, 64, "bf16"), (True, True, 16, "fp32"), (False, True, 64, "bf16"),
    (False, True, 32, "bf16"), (False, True, 16, "fp32")])
def test_precision_is_a_rule(units, amx, avx512, channels, expected):
    """bf16 where AMX or AVX512_BF16 meets a network of 32 channels or more, else fp32; nothing is measured."""
    units(amx, avx512)
    assert diffuser.pick_precision(tiny_training(base_channels=channels), CPU) == expected
    assert diffuser.pick_precision(tiny_training(precision="fp32"), CPU) == "fp32"
    assert choose_compute(tiny_training(base_channels=channels), CPU).precision == expected


def test_a_resumed_run_computes_as_it_began(folder, units):
    """The arithmetic is in the checkpoint and is used again, whatever would be chosen now; a flag changes it."""
    units(False, False)
    path = train(tiny_training(base_channels=32))
    stored = load_checkpoint(path)["arithmetic"]
    assert stored == vars(ComputeConfig("cpu", "fp32", True, False))
    units(True, True)
    longer = tiny_training(iterations=8, base_channels=32)
    assert Trainer(longer, Devices(longer), load_checkpoint(path)).compute.precision == "fp32"
    for flag, kept in (("precision", "bf16"), ("channels_last", False)):
        changed = dataclasses.replace(longer, **{flag: kept})
        assert getattr(Trainer(changed, Devices(changed), load_checkpoint(path)).compute, flag) == kept
    state = {**load_checkpoint(path), "arithmetic": dict(stored, device="cuda", precision="fp16", compiled=True)}
    there = Trainer(longer, Devices(longer), state).compute              # from another kind of device
    assert (there.device, there.compiled) == ("cpu", False) and there.precision != "fp16"
    assert diffuser.build_model(state, longer).compute.precision != "fp16"


def test_the_start_line_tells_how_it_computes(folder):
    """One line at the start names device, precision, layout and compilation."""
    done = cli("--mode", "train", "--dataset", "digits", "--iterations", "1", *TINY_FLAGS, "--precision", "fp32", cwd=folder)
    assert any(line.startswith("device   cpu x 1 (") and line.endswith("fp32, channels last, not compiled")
               for line in done.stdout.splitlines()), done.stdout


def test_compiling_is_left_to_long_runs_on_cuda():
    """auto compiles on CUDA alone, and only where it is repaid; asking for it counts everywhere."""
    long, cfg = 10**6, tiny_training(precision="fp32", num_gpus=1)
    minutes = dataclasses.replace(cfg, train_minutes=7.9)
    assert not choose_compute(cfg, CPU, long).compiled
    assert choose_compute(cfg, torch.device("cuda"), long).compiled
    assert not choose_compute(cfg, torch.device("cuda"), 100).compiled
    assert not choose_compute(minutes, torch.device("cuda"), long).compiled
    assert choose_compute(dataclasses.replace(minutes, train_minutes=8.0), torch.device("cuda"), long).compiled
    assert not choose_compute(dataclasses.replace(cfg, num_gpus=2), torch.device("cuda"), long).compiled
    assert choose_compute(dataclasses.replace(cfg, compile=True), CPU).compiled


def split_run(monkeypatch, **settings):
    """Weights after three steps, and the run."""
    cfg = tiny_training(precision="fp32", **settings)
    run = Trainer(cfg, Devices(cfg))
    for _ in range(3):
        run.train_step()
    return torch.cat([p.detach().flatten() for p in run.network.parameters()]), run


def near(a, b):
    """Equal but for rounding, which Adam makes larger where gradients are nearly 0."""
    return (a - b).norm() < 1e-4 * a.norm()


@pytest.mark.parametrize("settings", [{}, dict(gradient_accumulation_steps=2, batch_size=8)])
def test_a_step_that_does_not_fit_is_split(folder, monkeypatch, capsys, settings):
    """Out of memory: the step is done again in parts small enough, with the same result, and stays so; it is said."""
    whole, _ = split_run(monkeypatch, **settings)
    forward = diffuser.UNet.forward

    def small_memory(self, xt, *rest):
        if len(xt) > 4 and self.training:
            raise torch.OutOfMemoryError("no room")
        return forward(self, xt, *rest)

    monkeypatch.setattr(diffuser.UNet, "forward", small_memory)
    parts, run = split_run(monkeypatch, **settings)
    assert near(whole, parts) and run.compute.split == 4 // settings.get("gradient_accumulation_steps", 1)
    assert "a step is computed in" in capsys.readouterr().out
    assert run.progress.loss_sums[1, :, 1].sum() == 3 * 16                                # each image counted once
    assert run.state()["arithmetic"]["split"] == run.compute.split
    monkeypatch.setattr(diffuser.UNet, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):                              # not even one image
        run.train_step()


def test_a_cpu_splits_before_it_swaps(folder, monkeypatch, capsys):
    """Where the memory at hand is too small for a batch, the step is split from the start, and the run says so."""
    whole, _ = split_run(monkeypatch)
    cfg = tiny_training()
    fixed, moving = diffuser.training_memory(cfg, (1, 8, 8), 10, 16, "fp32")
    monkeypatch.setattr(diffuser, "free_memory", lambda device: int((fixed + moving / 3.5) / 0.9))
    parts, run = split_run(monkeypatch)
    assert run.compute.split == 4 and near(whole, parts)
    train(cfg)
    assert "a step is computed in 4 parts" in capsys.readouterr().out


def test_the_stored_split_is_kept(folder, monkeypatch):
    """A resumed run on a machine with less free memory computes its steps in as many parts as before."""
    path = trained_before()
    monkeypatch.setattr(diffuser, "free_memory", lambda device: 2**22)
    assert Trainer(tiny_training(), Devices(tiny_training()), load_checkpoint(path)).compute.split == 1
    assert Trainer(tiny_training(batch_size=512), Devices(tiny_training())).compute.split > 1


@pytest.mark.parametrize("free, words", [(2**28, "computed in"), (2**24, "one image at a time"), (2**20, "lower --base_channels")])
def test_dry_run_warns_before_a_cpu_swaps(folder, monkeypatch, capsys, free, words):
    """Less memory than a step takes, than one image takes, than the weights take: told before any is taken."""
    monkeypatch.setattr(diffuser, "free_memory", lambda device: free)
    flags = ["--mode", "train", "--dataset", "digits", "--device", "cpu", "--base_channels", "16", "--batch_size", "512", "--img_size", "32",
             "--patch_size", "1", "--dry_run"]
    code = diffuser.main(flags)
    out, errors = capsys.readouterr()
    assert words in (errors if code else out) and code == (2 if free == 2**20 else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_estimate_is_near_the_truth(folder):
    """What --dry_run tells is within a factor of two of what the process takes for a step."""
    program = ("import sys; sys.path.insert(0, {!r}); import diffuser\n" + STATUS +
               "cfg = diffuser.configure(dataset='digits', base_channels=64, channel_mults=(1, 2), num_heads=4,\n"
               "                         batch_size=256, precision='fp32', device='cpu')\n"
               "run = diffuser.Trainer(cfg, diffuser.Devices(cfg))\n"
               "before = status('VmHWM'); run.train_step(); print(status('VmHWM') - before)\n"
               "print(diffuser.training_memory(cfg, (1, 8, 8), 10, 256, 'fp32')[1] // 1024)")
    done = subprocess.run([sys.executable, "-c", program.format(str(ROOT))], capture_output=True, text=True, cwd=folder)
    taken, told = map(int, done.stdout.split())
    assert 0.5 < taken / told < 2, done.stdout


@pytest.mark.slow
def test_the_table_of_machines_in_the_guide(capsys):
    """Which batch and width fit into how much memory is what the lines beside the table print today."""
    guide = (ROOT / "docs/guide.md").read_text()
    lines = guide.split("This makes the table:\n\n```python\n")[1].split("```")[0]
    exec(lines, {})
    table = capsys.readouterr().out
    assert table in guide, f"put this into docs/guide.md, Memory:\n{table}"
    assert len(table.splitlines()) == 6


def test_gradient_checkpointing_changes_memory_only(folder):
    """Recomputed activations give the same weights, with dropout too, and take less memory."""
    runs = []
    for checkpointing in (False, True):
        cfg = tiny_training(dropout=0.2, gradient_checkpointing=checkpointing, precision="fp32")
        run, kept = Trainer(cfg, Devices(cfg)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, kept=kept: kept.append(v.numel()) or v, lambda v: v):
            run.train_step()
        run.train_step()
        runs.append((torch.cat([p.detach().flatten() for p in run.network.parameters()]), sum(kept)))
    (plain, much), (saving, little) = runs
    assert torch.equal(plain, saving) and little < much
    assert sum(diffuser.training_memory(cfg, (1, 8, 8), 10, 16, "fp32")) < sum(
        diffuser.training_memory(tiny_training(), (1, 8, 8), 10, 16, "fp32"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_a_cached_dataset(folder):
    """Batches from a cache keep no copy of the images: an epoch over 36 MB of them takes no memory of the process."""
    program = ("import sys; sys.path.insert(0, {!r}); import diffuser, numpy\n" + STATUS +
               "from PIL import Image\n"
               "image = Image.fromarray(numpy.full((32, 32, 3), 7, numpy.uint8))\n"
               "cfg = diffuser.configure(dataset='folder', num_workers=0, path_to_data='x', img_size=(32, 32), device='cpu')\n"
               "diffuser.Devices(cfg)\n"
               "data = diffuser.cached(cfg, [(image, 0)] * 12000, (3, 32, 32), ('t',), [])\n"
               "batches = diffuser.Batches(data, diffuser.split(data, 0.0)[0], 64, True, 0, 'cpu')\n"
               "for step in range(batches.steps_per_epoch):\n"
               "    batches(step)\n"
               "    if step in (20, batches.steps_per_epoch - 1):\n"
               "        print(status('RssAnon'))")
    done = subprocess.run([sys.executable, "-c", program.format(str(ROOT))], cwd=folder, capture_output=True, text=True)
    early, late = map(int, done.stdout.split()[-2:])
    assert late - early < 10_000, done.stdout                                # KiB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [dict(precision="bf16"), dict(precision="fp16"), dict(compile=True), dict(dropout=0.1)])
def test_training_and_sampling_on_cuda(folder, options):
    """On a GPU the same run works, its images on the device, without waiting for the device in a step."""
    cfg = tiny_training(device="cuda", num_gpus=1, iterations=6, **options)
    run = Trainer(cfg, Devices(cfg))
    assert run.batches.images.is_cuda
    run.train_step()
    torch.cuda.set_sync_debug_mode("error" if "precision" not in options else "default")
    run.train_step()
    torch.cuda.set_sync_debug_mode("default")
    model = diffuser.load(train(cfg), device="cuda")
    assert model.generate(["3", "7"], num_images=5, steps=3).shape == (5, 1, 8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_dry_run_times_steps_on_cuda(folder):
    """Its trial takes parts of a batch, whose shapes change as it goes."""
    done = cli("--mode", "train", "--dataset", "digits", "--dry_run", "--device", "cuda", "--num_gpus", "1", cwd=folder)
    assert done.returncode == 0 and "steps of" in done.stdout and "not measured" not in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, dict(optimizer="muon"), dict(precision="bf16", use_labels=False)])
def test_graphs_train_as_plain_calls_do(folder, monkeypatch, options):
    """On a GPU small steps run as CUDA graphs: the same losses and weights as without."""
    def state(graphs):
        with monkeypatch.context() as patch:
            if not graphs:
                patch.setattr(diffuser, "as_graphs", lambda function, inputs: function)
            captured = []
            graphed = torch.cuda.make_graphed_callables
            patch.setattr(torch.cuda, "make_graphed_callables", lambda *args, **more: captured.append(1) or graphed(*args, **more))
            path = train(tiny_training(**{"precision": "fp32", **options}, device="cuda", num_gpus=1, iterations=12,
                                       experiment_name=f"graphs{graphs}"))
            assert bool(captured) == graphs
        return load_checkpoint(path)

    plain = state(False)
    graphs = state(True)
    for (_, a), (_, b) in zip(plain["loss_history"], graphs["loss_history"], strict=True):
        assert a == pytest.approx(b, rel=1e-2)
    for name, weight in plain["model"].items():
        assert torch.allclose(weight, graphs["model"][name], atol=5e-3), name


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("operation not permitted")])
def test_where_no_graph_can_be_made_the_network_runs_as_it_is(monkeypatch, capsys, error):
    """Graphs hold a step's memory, and drivers may refuse them: training goes on without, and says so."""
    def refuse(*args, **more):
        raise error

    network = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    assert diffuser.as_graphs(network, (torch.zeros(1, 2),)) is network
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "minutes", "dry run"])
def test_graphs_are_called_with_what_they_were_captured_for(folder, monkeypatch, command):
    """A graph computes with the shapes of its capture, whatever it is given: in training, and where steps are timed."""
    calls = []

    def capture(function, inputs, **more):
        shapes = [v.shape for v in inputs]

        def graph(*given):
            calls.append(shapes)
            assert [v.shape for v in given] == shapes
            return function(*given)
        return graph

    def inputs(trainer):
        x0, t, _, y, _ = trainer.batch()
        return x0, t, y

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(Trainer, "graph_inputs", inputs)
    cfg = tiny_training(**({} if command != "minutes" else dict(iterations=0, train_minutes=0.02)))
    if command == "dry run":
        assert "steps of" in diffuser.describe_time(cfg, Devices(cfg), (1, 8, 8), 10, 1000)
    else:
        train(cfg)
    assert len(calls) >= 4


class OwnStep(Trainer):
    """A trainer that makes gradients of its own."""

    def accumulate(self, *args):
        return super().accumulate(*args)


@pytest.mark.parametrize("change, graphs", [
    ({}, True), (dict(size=2**12), True), (dict(size=2**13), False), (dict(size=2**13, patch_size=2), True),
    (dict(device="cpu"), False), (dict(count=2), False), (dict(accumulation=2), False), (dict(checkpointing=True), False),
    (dict(kind=OwnStep), False)])
def test_graphs_are_for_small_whole_steps_on_one_gpu(folder, monkeypatch, change, graphs):
    """Large steps gain nothing, and gradients in parts, over devices or of one's own do not fit into a graph."""
    monkeypatch.setattr(Trainer, "batch", lambda self: ["x0", "t", "eps", "y", "noise"])
    trainer = change.get("kind", Trainer)(tiny_training())
    trainer.device = torch.device(change.get("device", "cuda"))
    trainer.devices.replicas = trainer.devices.count = change.get("count", 1)
    trainer.size = change.get("size", 16)
    trainer.cfg = dataclasses.replace(
        trainer.cfg, patch_size=change.get("patch_size", 1), gradient_accumulation_steps=change.get("accumulation", 1),
        gradient_checkpointing=change.get("checkpointing", False))
    assert trainer.graph_inputs() == (("x0", "t", "y") if graphs else ())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_training_and_sampling_agree_with_plain(folder):
    """--compile, where it is asked for on a CPU: the same losses to rounding, and the same images, in full batches."""
    paths = [train(tiny_training(compile=compiled, experiment_name=f"c{compiled}", precision="fp32"))
             for compiled in (False, True)]
    plain, compiled = map(load_checkpoint, paths)
    assert compiled["arithmetic"]["compiled"] and not any("_orig_mod" in name for name in compiled["model"])
    for (_, a), (_, b) in zip(plain["loss_history"], compiled["loss_history"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    images = [diffuser.load(paths[0], device="cpu", compile=compiled, precision="fp32").generate(
        ["3"], num_images=5, steps=3, sample_batch_size=3) for compiled in (False, True)]
    assert (images[0].int() - images[1].int()).abs().max() <= 1


def test_memory_use_is_read_from_the_system(monkeypatch):
    """free_memory is what the system calls available; where it cannot be told nothing is refused."""
    assert 2**20 < diffuser.free_memory(CPU) <= 2**60
    monkeypatch.setattr(diffuser.Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
    assert diffuser.free_memory(CPU) == 2**60


def test_small_networks_run_on_one_thread(monkeypatch):
    """Digits' steps are too small for threads that wait for each other; larger ones take all there are."""
    monkeypatch.setattr(diffuser, "ALL_THREADS", 2)
    before = torch.get_num_threads()
    try:
        diffuser.use_threads(diffuser.configure(dataset="digits"), (1, 8, 8), 10)
        assert torch.get_num_threads() == 1
        diffuser.use_threads(diffuser.configure(dataset="mnist"), (1, 28, 28), 10)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_training_and_drawing_use_that_rule(folder, monkeypatch):
    """Both a run and a model that draws settle their threads."""
    path = trained_before()
    seen = []
    monkeypatch.setattr(diffuser, "use_threads", lambda cfg, shape, classes: seen.append((cfg.dataset, shape, classes)))
    diffuser.Trainer(tiny_training())
    diffuser.load(path, device="cpu")
    assert seen == [("digits", (1, 8, 8), 10)] * 2


def test_a_guide_leaves_the_threads_of_its_model(folder, monkeypatch):
    """The weaker network is built after the model, whose threads count."""
    weak = diffuser.train(tiny_training(base_channels=8, experiment_name="weak"))
    strong = diffuser.train(tiny_training(base_channels=16, experiment_name="strong"))
    seen = []
    monkeypatch.setattr(diffuser, "use_threads", lambda cfg, shape, classes: seen.append(cfg.base_channels))
    diffuser.load(strong, device="cpu", guide_path=str(weak), guidance_scale=1.0)
    assert seen[-1] == 16


def test_saving_and_drawing_are_no_sign_of_other_programs(folder, monkeypatch):
    """They keep few threads busy: only steps are watched."""
    watches = []
    save = diffuser.save_checkpoint

    class Watched(diffuser.CoreWatch):
        def __init__(self, threads):
            super().__init__(2)
            watches.append(self)

    monkeypatch.setattr(diffuser, "CoreWatch", Watched)
    monkeypatch.setattr(diffuser, "save_checkpoint", lambda *arguments: (diffuser.time.sleep(5), save(*arguments)))
    diffuser.train(tiny_training(iterations=2))
    [watch] = watches
    assert 0 < watch.wall_time < 5 and watch.cpu_time > 0


def step_took(monkeypatch, watch, wall, cpu):
    """Let a step take these seconds by either clock."""
    with monkeypatch.context() as clocks:
        walls, cpus = iter([0.0, wall]), iter([0.0, cpu])
        clocks.setattr(diffuser.time, "perf_counter", lambda: next(walls))
        clocks.setattr(diffuser.time, "process_time", lambda: next(cpus))
        with watch.watch():
            pass


@pytest.mark.parametrize("threads, cpu, told", [(2, 19.0, False), (2, 13.0, True), (1, 5.0, False)])
def test_cores_that_others_hold_are_told(monkeypatch, threads, cpu, told):
    """Threads that get much less than all of their time are told, with how to give the run fewer of them."""
    watch = diffuser.CoreWatch(threads)
    step_took(monkeypatch, watch, 10.0, cpu)
    advice = watch.look()
    assert bool(advice) is told and (not told or ("OMP_NUM_THREADS=1" in advice and "65%" in advice))


def test_cores_are_told_of_once(monkeypatch):
    """The advice comes once in a run, and not before there is enough to look at."""
    watch = diffuser.CoreWatch(2)
    told = []
    for wall, cpu in ((5.0, 6.0), (7.0, 6.0), (28.0, 28.0)):
        step_took(monkeypatch, watch, wall, cpu)
        told.append(bool(watch.look()))
    assert told == [False, True, False]
