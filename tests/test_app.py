"""The page: in a real browser, as somebody uses it who has never trained a model, and as somebody who attacks it."""

import asyncio
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, cli, heed_interrupts, tiny_training
from PIL import Image

import diffuser

gradio = pytest.importorskip("gradio", reason="gradio is not installed")
import app  # noqa: E402 (it ends where gradio is missing)
import runs  # noqa: E402
from diffuser_lib.files import UserError  # noqa: E402


class Server:
    """app.py in a process of its own, in a folder."""

    def __init__(self, folder, *arguments, script=ROOT / "app.py", env=None):
        self.folder = folder
        self.log = open(folder / "server.log", "w+")
        self.process = subprocess.Popen([sys.executable, str(script), *arguments], cwd=folder, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, preexec_fn=heed_interrupts,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
        found = None
        for line in self.process.stdout:
            found = re.match(r"(http://\S+?)/? ", line)
            if found:
                break
        assert found, (folder / "server.log").read_text()
        self.address = found[1]

    def stop(self):
        """Ctrl-C; returns what it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0
        self.process.stdout.close()
        self.log.close()
        return (self.folder / "server.log").read_text()


class Window:
    """The page in a browser. requests: all that it asks for; problems: what the console says."""

    def __init__(self, browser, address, **more):
        self.context = browser.new_context(**{"viewport": dict(width=1200, height=1000), **more})
        self.context.set_default_timeout(120_000)            # a machine may be busy
        self.page = self.context.new_page()
        self.requests = []
        self.problems = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        self.page.goto(address)
        ready = self.page.get_by_role("button", name="draw", exact=True).or_(
            self.page.get_by_role("button", name="train digits"))
        ready.locator("visible=true").first.wait_for()
        self.page.wait_for_timeout(1500)                         # until it has asked for what there is

    def tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()

    def click(self, name):
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def pictures(self):
        """The addresses of the pictures that can be chosen."""
        return self.page.locator(".pictures:visible img").evaluate_all("all => all.map(image => image.src)")

    def pixels(self):
        """The pictures that can be chosen, as arrays."""
        return [decode(address) for address in self.pictures()]

    def command(self):
        """The command line that is shown."""
        return self.page.locator(".cm-content:visible").first.inner_text().replace("\n", " ")

    def drawn(self, count):
        """Wait until so many pictures are there for good."""
        self.page.locator(".pictures:visible button").nth(count - 1).wait_for()
        self.page.get_by_role("button", name="download as ZIP").locator("visible=true").first.wait_for()

    def error(self):
        """The line that a mistake is told with."""
        toast = self.page.locator(".toast-body").first
        toast.wait_for()
        text = toast.inner_text()
        self.page.get_by_role("button", name="Close").first.click()
        toast.wait_for(state="detached")
        return text

    def close(self):
        self.context.close()


def distance(picture, others):
    """How far pictures are from one of them, on average over pixels."""
    return np.mean([np.abs(picture.astype(float) - other).mean() for other in others])


def decode(address):
    """A picture in an address, as an array."""
    import base64

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model that was trained for a moment."""
    folder = tmp_path_factory.mktemp("app")
    before = os.getcwd()
    os.chdir(folder)
    try:
        diffuser.train(tiny_training(experiment_name="tiny", iterations=150, timesteps=100, learning_rate=4e-3, log_every=50))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def server(place):
    """The page of that folder."""
    server = Server(place)
    yield server
    assert "Traceback" not in server.stop()


@pytest.fixture
def window(browser, server):
    """A window that shows it. Nothing is asked of other machines, and nothing goes wrong in the browser."""
    window = Window(browser, server.address)
    yield window
    window.close()
    assert not [url for url in window.requests if not url.startswith((server.address, "data:", "blob:"))]
    assert window.problems == []


# ---- Drawing -----------------------------------------------------------------------------------


def test_drawing_is_watched_and_repeated_on_the_command_line(window, server):
    """Pictures come out of the noise as they are drawn; the ZIP file is what the command shown writes, to the byte."""
    window.page.get_by_label("3", exact=True).check()
    window.page.get_by_label("8", exact=True).check()
    window.page.get_by_label("images").first.fill("64")
    window.page.get_by_text("How it is drawn", exact=True).first.click()
    steps = window.page.get_by_role("spinbutton", name=re.compile("steps"))
    steps.and_(window.page.locator("[max='100']")).first.fill("100")        # once the checkpoint's own settings are there
    window.page.evaluate("""() => {
        window.seen = new Set();
        const look = () => window.seen.add(document.querySelector('.pictures img')?.src);
        new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
    }""")
    window.click("draw")
    window.drawn(64)
    assert window.page.evaluate("[...window.seen].filter(src => src).length") >= 2     # one on the way, at least
    names = window.page.locator(".pictures:visible button").evaluate_all("all => all.map(button => button.title)")
    assert names == [f"{i}: {'38'[i % 2]}" for i in range(64)]

    with window.page.expect_download() as download:
        window.page.get_by_role("button", name="download as ZIP").locator("visible=true").click()
    command = window.command()
    assert command.startswith("python diffuser.py --mode inference") and "--steps 100" in command
    done = cli(*command.split()[2:], "--save_dir", "drawn", cwd=server.folder)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(download.value.path()) as archive:
        files = [name for name in archive.namelist() if name.startswith("images/")]
        assert len(files) == 64
        for name in files:
            drawn = (server.folder / "drawn" / name).read_bytes()
            assert np.array_equal(Image.open(io.BytesIO(archive.read(name))), Image.open(io.BytesIO(drawn)))
        ours = json.loads(archive.read("samples.json"))
        theirs = json.loads((server.folder / "drawn" / "samples.json").read_text())
        assert diffuser.drawing_request(ours) == diffuser.drawing_request(theirs)
        assert "grid.png" in archive.namelist()


@pytest.mark.slow
def test_pictures_stay_sharp(window):
    """A picture of eight pixels a side is shown large without being smoothed."""
    window.click("draw")
    window.drawn(16)
    picture = window.page.locator(".pictures:visible img").first
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert picture.bounding_box()["width"] > 5 * window.pixels()[0].shape[1]


@pytest.mark.slow
def test_other_seeds_and_more_of_a_kind(window):
    """Another seed draws others; what is like a chosen one comes out of it, and near strength 0 is it."""
    window.click("draw")
    window.drawn(16)
    first = window.pixels()
    window.click("new seed")
    window.page.wait_for_function("old => document.querySelector('.pictures img')?.src != old", arg=window.pictures()[0])
    window.page.wait_for_timeout(1500)
    assert not np.array_equal(first[0], window.pixels()[0])

    chosen = window.pixels()[5]
    far = distance(chosen, window.pixels()[6:])
    window.page.locator(".pictures:visible button").nth(5).click()
    assert window.page.locator(".pictures:visible button").nth(5).get_attribute("aria-pressed") == "true"
    window.page.get_by_role("spinbutton", name=re.compile("strength")).locator("visible=true").fill("0.05")
    window.page.wait_for_timeout(500)
    window.click("more like the chosen one")
    window.page.wait_for_function("document.querySelector('.cm-content')?.innerText.includes('vary')")
    assert distance(chosen, window.pixels()) < 0.7 * far
    assert "edit.py" in window.command() and "vary" in window.command()


@pytest.mark.slow
def test_side_by_side(window):
    """Two ways to draw have the same seeds: the same settings give the same pictures, other steps give others."""
    window.page.get_by_text("Side by side", exact=True).click()
    window.page.get_by_label("draw side by side").check()
    window.click("draw")
    window.page.locator(".pictures:visible").nth(1).wait_for()
    window.page.get_by_role("button", name="download as ZIP").locator("visible=true").nth(1).wait_for()
    pictures = window.pictures()
    assert len(pictures) == 32 and pictures[:16] == pictures[16:]


@pytest.mark.slow
def test_two_windows_do_not_disturb_each_other(browser, server, window):
    """What is drawn, chosen and shown in one window stays as it is while another one draws."""
    window.page.get_by_label("1", exact=True).check()
    window.click("draw")
    window.drawn(16)
    before = window.pictures()
    other = Window(browser, server.address)
    try:
        other.page.get_by_label("images").first.fill("3")
        other.click("draw")
        other.drawn(3)
        assert len(other.pictures()) == 3
    finally:
        other.close()
    assert window.pictures() == before and window.page.get_by_label("1", exact=True).is_checked()


# ---- Editing -----------------------------------------------------------------------------------


def upload(window, field, *files):
    """Give files to a field."""
    window.page.locator(f"#{field} input[type=file]").set_input_files([str(file) for file in files])


@pytest.fixture
def picture(tmp_path):
    """A picture of somebody's own: a white square on black."""
    pixels = np.zeros((160, 160), np.uint8)
    pixels[:, 80:] = 255
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


@pytest.mark.slow
def test_the_way_between_two_images(window):
    """The ends are those seeds' own images, and a slider walks from one to the other."""
    window.tab("Edit")
    window.click("draw the way")
    window.page.locator(".pictures:visible").nth(1).wait_for()
    way = window.pixels()
    assert len(way) == 1 + 9                                     # the one at the slider's place
    slider = window.page.get_by_role("slider", name=re.compile("place on the way")).locator("visible=true")
    for key, place in (("Home", 0), ("End", 8)):
        slider.focus()
        window.page.keyboard.press(key)
        window.page.wait_for_function("([i]) => { const all = document.querySelectorAll('.pictures img');"
                                      "const shown = [...all].filter(image => image.offsetParent);"
                                      "return shown[0].src == shown[1 + i].src }", arg=[place])


@pytest.mark.slow
def test_a_picture_of_ones_own_is_varied(window, picture):
    """An uploaded picture is shown as the model sees it, and at a low strength what comes out is like it."""
    window.tab("Edit")
    window.tab("Like a picture")
    upload(window, "vary-picture", picture)
    shown = window.page.locator(".thumbnail:visible img")
    shown.wait_for()
    assert decode(shown.get_attribute("src")).shape == (8, 8)
    window.page.get_by_role("spinbutton", name=re.compile("strength")).locator("visible=true").fill("0.05")
    window.page.wait_for_timeout(500)
    window.click("draw others like it")
    window.drawn(8)
    halves = [(image[:, :4].mean(), image[:, 4:].mean()) for image in window.pixels()]
    assert all(left < right for left, right in halves)


@pytest.mark.slow
def test_a_painted_part_is_drawn_anew(window, picture):
    """What is painted over in the page is drawn anew, and every pixel that is not stays as it was."""
    window.tab("Edit")
    window.tab("A part anew")
    window.click("draw the part anew")
    assert "choose a picture" in window.error()
    upload(window, "fill-picture", picture)
    canvas = window.page.locator("canvas:visible").first
    canvas.wait_for()
    window.page.wait_for_timeout(2000)                           # until the picture is on it
    window.click("draw the part anew")
    assert "paint over" in window.error()

    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    window.page.mouse.move(*middle)
    window.page.mouse.down()
    window.page.mouse.move(middle[0] + 10, middle[1] + 5, steps=5)
    window.page.mouse.up()
    window.page.wait_for_timeout(500)
    window.click("draw the part anew")
    window.drawn(8)
    seen = np.asarray(Image.open(picture).resize((8, 8), Image.Resampling.LANCZOS)).astype(int)
    images = np.stack(window.pixels()).astype(int)
    changed = np.abs(images - seen).max(0) > 2
    assert changed[3:5, 3:5].any() and not changed[0].any() and not changed[-1].any() and not changed[:, 0].any()


@pytest.mark.slow
def test_a_mask_from_a_file(window, picture, tmp_path):
    """Without a mouse a mask is given as a picture: the white half is drawn anew, the black one stays."""
    mask = np.zeros((160, 160), np.uint8)
    mask[80:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    window.tab("Edit")
    window.tab("A part anew")
    upload(window, "fill-picture", picture)
    window.page.locator("canvas:visible").first.wait_for()
    window.page.get_by_text("Or a mask from a file").click()
    upload(window, "fill-mask", tmp_path / "mask.png")
    window.page.wait_for_timeout(1000)
    window.click("draw the part anew")
    window.drawn(8)
    images = np.stack(window.pixels()).astype(int)
    assert (images[:, :4] == images[:1, :4]).all() and (images[:, 4:] != images[:1, 4:]).any()


# ---- Training ----------------------------------------------------------------------------------


def train_tiny(window, name, steps, *more):
    """Fill in the form for a run of the tiny network, and start it."""
    window.tab("Train")
    window.page.get_by_label("how long").locator("visible=true").fill(str(steps))
    window.page.get_by_role("combobox", name="in", exact=True).click()
    window.page.get_by_role("option", name="steps").click()
    window.page.get_by_label("name of the run").fill(name)
    window.page.get_by_text("More", exact=True).click()
    window.page.get_by_label("other options").fill(" ".join([*TINY_FLAGS, *more]))


def progress(window, words):
    """Wait until the line below the bar holds these words; returns it."""
    line = window.page.locator(".bar + p")
    window.page.wait_for_function("words => document.querySelector('.bar + p')?.innerText.includes(words)", arg=words)
    return line.inner_text()


def test_train_stop_resume_and_delete(window, server):
    """A run is planned, started, watched, stopped, found again by a page that is loaded anew, resumed and deleted."""
    train_tiny(window, "mine", 100000, "--log_every 20 --sample_every 1")
    window.click("estimate")
    window.page.get_by_text("parameters").first.wait_for()
    window.click("train")
    assert "of 100,000" in progress(window, "training, step")
    window.page.locator("img.sharp:visible").first.wait_for()            # the newest grid
    window.page.locator(".curves svg:visible").first.wait_for()
    window.page.get_by_role("slider", name=re.compile("grid of samples")).wait_for()

    # The page is loaded anew: the run is there.
    window.page.reload()
    window.tab("Train")
    progress(window, "training, step")
    window.click("stop and save")
    progress(window, "stopped")
    assert "interrupted: saved" in window.page.locator(".cm-content:visible").last.inner_text()
    window.page.get_by_role("button", name="resume").and_(window.page.locator(":enabled")).wait_for()
    window.click("resume")
    progress(window, "training")
    window.click("stop and save")
    progress(window, "stopped")

    # Compare and delete.
    window.tab("Runs")
    panel = window.page.get_by_role("tabpanel").locator("visible=true")
    panel.get_by_label("mine", exact=True).check()
    panel.get_by_label("tiny", exact=True).check()
    window.click("curves")
    window.page.get_by_role("img", name="losses of").wait_for()
    window.click("report")
    window.page.frame_locator("iframe.report").get_by_role("heading", name="Samples", exact=True).wait_for()
    panel.get_by_label("tiny", exact=True).uncheck()
    window.click("delete ...")
    window.page.get_by_text("This cannot be undone").wait_for()
    assert (server.folder / "checkpoints" / "mine").exists()
    window.click("delete them for good")
    panel.get_by_label("mine", exact=True).wait_for(state="detached")
    assert not (server.folder / "checkpoints" / "mine").exists() and (server.folder / "checkpoints" / "tiny").exists()


@pytest.mark.slow
def test_uploaded_pictures_are_trained_on(window, server, image_folder):
    """Pictures that are dropped into the page become a training set."""
    train_tiny(window, "dropped", 3, "--img_size 8 --timesteps 20 --log_every 1")
    window.page.get_by_role("combobox", name="train on").click()
    window.page.get_by_role("option", name="my own pictures").click()
    upload(window, "train-pictures", *sorted(image_folder.glob("*/*")))
    window.page.wait_for_timeout(1500)
    window.page.get_by_label("how long").locator("visible=true").fill("3")
    window.page.get_by_role("combobox", name="in", exact=True).click()
    window.page.get_by_role("option", name="steps").click()
    window.page.get_by_label("name of the run").fill("dropped")
    window.click("train")
    progress(window, "finished")
    assert len(list((server.folder / "data" / "uploads" / "dropped_1").iterdir())) == 12


@pytest.mark.slow
def test_what_goes_wrong_in_a_run_is_told(window):
    """Wrong options, and a run that dies, are told in plain words."""
    train_tiny(window, "wrong", 5, "--nothing 1")
    window.click("train")
    assert "unknown option --nothing" in window.error()
    window.page.get_by_label("other options").fill("--data_dir /etc")
    window.click("train")
    assert "not taken here" in window.error()
    window.page.get_by_label("other options").fill("")
    window.page.get_by_label("name of the run").fill("../../outside")
    window.click("train")
    assert "experiment_name" in window.error()


@pytest.mark.slow
def test_a_run_tied_to_the_page_stops_with_it(browser, place, tmp_path):
    """Where that is chosen, a run saves and stops when the page ends; else it goes on, and is there next time."""
    for name, tied in (("loose", False), ("tied", True)):
        server = Server(tmp_path)
        window = Window(browser, server.address)
        train_tiny(window, name, 100000, "--log_every 5")
        if tied:
            window.page.get_by_label("training stops and saves").check()
        window.click("train")
        progress(window, "training, step")
        window.close()
        server.stop()
        places = runs.Places(tmp_path / "checkpoints", tmp_path / "samples")
        run = next(run for run in runs.read_runs(places) if run.name == name)
        try:
            assert (run.process is None) == tied
            assert bool(list((tmp_path / "checkpoints" / name).glob("*/model.pt"))) == tied
        finally:
            runs.stop_run(run)


# ---- Attacks -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_hostile_files_are_a_line(window, server, tmp_path):
    """Text, PostScript and a bomb that call themselves pictures are refused in a line, whatever their names."""
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_text("<script>alert(1)</script>")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    window.tab("Edit")
    window.tab("Like a picture")
    for file in sorted(tmp_path.iterdir()):
        upload(window, "vary-picture", file)
        assert "cannot be read as a picture" in window.error()
        window.page.locator("#vary-picture").get_by_role("button").last.click()             # away with it
    assert not window.page.locator("img[src=x]").count()


@pytest.mark.slow
def test_hostile_checkpoints_and_names_are_a_line(browser, tmp_path):
    """Files that are no checkpoints are passed over; a class or run called like HTML is text."""
    name = "<img src=x onerror=alert(1)>"
    cfg = diffuser.configure(dataset="folder", path_to_data="x", patch_size=1, head_dim=4, timesteps=20, img_size=8, **TINY)
    network = diffuser.build_unet(cfg, 1, 2)
    (tmp_path / "checkpoints").mkdir()
    diffuser.Model.from_network(network, cfg, (1, 8, 8), [name, "b"]).save(tmp_path / "checkpoints" / "hostile.pt")
    (tmp_path / "checkpoints" / "rubbish.pt").write_bytes(os.urandom(1000))
    (tmp_path / "checkpoints" / "empty.pt").write_bytes(b"")
    torch.save({"config": {"dataset": name}}, tmp_path / "checkpoints" / "partial.pt")
    (tmp_path / "samples" / f"samples_{name.replace('/', '')}").mkdir(parents=True)
    (tmp_path / "samples" / f"samples_{name.replace('/', '')}" / "config.json").write_text("{}")
    server = Server(tmp_path)
    window = Window(browser, server.address)
    try:
        window.page.get_by_label(name).check()
        window.click("draw")
        window.drawn(16)
        window.tab("Runs")
        window.page.get_by_text(name).locator("visible=true").first.wait_for()
        assert not window.page.locator("img[src=x]").count() and window.problems == []
    finally:
        window.close()
        assert "Traceback" not in server.stop()


def call(address, path, data=None, headers=None):
    """The status and content of a request."""
    request = urllib.request.Request(address + path, data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_files_of_the_machine_are_out_of_reach(server):
    """No file but those that the page itself has made can be asked for by its path, in any spelling."""
    secret = server.folder / "secret.txt"
    secret.write_text("hush hush")
    for path in (str(secret), "/etc/passwd", f"{server.folder}/checkpoints/../secret.txt", "server.log",
                 "%2Fetc%2Fpasswd", str(next(server.folder.glob("checkpoints/*/*/model.pt")))):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            status, content = call(server.address, route + path)
            assert status in (403, 404) and b"hush hush" not in content and b"root:" not in content, path


def test_values_that_no_control_can_have_are_a_line(server):
    """Called without the page, with keys and numbers of one's own, a callback answers with an error, not a file."""
    home = app.Home(runs.Places(server.folder / "checkpoints", server.folder / "samples"))
    key = next(key for key in home.checkpoints()[0] if "tiny" in key)
    for classes, count, seed, checkpoint in ((["3"], 10**9, 0, key), (["3"], 4, -1, key), (["nothing"], 4, 0, key),
                                             (["3"], 4, 0, "/etc/passwd"), (["3"], 4, 0, None)):
        with pytest.raises(UserError):
            list(app.draw(home, classes, count, seed, checkpoint, checkpoint, "dpmpp", 10, 0.0))
    with pytest.raises(UserError):
        list(app.draw(home, ["3"], 4, 0, key, key, "no sampler", 10, 0.0))
    with pytest.raises(UserError):
        list(app.draw(home, ["3"], 4, 0, key, key, "dpmpp", 10**9, 0.0))


def test_other_sites_cannot_use_the_page(server):
    """A page of another site that is open beside this one can neither read nor write here, by whatever name it calls."""
    port = server.address.rpartition(":")[2]
    elsewhere = {"Origin": "https://elsewhere.example"}
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
    assert call(server.address, "/config", headers=elsewhere)[0] == 403
    assert call(server.address, "/config", headers={"Origin": "http://["})[0] == 403
    assert call(server.address, "/config", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"})[0] == 403
    assert call(server.address, "/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})[0] == 200
    assert call(server.address, "/gradio_api/upload", upload, {**form, **elsewhere})[0] == 403
    assert call(server.address, "/gradio_api/upload", upload, form)[0] == 200
    assert call(server.address, "/config", headers={"Host": f"rebound.example:{port}"})[0] == 403
    assert call(server.address, "/config", headers={"Host": f"localhost:{port}"})[0] == 200


def test_nothing_is_fetched_for_whoever_asks(server):
    """The page is no way to the internet: addresses in place of files are refused, however they are written."""
    for path in ("file=https://example.com/", "file=http://127.0.0.1:9/", "file%3Dhttps%3A%2F%2Fexample.com",
                 "proxy=https://example.com/"):
        status, _ = call(server.address, f"/gradio_api/{path}")
        assert status in (403, 404), path


def test_an_address_in_place_of_an_upload_is_not_fetched(monkeypatch):
    """gradio would download it for whoever calls; what it calls for that refuses."""
    monkeypatch.setattr(app.gr.processing_utils, "async_ssrf_protected_download", None)
    app.refuse_downloads()
    field = app.gr.File()

    def fetch():                                                 # a browser's loop runs in this thread
        asyncio.run(field.async_move_resource_to_block_cache("https://example.com/picture.png"))

    with ThreadPoolExecutor(1) as thread, pytest.raises(app.gr.Error, match="nothing is fetched"):
        thread.submit(fetch).result()


@pytest.mark.parametrize("name, length, unit, words", [
    ("", 3, "epochs", "give the run a name"), ("a/b", 3, "epochs", "without slashes"), ("a\\b", 3, "epochs", "without slashes"),
    ("a", 0, "epochs", "more than 0"), ("a", -1, "minutes", "more than 0"), ("a", 2.7, "epochs", "a whole number")])
def test_a_form_that_makes_no_run_is_told(tmp_path, monkeypatch, name, length, unit, words):
    """A name whose run the page could not find again, and a length that would be taken for another."""
    monkeypatch.setattr(runs, "launch", lambda *arguments: pytest.fail("it was started"))
    places = runs.Places(tmp_path / "checkpoints", tmp_path / "samples")
    with pytest.raises(UserError, match=words):
        app.start_from_form(places, "digits", None, "preset", length, unit, name, "")


def test_a_full_disk_takes_only_the_download_away(monkeypatch):
    """What is drawn stays on the page and can be gone on from."""
    told = []
    monkeypatch.setattr(app, "pack", lambda drawing: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(app.gr, "Warning", told.append)
    pictures = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    drawing = app.Drawing("key", pictures, [0, 1], ["0", "1"], ["0.png", "1.png"], {}, ["python"], {})
    shown = app.show_drawing(types.SimpleNamespace(space=False), drawing)
    assert shown[1] is drawing and shown[-1]["visible"] is False and "No space left" in told[0]


def test_tied_runs_are_looked_for_until_no_page_is_open(tmp_path, monkeypatch):
    """A page may be gone without a word: as long as one seems open, it is looked once more."""
    later = []
    pages = app.Pages(runs.Places(tmp_path / "checkpoints", tmp_path / "samples"))
    monkeypatch.setattr(pages, "look_later", lambda: later.append(1))
    pages.sign(types.SimpleNamespace(session_hash="page"))
    assert pages.stop_tied() == [] and not later
    pages.tie("run")
    assert pages.stop_tied() == [] and later == [1] and pages.tied == {"run"}
    pages.seen.clear()
    pages.stop_tied()
    assert not pages.tied and later == [1]


def test_help_among_the_options_ends_nothing(server):
    """--help, which ends a command line, is a line here."""
    for text in ("--help", "-h all"):
        with pytest.raises(UserError, match="help is for the command line"):
            runs.parse_further(text)


@pytest.mark.parametrize("flags, message", [
    (["--host", "0.0.0.0"], "give a password"), (["--host", "::"], "give a password"),
    (["--share"], "give a password"), (["--port", "99999999"], "port lies between"), (["--port", "x"], "port")])
def test_a_page_for_everybody_is_refused(flags, message):
    """A page that others could reach needs a password; what cannot be a port is told."""
    with pytest.raises(UserError, match=message):
        app.check(app.build_parser().parse_args(flags))


@pytest.mark.slow
def test_a_password_is_asked_for(tmp_path):
    """With --password nothing is shown without it, and everything with it; a wrong one is refused."""
    server = Server(tmp_path, "--password", "open sesame")
    try:
        assert call(server.address, "/config")[0] == 401
        for password, status in (("wrong", 400), ("open sesame", 200)):
            data = f"username=me&password={password.replace(' ', '+')}".encode()
            assert call(server.address, "/login", data)[0] == status
    finally:
        server.stop()


def test_a_host_without_password_answers_to_its_own_names_alone(tmp_path):
    """--host localhost needs no password, so another name for this machine, as a hostile site may have it, is refused."""
    server = Server(tmp_path, "--host", "localhost")
    try:
        request = urllib.request.Request(server.address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)
    finally:
        server.stop()


def test_a_run_of_unknown_length_shows_no_full_bar():
    """Only a finished run does."""
    run = types.SimpleNamespace(status="training", rows=[{"loss": "0.1"}], step=500, total=0, process=1, seconds_left=0)
    assert 'aria-valuenow="0.0"' in app.describe_progress(run)
    run.status = "finished"
    assert 'aria-valuenow="100.0"' in app.describe_progress(run)


@pytest.mark.parametrize("painted", [[0], [255], []])
def test_a_mask_needs_something_painted_and_something_left(painted):
    """Nothing, everything, or no layer at all: told in the words of the page."""
    layers = [Image.new("RGBA", (16, 16), (0, 0, 0, alpha)) for alpha in painted]
    with pytest.raises(UserError, match="paint over the part"):
        app.painted_mask(dict(layers=layers), (1, 8, 8))


def test_it_listens_on_this_machine_alone(server):
    """Without --host the page cannot be reached by the machine's other addresses."""
    port = int(server.address.rpartition(":")[2])
    listening = [line.split() for line in open("/proc/net/tcp").read().splitlines()[1:]]
    places = [words[1].split(":")[0] for words in listening if int(words[1].split(":")[1], 16) == port
              and words[3] == "0A"]
    assert places == ["0100007F"]


# ---- For everyone ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_phone(browser, server, scheme):
    """On 390 pixels nothing sticks out, in either scheme, and words can be read on what they stand on."""
    window = Window(browser, server.address, viewport=dict(width=390, height=844), color_scheme=scheme)
    try:
        window.click("draw")
        window.drawn(16)
        for tab in ("Draw", "Edit", "Train", "Runs"):
            window.tab(tab)
            window.page.wait_for_timeout(500)
            assert window.page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        colours = window.page.evaluate(
            "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
        text, ground = (sum(int(n) for n in re.findall(r"\d+", colour)[:3]) for colour in colours)
        assert (text > ground) == (scheme == "dark") and abs(text - ground) > 300
    finally:
        window.close()


def test_every_control_has_a_name(window):
    """Each field, slider and button has a name that a screen reader can say."""
    nameless = """[...document.querySelectorAll('input, textarea, select, button')].filter(element => element.offsetParent
        && element.type != 'file' && !(element.getAttribute('aria-label') || element.getAttribute('aria-labelledby')
        || element.title || element.innerText.trim() || element.labels?.length)).map(element => element.outerHTML)"""
    for tab in ("Draw", "Edit", "Train", "Runs"):
        window.tab(tab)
        window.page.wait_for_timeout(500)
        assert window.page.evaluate(nameless) == [], tab


@pytest.mark.slow
def test_the_keyboard_is_enough_to_draw(window):
    """By Tab, Space and Enter alone: a class is chosen, pictures are drawn, one of them is chosen."""
    box = window.page.get_by_label("5", exact=True)
    box.focus()
    window.page.keyboard.press("Space")
    assert box.is_checked()
    window.page.get_by_role("button", name="draw", exact=True).focus()
    window.page.keyboard.press("Enter")
    window.drawn(16)
    window.page.locator(".pictures:visible button").nth(2).focus()
    window.page.keyboard.press("Enter")
    assert window.page.locator(".pictures:visible button").nth(2).get_attribute("aria-pressed") == "true"


def test_without_a_checkpoint_digits_are_offered(browser, tmp_path):
    """Where there is nothing to draw with the page says so, and one click leads to training digits."""
    server = Server(tmp_path)
    window = Window(browser, server.address)
    try:
        window.page.get_by_text("There is no checkpoint yet").wait_for()
        window.click("train digits")
        window.page.get_by_role("button", name="train", exact=True).wait_for()
        assert window.page.get_by_label("name of the run").input_value() == "digits1"
    finally:
        window.close()
        server.stop()


# ---- Spaces ------------------------------------------------------------------------------------

# For a child process: of the packages that are installed, leave those that the requirements bring with them.
CLEAN = """
import importlib.metadata as metadata, re, runpy, sys

def known(name):
    return re.sub('[-_.]+', '-', name).lower()

wanted = [known(re.match(r'[\\w.-]+', line)[0]) for line in open('requirements.txt') if line[0] not in '#\\n']
there = set()
while wanted:
    name = wanted.pop()
    if name in there:
        continue
    there.add(name)
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    wanted += [known(re.match(r'[\\w.-]+', need)[0]) for need in needs if 'extra ==' not in need]

foreign = {module for module, packages in metadata.packages_distributions().items()
           if not there & {known(package) for package in packages}}

sys.modules.update(dict.fromkeys(foreign))                        # None: as if it were not there
sys.path.insert(0, '')
sys.argv = ['app.py']
runpy.run_path('app.py', run_name='__main__')
"""


@pytest.mark.slow
def test_a_space_draws_from_its_folder_alone(browser, place, tmp_path):
    """The folder of to-space draws the same pictures by what is in it and by what its requirements bring, no more."""
    import convert

    checkpoint = next(place.glob("checkpoints/*/*/model.pt"))
    convert.to_space(str(checkpoint), str(tmp_path / "space"))
    script = tmp_path / "clean.py"
    script.write_text(CLEAN)
    server = Server(tmp_path / "space", script=script, env={"PYTHONPATH": "", "PYTHONSAFEPATH": "1"})
    window = Window(browser, server.address)
    try:
        tabs = window.page.get_by_role("tab").all_inner_texts()
        assert "Draw" in tabs and "Edit" in tabs and "Train" not in tabs and "Runs" not in tabs
        window.click("draw")
        window.drawn(16)
        expected = diffuser.load(checkpoint).generate(list(range(10)), 16)
        assert all(np.array_equal(a, b[0]) for a, b in zip(window.pixels(), expected))
        assert window.problems == []
    finally:
        window.close()
        assert "Traceback" not in server.stop()
    front = (tmp_path / "space" / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in front and f"sdk_version: {gradio.__version__}" in front and "app_file: app.py" in front


def test_html_of_names_is_escaped():
    """A name with quotes and brackets in it stays text, in and between tags."""
    name = "\"><script>alert(1)</script>"
    shown = app.show_pictures(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), [name])
    assert "<script" not in shown and html.escape(name, quote=True) in shown
    assert "<script" not in app.note(name)
