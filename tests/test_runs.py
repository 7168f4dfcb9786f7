"""Training runs as processes: found, started, stopped, resumed, compared, deleted; uploads."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
import zipfile

import prepared
import pytest
import torch
from conftest import TINY_FLAGS, heed_interrupts, tiny_training, trained_before
from PIL import Image

import diffuser
import runs
from diffuser_lib.files import UserError, hold_lock, lock_holder
from runs import Places

PLACES = Places()


def trained(name, **more):
    """A run of a few steps by that name; returns it as its folder shows it."""
    cfg = tiny_training(experiment_name=name, **more)
    trained_before(experiment_name=name, **more)
    return runs.find_run(PLACES, diffuser.samples_path(cfg).name)


def wait_for(what, seconds=60):
    """Wait until what() is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.fixture
def children():
    """The processes that a test starts; none stays behind."""
    yield runs.CHILDREN
    for child in runs.CHILDREN.values():
        child.kill()
        child.wait()
    runs.CHILDREN.clear()


# ---- Locks -------------------------------------------------------------------------------------


def test_who_holds_a_place(folder):
    """The process that holds a lock is named while it lives, and nobody once it is dead, killed or not."""
    place = folder / "run"
    assert lock_holder(place) is None
    code = ("import sys, time; from pathlib import Path; from diffuser_lib.files import hold_lock\n"
            "with hold_lock(Path('run'), '--flag', ''): print('held', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True,
                             env={"PYTHONPATH": str(runs.ROOT)})
    try:
        assert child.stdout.readline() == "held\n"
        assert lock_holder(place) == child.pid
    finally:
        child.kill()
        child.wait()
    assert lock_holder(place) is None


def test_a_holder_on_another_machine_is_not_signalled(folder):
    """A process number of another machine is nobody's here: stopping such a run is refused."""
    run = trained("far")
    with hold_lock(run.folder, "--flag", ""):
        owner = folder / "samples" / f".{run.folder.name}.owner"
        owner.write_text("process 1 on elsewhere since today: python diffuser.py")
        assert lock_holder(run.folder) == 0
        with pytest.raises(UserError, match="another machine"):
            runs.stop_run(runs.find_run(PLACES, run.key))


# ---- What there is -----------------------------------------------------------------------------


def test_a_finished_run_is_read(folder):
    """Name, steps, losses and grids of a run; how many steps it has in all follows from its settings."""
    run = trained("first", iterations=6)
    assert (run.name, run.step, run.total, run.status) == ("first", 6, 6, "finished")
    assert run.images == 1762 and len(run.rows) == 3 and len(run.grids) >= 1 and run.process is None


def test_broken_files_leave_the_rest(folder):
    """A run whose files are rubbish is listed with what is left of it, and nothing is raised."""
    run = trained("first")
    for content in ("rubbish", "[]", '{"config": {"epochs": "many"}}', '{"config": 7, "images": "x"}', "\0" * 50):
        (run.folder / "config.json").write_text(content)
        (run.folder / "metrics.csv").write_text("step,loss\nnan,x\n")
        broken = runs.find_run(PLACES, run.key)
        assert broken.cfg is None and broken.step == 0 and broken.seconds_left == 0 and len(broken.grids) == 1
        assert runs.table_of_runs([broken])[1][0][0] == broken.name


def test_the_time_left_follows_from_the_last_rows():
    """Steps left times the seconds of a step; nothing where the rows do not say."""
    rows = [{"step": "10", "seconds": "99"}, {"step": "20", "seconds": "5"}, {"step": "30", "seconds": "5"}]
    run = runs.Run(PLACES.samples, tiny_training(iterations=130), 1000, rows, [], 1)
    assert run.seconds_left == pytest.approx(50)
    for broken in ([], rows[:1], [{"step": "10"}, {"step": "20"}], [{"step": "x", "seconds": "1"}] * 2):
        assert dataclasses.replace(run, rows=broken).seconds_left == 0


def test_keys_are_looked_up(folder):
    """A key is one of those listed: a path, or a part of one, finds nothing."""
    trained("first")
    for key in ("../samples/samples_first_cosine_20_8_attention", "/etc", "..", "", None):
        with pytest.raises(UserError, match="gone"):
            runs.find_run(PLACES, key)


# ---- Starting and stopping ---------------------------------------------------------------------


@pytest.fixture
def forked(folder, monkeypatch):
    """Runs are started from the process that has torch imported."""
    def start(command, stdout, **rest):
        return prepared.background(command[1:], folder, stdout=stdout, stderr=stdout)

    def run(command, **rest):
        return prepared.run(*command[1:], cwd=folder)

    known = ("DEVNULL", "STDOUT", "TimeoutExpired")
    stand_in = types.SimpleNamespace(Popen=start, run=run, **{name: getattr(subprocess, name) for name in known})
    monkeypatch.setattr(runs, "subprocess", stand_in)


def words(name, *more):
    """A command line that trains tiny digits."""
    return runs.to_words(dict(mode="train", dataset="digits", experiment_name=name, **PLACES.options())) + [
        *TINY_FLAGS, *more]


def test_a_run_is_started_stopped_and_resumed(folder, forked, children):
    """Started as a process of its own; Ctrl-C from outside saves; it goes on from there and ends at its last step."""
    key = runs.start_run(words("first", "--iterations", "100000", "--log_every", "5"))
    assert runs.find_run(PLACES, key).status == "starting"
    wait_for(lambda: runs.find_run(PLACES, key).step >= 5)
    run = runs.find_run(PLACES, key)
    assert run.status == "training" and run.process and run.total == 100000
    with pytest.raises(UserError, match="training already"):
        runs.start_run(words("first", "--iterations", "100000"))
    with pytest.raises(UserError, match="stop it first"):
        runs.parts_of(PLACES, run)

    # Asked twice it saves all the same: a second signal would end it at once.
    assert "saves and stops" in runs.stop_run(run)
    assert "saving already" in runs.stop_run(run)
    wait_for(lambda: runs.find_run(PLACES, key).process is None)
    run = runs.find_run(PLACES, key)
    assert run.status == "stopped" and "interrupted: saved" in runs.last_words(run)
    saved = diffuser.load_checkpoint(diffuser.kept_checkpoints(run.cfg)[0])["step"]

    # The same settings, but for where it ends.
    state = diffuser.load_checkpoint(diffuser.kept_checkpoints(run.cfg)[0])
    state["config"]["iterations"] = saved + 5
    torch.save(state, diffuser.kept_checkpoints(run.cfg)[0])
    assert runs.resume_run(PLACES, run) == key
    wait_for(lambda: runs.find_run(PLACES, key).process is None)
    run = runs.find_run(PLACES, key)
    assert run.step == saved + 5 and f"at step {saved} of" in runs.last_words(run)
    assert runs.stop_run(run) == "first is not training"


def test_a_run_outlives_what_started_it(folder):
    """The process that started a run may end, by Ctrl-C or killed: the run is still found, and goes on."""
    code = ("import sys, time, runs\n"
            f"print(runs.start_run({words('first', '--iterations', '100000', '--log_every', '2')!r}), flush=True)\n"
            "time.sleep(60)")
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=folder,
                               env={"PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"}, start_new_session=True,
                               preexec_fn=heed_interrupts)
    key = starter.stdout.readline().strip()
    wait_for(lambda: runs.find_run(PLACES, key).step >= 2)
    starter.send_signal(signal.SIGINT)
    starter.wait()
    before = runs.find_run(PLACES, key).step
    wait_for(lambda: runs.find_run(PLACES, key).step > before)
    runs.stop_run(runs.find_run(PLACES, key))
    wait_for(lambda: runs.find_run(PLACES, key).process is None)


def test_what_a_run_dies_of_is_kept(folder, forked, children):
    """The last words of a run that cannot start are those of the command, without a traceback."""
    key = runs.start_run(runs.to_words(dict(mode="train", path_to_data=str(folder / "nothing"), experiment_name="bad",
                                            **PLACES.options())))
    children[key].wait(60)
    run = runs.find_run(PLACES, key)
    assert run.status == "stopped" and "there is no such folder" in runs.last_words(run)
    assert "Traceback" not in runs.last_words(run)


def test_bad_options_are_told_before_anything_starts(folder, children):
    """A mistake in the options is the command line's own message, and no process is started for it."""
    for further, message in (("--epochs many", "epochs"), ("--nothing 3", "unknown option"), ("'", "No closing")):
        with pytest.raises(UserError, match=message):
            runs.start_run(words("first") + runs.parse_further(further))
    assert not children and not (folder / "samples").exists()


@pytest.mark.parametrize("option", ["--data_dir /etc", "--path_to_data /", "--working_directory ..", "--config x",
                                    "--resume_from_checkpoint x", "--init_from x", "--experiment_name ../x", "--debug",
                                    "--output_dir /tmp", "--train_data_dir /"])
def test_no_path_is_taken_from_a_page(option):
    """Options that name files, by whatever spelling, are refused where they come from somebody's text."""
    with pytest.raises(UserError, match="is not taken here"):
        runs.parse_further(option)


def test_a_dry_run_tells_what_it_will_take(folder, forked):
    """Parameters, steps, memory and time before a run begins; what is wrong with it instead, where something is."""
    text = runs.dry_run(words("first", "--iterations", "50"))
    for part in ("parameters", "50 steps", "GiB", "time "):
        assert part in text
    assert text.startswith("device") and "learning_rate" not in text
    with pytest.raises(UserError, match="there is no such folder"):
        runs.dry_run(runs.to_words(dict(mode="train", path_to_data="nothing")))


# ---- Uploads -----------------------------------------------------------------------------------


def test_uploads_are_kept_under_names_of_ours(folder, image_folder):
    """Pictures are copied with numbers for names; a ZIP file stays whole, and is what training reads."""
    files = [str(path) for path in sorted(image_folder.glob("cat/*"))]
    kept = runs.keep_uploads(folder / "uploads", files, "mine")
    assert kept == folder / "uploads" / "mine_1" and len(list(kept.iterdir())) == len(files)
    assert {path.stem for path in kept.iterdir()} == {f"{i:06}" for i in range(len(files))}

    # A camera's file of several JPEG pictures is one that training finds.
    several = Image.new("RGB", (16, 16), "red")
    several.save(folder / "several.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    [copied] = runs.keep_uploads(folder / "uploads", [str(folder / "several.jpg")], "camera").iterdir()
    assert copied.name == "000000.jpg" and diffuser.open_image(copied).format == "MPO"

    packed = folder / "pictures.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in image_folder.rglob("*.png"):
            archive.write(path, path.relative_to(image_folder))
    kept = runs.keep_uploads(folder / "uploads", [str(packed)], "mine")
    assert kept.name == "mine_1.zip" and kept.read_bytes() == packed.read_bytes()


def test_an_upload_whose_name_was_just_taken(folder, image_folder, monkeypatch):
    """What another program put there at the same moment stays as it is."""
    theirs = folder / "uploads" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "picture").touch()
    monkeypatch.setattr(runs, "unused_path", lambda *name: theirs)
    with pytest.raises(UserError, match="cannot be kept"):
        runs.keep_uploads(folder / "uploads", [str(next(image_folder.glob("cat/*.png")))], "mine")
    assert (theirs / "picture").exists()


def test_a_run_that_cannot_be_stopped_is_not_said_to_be_saving(monkeypatch):
    """The process of another user: told each time that it is asked for."""
    run = types.SimpleNamespace(name="theirs", key="theirs", process=os.getpid())
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    for _ in range(2):
        with pytest.raises(UserError, match="theirs cannot be stopped"):
            runs.stop_run(run)


def test_hostile_uploads_are_refused(folder, image_folder):
    """What is no picture, too much, or a ZIP file of nothing is refused, and nothing of it is kept."""
    picture = str(next(image_folder.glob("cat/*.png")))
    (folder / "page.png").write_text("<html>")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (folder / "broken.zip").write_bytes(b"PK\3\4 and no more")
    with zipfile.ZipFile(folder / "empty.zip", "w") as archive:
        archive.writestr("../../evil.txt", "no picture")
    for files, message in (([], "drop a ZIP"), (["page.png"], "cannot be read"), (["script.png"], "cannot be read"),
                           (["broken.zip"], "no whole ZIP"), (["empty.zip"], "holds no"),
                           (["empty.zip", picture], "either one ZIP"),
                           ([picture] * (runs.MOST_UPLOADED + 1), "more than the")):
        with pytest.raises(UserError, match=message):
            runs.keep_uploads(folder / "uploads", files, "mine")
    assert not (folder / "uploads").exists() and not (folder.parent / "evil.txt").exists()


# ---- Comparing and deleting --------------------------------------------------------------------


def test_the_table_shows_what_differs(folder):
    """Settings in which runs differ have a column, those that they share have none."""
    headings, rows = runs.table_of_runs([trained("a", learning_rate=1e-3), trained("b", learning_rate=2e-3)])
    assert headings == ["run", "status", "steps", "loss", "validation", "learning_rate"]
    assert [row[0] for row in rows] == ["a", "b"] and [row[-1] for row in rows] == ["0.001", "0.002"]


def test_curves_are_those_of_plot_loss(folder):
    """The overlaid curves are a picture, also with a loss that no axis can hold."""
    run = trained("a")
    picture = runs.overlaid_curves([run])
    assert picture.startswith(b"\x89PNG")
    (run.folder / "metrics.csv").write_text("step,epoch,loss\n1,1,1e308\n2,2,1e308\n")
    assert runs.overlaid_curves([run]) != picture                # such a loss is left out


def test_a_run_that_has_just_begun_leaves_the_others_their_curves(folder):
    """It has no number yet; alone it is a line."""
    begun = dataclasses.replace(trained("a"), rows=[], grids=[])
    assert runs.overlaid_curves([begun, trained("b")]).startswith(b"\x89PNG")
    with pytest.raises(UserError, match="none of these runs has a number yet"):
        runs.overlaid_curves([begun])


def test_deleting_takes_one_run_alone(folder):
    """All that is one run's goes, by its settings; of others, and of a folder that was renamed, nothing does."""
    first = trained("first")
    second = trained("second")
    unnamed = trained("")
    runs.delete_run(PLACES, first)
    assert not first.folder.exists() and not (folder / "checkpoints" / "first").exists()
    assert second.folder.exists() and (folder / "checkpoints" / "second").exists()
    runs.delete_run(PLACES, unnamed)
    assert not unnamed.folder.exists() and not list((folder / "checkpoints").glob("*.pt"))

    # One whose name begins with this one's, in a folder of this one's.
    third = trained("third")
    inner = diffuser.train(tiny_training(experiment_name="third/v1.5"))
    runs.delete_run(PLACES, third)
    assert inner.is_file() and not list((folder / "checkpoints" / "third").glob("checkpoint_*"))

    # Files in it that are not a run's.
    fourth = trained("fourth")
    (folder / "checkpoints" / "fourth" / "mine.safetensors").touch()
    runs.delete_run(PLACES, fourth)
    assert [path.name for path in (folder / "checkpoints" / "fourth").iterdir()] == ["mine.safetensors"]

    # A folder that says it is another run's.
    moved = second.folder.rename(second.folder.with_name("samples_copy"))
    runs.delete_run(PLACES, runs.find_run(PLACES, moved.name))
    assert not moved.exists() and (folder / "checkpoints" / "second").exists()


def test_a_checkpoint_of_two_runs_is_not_deleted_with_one(folder):
    """Runs without names that differ in their schedule share the name of a checkpoint: it stays with the one it is of."""
    first = trained("", schedule_type="cosine")
    diffuser.train(tiny_training(schedule_type="linear", resume="never"))
    runs.delete_run(PLACES, first)
    [kept] = (folder / "checkpoints").glob("diffusion_checkpoint_digits_20_8_attention.pt")
    assert not first.folder.exists() and diffuser.load_checkpoint(kept)["config"]["schedule_type"] == "linear"


def test_uploads_go_with_the_last_run_that_trains_on_them(folder, image_folder):
    """They would fill the disk; pictures that stand elsewhere stay."""
    files = [str(path) for path in sorted(image_folder.glob("cat/*"))]
    uploaded = runs.keep_uploads(PLACES.data / "uploads", files, "mine")

    def trained_on(name, path):
        cfg = tiny_training(experiment_name=name, dataset="folder", img_size=(8, 8), path_to_data=str(path))
        diffuser.train(cfg)
        return runs.find_run(PLACES, diffuser.samples_path(cfg).name)

    first, second = (trained_on(name, uploaded) for name in ("first", "second"))
    elsewhere = trained_on("elsewhere", image_folder)
    assert uploaded not in runs.parts_of(PLACES, first)
    runs.delete_run(PLACES, first)
    assert uploaded.exists()
    runs.delete_run(PLACES, second)
    runs.delete_run(PLACES, elsewhere)
    assert not uploaded.exists() and image_folder.exists()


def test_a_run_that_has_begun_meanwhile_is_not_deleted(folder, monkeypatch):
    """Deleting looks once more whether it trains: what is known of a run may be old."""
    run = trained("first")
    monkeypatch.setattr(runs, "process_of", lambda place: 12345)
    with pytest.raises(UserError, match="stop it first"):
        runs.delete_run(PLACES, run)
    assert run.folder.exists()


def test_a_run_that_was_set_aside_resumes_no_other(folder):
    """Its checkpoint has gone: the one under its name is that of the run which began anew."""
    trained("first")
    diffuser.train(tiny_training(experiment_name="first", resume="never", learning_rate=3e-3))
    [aside] = (folder / "samples").glob("*_old1")
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        runs.resume_run(PLACES, runs.find_run(PLACES, aside.name))


@pytest.mark.parametrize("name", ["../..", "/etc", ".", "..", "a/../../b"])
def test_deleting_stays_below_its_folders(folder, name):
    """A config.json that names an experiment elsewhere is no run's: nothing but its own folder is deleted."""
    run = trained("first")
    about = json.loads((run.folder / "config.json").read_text())
    about["config"]["experiment_name"] = name
    about["config"]["working_directory"] = "/"
    (run.folder / "config.json").write_text(json.dumps(about))
    hostile = runs.find_run(PLACES, run.key)
    assert runs.parts_of(PLACES, hostile) == [run.folder]


def test_the_picture_of_a_run_is_found(folder):
    """The grids are in the order of their epochs, so that the last is the newest."""
    run = trained("first", iterations=4)
    Image.new("L", (4, 4)).save(run.folder / "epoch_10_loss_0.1.png")
    Image.new("L", (4, 4)).save(run.folder / "epoch_9_loss_0.1.png")
    assert runs.find_run(PLACES, run.key).grids[-1].name == "epoch_10_loss_0.1.png"
