"""convert.py: against diffusers and safetensors themselves. Nothing here may reach for the network."""

import base64
import dataclasses
import inspect
import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest
import torch
from conftest import TINY, cli, interrupted, tiny_training, tiny_unet, trained_before
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from safetensors import safe_open
from safetensors.torch import save_file

import convert
import diffuser
from diffuser import configure, load, load_checkpoint
from diffuser_lib.files import UserError

PLAIN = dict(sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
# What the three public models of google/ have in common, from their config.json.
GOOGLE = dict(act_fn="silu", attention_head_dim=None, center_input_sample=False, downsample_padding=0,
              flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1,
              norm_eps=1e-6, norm_num_groups=32, out_channels=3, time_embedding_type="positional")
DOWN, UP, ATTEND_DOWN, ATTEND_UP = "DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"
CIFAR10 = dict(GOOGLE, sample_size=32, block_out_channels=(128, 256, 256, 256), down_block_types=(DOWN, ATTEND_DOWN, DOWN, DOWN),
               up_block_types=(UP, UP, ATTEND_UP, UP))
FACES = dict(GOOGLE, sample_size=32, block_out_channels=(32, 32, 64, 64, 128, 128),              # a quarter as wide, and 32x32
             down_block_types=(DOWN, DOWN, DOWN, DOWN, ATTEND_DOWN, DOWN), up_block_types=(UP, ATTEND_UP, UP, UP, UP, UP))
FOREIGN = {
    "plain": PLAIN,
    "cifar10": CIFAR10,
    "celebahq and church": FACES,
    "scale_shift, no norm in the middle": dict(PLAIN, resnet_time_scale_shift="scale_shift"),
    "scale_shift": dict(PLAIN, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8, num_class_embeds=4),
    "other widths": dict(PLAIN, block_out_channels=(16, 24, 40), sample_size=(16, 24), time_embedding_dim=20,
                         down_block_types=(ATTEND_DOWN, DOWN, DOWN), up_block_types=(UP, ATTEND_UP, UP)),
    "no attention": dict(PLAIN, down_block_types=(DOWN,) * 2, up_block_types=(UP,) * 2, add_attention=False, in_channels=1,
                         out_channels=1),
    "none in the middle": dict(PLAIN, add_attention=False, block_out_channels=(15, 30), norm_num_groups=5, attention_head_dim=15,
                               freq_shift=0.5),
    "classes": dict(PLAIN, num_class_embeds=3, dropout=0.1, act_fn="swish"),
    "fractions that floats cannot tell": dict(PLAIN, block_out_channels=(88, 120), attention_head_dim=8),
    "narrowing": dict(PLAIN, block_out_channels=(64, 16)),
    "one level": dict(PLAIN, block_out_channels=(16,), down_block_types=(DOWN,), up_block_types=(ATTEND_UP,)),
}
OURS = {
    "scale_shift": dict(dataset="digits", **TINY),
    "add": dict(dataset="digits", conditioning="add", use_labels=False, **TINY),
    "heads": dict(dataset="cifar10", base_channels=16, channel_mults=(1, 2, 2), attention_levels=(1,), num_heads=4, emb_dim=8),
    "no attention": dict(dataset="digits", use_attention=False, **TINY),
    "a rectangle": dict(dataset="mnist", img_size=(16, 24), head_dim=4, attention_levels=(0, 1), up_attention_levels=(0,), **TINY),
    "ho2020's choices": dict(dataset="digits", sin_first=True, freq_shift=1.0, norm_eps=1e-6, downsample_padding=0, **TINY),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection would be a failure."""
    def refuse(*arguments):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def foreign(options):
    """A UNet2DModel whose every parameter counts."""
    torch.manual_seed(0)
    network = UNet2DModel(**options).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return network


def inputs(channels, size, classes):
    """Noisy images, timesteps and labels."""
    random = torch.Generator().manual_seed(1)
    size = (size, size) if isinstance(size, int) else size
    t, y = torch.tensor([0, 7, 950]), torch.randint(classes, (3,), generator=random) if classes else None
    return torch.randn(3, channels, *size, generator=random), t, y


@torch.no_grad()
def difference(ours, theirs, channels, size, classes):
    x, t, y = inputs(channels, size, classes)
    out = theirs(x, t, class_labels=y).sample
    return (ours(x, t, y) - out).abs().max() / out.abs().max().clamp(min=1)


def checkpoint(path, classes=3, **options):
    """A checkpoint of a network with weights that count, and of images that are not standard normal."""
    cfg = configure(**{**dict(device="cpu", sample_every=1), **options})
    shape = diffuser.image_shape(cfg)
    network = tiny_unet(shape[0], classes, **{name: getattr(cfg, name) for name in diffuser.FIELDS
                                              if name in inspect.signature(diffuser.UNet).parameters})
    moments = diffuser.standard_moments(shape, classes)
    moments.mean.add_(0.3)
    moments.var.mul_(0.5)
    diffuser.write_checkpoint(path, network, cfg, shape, [f"class {i}" for i in range(classes)], moments)
    return path


# The network for CIFAR-10 in its full width takes seconds.
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "cifar10" else name for name in FOREIGN])
def test_foreign_networks_compute_the_same_here(name, folder):
    """A saved UNet2DModel, the public configs among them, read from its folder: outputs to 1e-5."""
    theirs = foreign(FOREIGN[name])
    theirs.save_pretrained("there")
    classes = FOREIGN[name].get("num_class_embeds") or 0
    said = convert.from_diffusers("there", "here.pt")
    assert "defaults" in said and ("null class" in said) == (classes > 0)
    model = load("here.pt", device="cpu", precision="fp32")
    assert model.shape[0] == theirs.config.in_channels and len(model.class_names) == classes
    assert difference(model.network, theirs, model.shape[0], FOREIGN[name]["sample_size"], classes) < 1e-5


@pytest.mark.parametrize("name", OURS)
def test_networks_from_here_compute_the_same_there(name, folder):
    """A checkpoint written for diffusers and opened by it: outputs to 1e-5, labels and the null class too; and back."""
    options = OURS[name]
    classes = 0 if options.get("use_labels") is False else 3
    checkpoint(folder / "here.pt", classes, **options)
    ours = load("here.pt", device="cpu", precision="fp32")
    convert.to_diffusers("here.pt", "there")
    theirs = DDPMPipeline.from_pretrained("there").unet.eval()
    size = ours.shape[1:]
    assert difference(ours.network, theirs, ours.shape[0], size, classes and classes + 1) < 1e-5
    convert.from_diffusers("there", "back.pt")
    back = load_checkpoint("back.pt")
    before = load_checkpoint("here.pt")
    assert all(torch.equal(v, back["model"][k]) for k, v in before["model"].items())
    assert all(torch.equal(v, back["moments"][k]) for k, v in before["moments"].items())
    assert back["class_names"] == before["class_names"]
    again = load("back.pt", device="cpu", precision="fp32")
    assert difference(again.network, theirs, ours.shape[0], size, classes and classes + 1) < 1e-5


def test_every_preset_and_recipe_can_be_exported_or_says_why():
    """Diffusers can hold the networks of all presets and recipes but those of a folder and of MNIST's `best`, which take
    pixels as patches."""
    for dataset in diffuser.PRESETS:
        patch_size = dict(patch_size=1) if dataset == "folder" else {}
        convert.unet2d_options(configure(dataset=dataset, path_to_data="x", **patch_size), (3, 32, 32), 10)
    for recipe in ("ho2020", "celebahq128"):
        convert.unet2d_options(configure(dataset="celeba", recipe=recipe), (3, 128, 128), 0)
    with pytest.raises(UserError, match=r"patch_size 2.*squares of pixels"):
        convert.unet2d_options(configure(dataset="mnist", recipe="best"), (1, 28, 28), 10)


@pytest.mark.parametrize("options, words", [
    (dict(conditioning="concat"), "conditioning concat.*input channels"), (dict(patch_size=2), "patch_size 2"),
    (dict(channel_mults=(2, 2)), "first has to be 1"), (dict(attention_levels=(0,)), "num_heads 2 at levels of 8 and 16"),
    (dict(mid_attention="plain", conditioning="add"), "mid_attention plain")])
def test_what_diffusers_cannot_represent_is_refused_with_the_reason(options, words, folder):
    """One line that says which option and why; no half of a folder is left."""
    checkpoint(folder / "here.pt", **{**dict(dataset="digits"), **TINY, **options})
    with pytest.raises(UserError, match=words):
        convert.to_diffusers("here.pt", "there")
    assert sorted(p.name for p in folder.iterdir()) == ["here.pt"]


@pytest.mark.parametrize("options, words", [
    (dict(act_fn="relu"), "act_fn is 'relu'"), (dict(time_embedding_type="fourier"), "time_embedding_type"),
    (dict(out_channels=6), "6 channels for 3"), (dict(in_channels=4, out_channels=4), "in_channels is 4"),
    (dict(down_block_types=("DownBlock2D", "AttnSkipDownBlock2D")), "AttnSkipDownBlock2D"), (dict(sample_size=None), "img_size"),
    (dict(class_embed_type="timestep"), "class_embed_type"), (dict(center_input_sample=True), "center_input_sample"),
    (dict(downsample_type="resnet"), "downsample_type"), (dict(mid_block_scale_factor=1.4), "mid_block_scale_factor"),
    (dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4), "attn_norm_num_groups"),
    (dict(sample_size=15), "image size 15x15")])
def test_foreign_networks_without_a_counterpart_are_refused_with_the_reason(options, words, folder):
    """Each refusal names the entry of their config; nothing is written."""
    UNet2DModel(**{**PLAIN, **options}).save_pretrained("there")
    with pytest.raises(UserError, match=words):
        convert.from_diffusers("there", "here.pt")
    assert not (folder / "here.pt").exists()


def test_an_img_size_is_looked_at_before_the_weights_are_read(folder):
    """A mistake costs no minute of reading: a folder that cannot even be read gets the same line."""
    with pytest.raises(UserError, match="img_size wants"):
        convert.from_diffusers("nowhere", "here.pt", img_size="large")


def test_the_layout_and_names_of_the_oldest_models(folder):
    """google's files: no subfolders, a pickle of weights, attention with the names of 2022."""
    theirs = foreign(dict(FACES, block_out_channels=(32, 32, 32, 32, 64, 64), sample_size=64))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    torch.save({renamed(k): v for k, v in theirs.state_dict().items()}, "diffusion_pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(dict(theirs.config, _class_name="UNet2DModel", _diffusers_version="0.0.4")))
    (folder / "scheduler_config.json").write_text(json.dumps(dict(
        _class_name="DDPMScheduler", _diffusers_version="0.1.1", beta_end=0.02, beta_schedule="linear", beta_start=0.0001,
        clip_sample=True, num_train_timesteps=1000, trained_betas=None, variance_type="fixed_small")))
    convert.from_diffusers(".", "here.pt")
    model = load("here.pt", device="cpu", precision="fp32")
    assert difference(model.network, theirs, 3, 64, 0) < 1e-5
    assert (model.config.timesteps, model.config.schedule_type, model.config.variance) == (1000, "linear", "small")


SCHEDULES = {
    "linear": dict(beta_start=1e-5, beta_end=0.01), "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"), "geodiff": dict(beta_schedule="sigmoid"),
    "by beta": dict(trained_betas=torch.linspace(1e-3, 0.05, 1000).tolist(), prediction_type="sample"),
    "no signal left": dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "large, unclipped": dict(variance_type="fixed_large", clip_sample=False),
    "thresholding": dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_foreign_schedules_are_recognised_and_written_as_they_were(name, folder):
    """alpha_bar to 1e-5, prediction, variance, clipping; through here and back to diffusers."""
    theirs = DDPMScheduler(**SCHEDULES[name])
    DDPMPipeline(foreign(PLAIN), theirs).save_pretrained("there")
    convert.from_diffusers("there", "here.pt")
    cfg = configure(load_checkpoint("here.pt")["config"])
    assert (diffuser.alpha_bar_table(cfg) - theirs.alphas_cumprod).abs().max() < 1e-5
    convert.to_diffusers("here.pt", "back")
    back = DDPMPipeline.from_pretrained("back").scheduler
    assert (back.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 1e-5
    for option in ("prediction_type", "variance_type", "thresholding", "dynamic_thresholding_ratio", "rescale_betas_zero_snr"):
        assert back.config[option] == theirs.config[option]
    assert back.config.clip_sample == theirs.config.clip_sample or theirs.config.thresholding


@pytest.mark.parametrize("options", [dict(schedule_type="dns"), dict(schedule_type="sigmoid"), dict(schedule_type="cosine", cosine_s=0.02),
                                     dict(timesteps=250, scale_betas=True), dict(schedule_type="dns", zero_terminal_snr=True, prediction="v")])
def test_our_own_schedules_survive_the_way_there_and_back(options):
    """Schedules without a name in diffusers are written beta by beta, and recognised where the configuration is known."""
    cfg = configure(dataset="digits", **{**dict(prediction="eps", schedule_type="linear"), **options})
    scheduler = convert.to_scheduler(cfg)
    assert (diffuser.alpha_bar_table(cfg) - scheduler.alphas_cumprod.double()).abs().max() < 1e-5
    found = convert.schedule_options(scheduler, [], cfg)
    assert {k: v for k, v in found.items() if getattr(cfg, k) != v} == {}


def test_schedules_without_a_counterpart_are_refused(folder):
    """A schedule of no formula here, and schedulers that have no betas."""
    DDPMPipeline(foreign(PLAIN), DDPMScheduler(beta_schedule="laplace", prediction_type="v_prediction")).save_pretrained("there")
    with pytest.raises(UserError, match=r"laplace.*none of linear, cosine"):
        convert.from_diffusers("there", "here.pt")
    DDPMPipeline(foreign(PLAIN), DDPMScheduler(variance_type="learned")).save_pretrained("there")
    with pytest.raises(UserError, match="learned"):
        convert.from_diffusers("there", "here.pt")
    (folder / "there/scheduler/scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    with pytest.raises(UserError, match="LCMScheduler, which has no betas"):
        convert.from_diffusers("there", "here.pt")
    for bent in (dict(shift=3.0), dict(use_dynamic_shifting=True)):
        DDPMPipeline(foreign(PLAIN), FlowMatchEulerDiscreteScheduler(**bent)).save_pretrained("there")
        with pytest.raises(UserError, match=rf"{next(iter(bent))} = .*evenly spaced"):
            convert.from_diffusers("there", "here.pt")


@pytest.mark.parametrize("options, words", [(dict(prediction="edm", schedule_type="edm"), "prediction edm: its networks see"),
                                            (dict(prediction="flow", schedule_type="cosine"), "only with schedule_type flow")])
def test_predictions_without_a_counterpart_are_refused(options, words):
    """What no scheduler of diffusers represents, with the reason."""
    with pytest.raises(UserError, match=words):
        convert.to_scheduler(configure(dataset="digits", **options))


def walk(scheduler, network, x, steps, labels=None, **options):
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t, class_labels=labels).sample, t, x, **options).prev_sample
    return x


def drawn(path, labels, **settings):
    """What this program draws, and the noise that it starts from."""
    model = load(path, device="cpu", precision="fp32", start="gaussian", guidance_scale=0.0, **settings)
    *_, (_, x, _) = model.sample(labels, model.config)
    return x, diffuser.image_noise(model.config.seed, range(len(labels)), model.shape, "cpu")()


@pytest.mark.parametrize("prediction, schedule", [("eps", "linear"), ("v", "cosine"), ("x0", "dns")])
def test_trajectories_of_exported_models_agree(prediction, schedule, folder):
    """DDIM and DPM-Solver++ from the exported scheduler's config, with labels: the last image to 1e-3."""
    checkpoint(folder / "here.pt", dataset="digits", prediction=prediction, schedule_type=schedule, **TINY)
    convert.to_diffusers("here.pt", "there")
    pipeline, labels = DDPMPipeline.from_pretrained("there"), [0, 1, 2, 3]
    ours, xT = drawn("here.pt", labels, sampler="ddim", steps=20)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert (walk(scheduler, pipeline.unet, xT, 20, torch.tensor(labels), use_clipped_model_output=True) - ours).abs().max() < 1e-3
    ours, xT = drawn("here.pt", labels, sampler="dpmpp", steps=20, clip_x0=False)
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert (walk(scheduler, pipeline.unet, xT, 20, torch.tensor(labels)) - ours).abs().max() < 1e-3 * ours.abs().max()


def test_trajectories_of_imported_models_agree(folder):
    """A pipeline from elsewhere, by its own DDIM steps (leading, the default there, and trailing): to 1e-3."""
    theirs = foreign(PLAIN)
    DDIMPipeline(theirs, DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)).save_pretrained("there")
    convert.from_diffusers("there", "here.pt")
    for spacing in ("leading", "trailing"):    # theirs takes 1000 // n for every step, so n has to divide 1000
        ours, xT = drawn("here.pt", [0, 0], sampler="ddim", steps=25, spacing=spacing)
        scheduler = DDIMScheduler.from_pretrained("there", subfolder="scheduler", timestep_spacing=spacing)
        reference = walk(scheduler, theirs, xT, 25)
        assert (reference - ours).abs().max() < 1e-3 * reference.abs().max()


def test_weights_are_converted_on_the_cpu(folder, monkeypatch):
    """Whatever computes here otherwise: what is made beside them is there, too."""
    checkpoint(folder / "here.pt", **dict(dataset="digits"), **TINY)
    asked = []
    pick = diffuser.pick_device
    monkeypatch.setattr(diffuser, "pick_device", lambda name, *more: asked.append(name) or pick(name, *more))
    convert.to_diffusers("here.pt", "there")
    assert asked and set(asked) == {"cpu"}


@pytest.mark.parametrize("network", [dict(), dict(sin_first=True, freq_shift=1.0), dict(base_channels=9, norm_groups=3)])
def test_flow_matching_there_and_back(network, folder):
    """An exported flow draws the same by diffusers' own Euler steps, and comes back with the same weights."""
    options = {**dict(dataset="digits", prediction="flow", schedule_type="flow"), **TINY, **network}
    checkpoint(folder / "here.pt", **options)
    convert.to_diffusers("here.pt", "there")
    pipeline, labels = DDPMPipeline.from_pretrained("there"), [0, 1, 2, 3]
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    ours, xT = drawn("here.pt", labels, sampler="ddim", steps=10, spacing="linear", clip_x0=False)
    theirs = walk(pipeline.scheduler, pipeline.unet, xT, 10, torch.tensor(labels))
    assert (theirs - ours).abs().max() < 1e-3 * ours.abs().max()

    convert.from_diffusers("there", "back.pt")
    before, after = load_checkpoint("here.pt"), load_checkpoint("back.pt")
    for name, weight in diffuser.averaged_weights(before).items():
        assert (after["model"][name] - weight).abs().max() < 1e-6, name
    assert (after["config"]["prediction"], after["config"]["schedule_type"]) == ("flow", "flow")


def test_a_flow_from_elsewhere_draws_as_there(folder):
    """A UNet2DModel with a flow matching scheduler, by its own steps: to 1e-3."""
    theirs = foreign(PLAIN)
    DDPMPipeline(theirs, FlowMatchEulerDiscreteScheduler(1000)).save_pretrained("there")
    convert.from_diffusers("there", "here.pt")
    ours, xT = drawn("here.pt", [0, 0], sampler="ddim", steps=10, spacing="linear")
    reference = walk(FlowMatchEulerDiscreteScheduler.from_pretrained("there", subfolder="scheduler"), theirs, xT, 10)
    assert (reference - ours).abs().max() < 1e-3 * reference.abs().max()


def test_ema_weights_are_written_unless_raw_ones_are_asked_for(folder):
    """By default what is drawn with here is what diffusers gets; --raw gives the weights being trained."""
    path = trained_before()
    state = load_checkpoint(path)
    for raw, part in ((False, "ema"), (True, "model")):
        convert.to_diffusers(str(path), f"there{raw}", raw)
        convert.to_safetensors(str(path), f"{raw}.safetensors", raw)
        weight = DDPMPipeline.from_pretrained(f"there{raw}").unet.conv_in.weight
        assert torch.equal(weight, state[part]["conv_in.weight"])
        with safe_open(f"{raw}.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("conv_in.weight"), state[part]["conv_in.weight"])
    assert not torch.equal(state["ema"]["conv_in.weight"], state["model"]["conv_in.weight"])


def test_one_class_can_be_left_in_a_network_without_labels(folder):
    """--label: the stock pipeline, which knows no labels, then draws that class: the network's output for it, to 1e-5."""
    checkpoint(folder / "here.pt", dataset="digits", **TINY)
    convert.to_diffusers("here.pt", "there", label="class 1")
    pipeline = DDPMPipeline.from_pretrained("there")
    assert pipeline.unet.config.num_class_embeds is None
    x, t, _ = inputs(1, 8, 0)
    with torch.no_grad():
        ours = load("here.pt", device="cpu", precision="fp32").network(x, t, torch.tensor([1, 1, 1]))
        assert (pipeline.unet(x, t).sample - ours).abs().max() < 1e-5
    assert "draws the class class 1 alone" in (folder / "there/README.md").read_text()
    assert len(pipeline(batch_size=2, num_inference_steps=3).images) == 2


def test_class_names_tell_whether_the_last_embedding_is_no_label(folder):
    """A foreign model of four embeddings: three names make the last one the null class, four add a null class."""
    theirs = foreign(dict(PLAIN, num_class_embeds=4))
    theirs.save_pretrained("there")
    said = convert.from_diffusers("there", "three.pt", "cat,dog,bird")
    three = load("three.pt", device="cpu", precision="fp32")
    assert three.class_names == ["cat", "dog", "bird"] and "null" not in said
    assert torch.equal(three.network.class_embedding.weight, theirs.class_embedding.weight)
    convert.from_diffusers("there", "four.pt", "a,b,c,d")
    four = load("four.pt", device="cpu").network.class_embedding.weight
    assert torch.allclose(four[4], theirs.class_embedding.weight.mean(0), atol=1e-6)
    for given, words in (("a,b", "2 for 4 class embeddings"), ("a,b,a,c", "a name of its own"), ("a,,b,c", "a name of its own")):
        with pytest.raises(UserError, match=words):
            convert.from_diffusers("there", "five.pt", given)
    foreign(PLAIN).save_pretrained("plain")
    with pytest.raises(UserError, match="3 for 0 class embeddings"):
        convert.from_diffusers("plain", "five.pt", "a,b,c")


def test_weights_that_do_not_fit_their_config_are_refused(folder):
    """A file that lacks some, or has others, would leave random ones: nothing is written."""
    theirs = foreign(PLAIN)
    theirs.save_pretrained("there")
    path = folder / "there" / "diffusion_pytorch_model.safetensors"
    weights = theirs.state_dict()
    for change in ({"conv_in.weight": None}, {"strange": torch.zeros(1)}):
        save_file({k: v for k, v in {**weights, **change}.items() if v is not None}, path, {"format": "pt"})
        with pytest.raises(UserError, match=f"not those of its config.json.*{next(iter(change))}"):
            convert.from_diffusers("there", "here.pt")
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="not all finite"):
        convert.from_diffusers("there", "here.pt")
    path.write_bytes(path.read_bytes()[:100])
    assert convert.main(["from-diffusers", "there", "here.pt"]) == 2
    (folder / "there" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no configuration"):
        convert.from_diffusers("there", "here.pt")
    assert not (folder / "here.pt").exists()


def test_half_precision_variants_are_read(folder):
    """A folder that holds diffusion_pytorch_model.fp16.safetensors alone."""
    foreign(PLAIN).half().save_pretrained("there", variant="fp16")
    convert.from_diffusers("there", "here.pt")
    assert load_checkpoint("here.pt")["model"]["conv_in.weight"].dtype == torch.float32


@pytest.mark.parametrize("scheduler, clips", [
    (DPMSolverMultistepScheduler(), False), (DPMSolverMultistepScheduler.from_config(DDIMScheduler().config), False),
    (PNDMScheduler(), False), (EulerDiscreteScheduler(), False), (DDIMScheduler(), True)])
def test_pipelines_with_other_schedulers_are_read(scheduler, clips, folder):
    """The schedule is theirs, and clipping is on where they clip."""
    DDPMPipeline(foreign(PLAIN), scheduler).save_pretrained("there")
    convert.from_diffusers("there", "here.pt")
    cfg = configure(load_checkpoint("here.pt")["config"])
    assert cfg.clip_x0 == clips and (diffuser.alpha_bar_table(cfg) - scheduler.alphas_cumprod).abs().max() < 1e-5


def test_a_scheduler_changed_since_the_export_counts(folder):
    """The folder's own schedule beats what diffuser.json beside it remembers; so do names for another number of classes."""
    checkpoint(folder / "here.pt", dataset="digits", schedule_type="cosine", cosine_s=0.02, **TINY)
    convert.to_diffusers("here.pt", "there")
    assert configure(load_checkpoint("here.pt")["config"]).cosine_s == 0.02
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler.save_pretrained("there/scheduler")
    convert.from_diffusers("there", "back.pt", "a,b,c,d")
    state = load_checkpoint("back.pt")
    cfg = configure(state["config"])
    assert (diffuser.alpha_bar_table(cfg) - scheduler.alphas_cumprod).abs().max() < 1e-5 and state["class_names"] == list("abcd")
    assert (cfg.num_heads, cfg.head_dim) == (2, 0)                          # said as it was


def test_thresholds_with_an_end_are_told(folder):
    """What cannot be taken over exactly is one line."""
    DDPMPipeline(foreign(PLAIN), DDPMScheduler(thresholding=True, sample_max_value=2.0, clip_sample_range=3.0)).save_pretrained("there")
    said = convert.from_diffusers("there", "here.pt")
    assert "thresholds end at 2" in said and "+-3" in said


@pytest.mark.parametrize("options", [dict(dataset="digits", use_labels=False), dict(dataset="digits"),
                                     dict(dataset="mnist", img_size=(16, 16)),
                                     dict(dataset="mnist", img_size=(16, 16), use_labels=False),
                                     dict(dataset="digits", prediction="flow", schedule_type="flow"),
                                     dict(dataset="digits", prediction="flow", schedule_type="flow", use_labels=False)])
def test_the_model_card_tells_how_to_use_it_and_it_works(options, folder, monkeypatch):
    """The Python on the card draws pictures, with labels and where the schedule leaves signal at T; a grid is beside it."""
    classes = 0 if options.get("use_labels") is False else 3
    checkpoint(folder / "here.pt", classes, **options, **TINY)
    convert.to_diffusers("here.pt", "there")
    card = (folder / "there/README.md").read_text()
    assert options["dataset"] in card and "| base_channels | 8 |" in card and (folder / "there/samples.png").stat().st_size > 500
    assert ("class_labels" in card) == (classes > 0) and ("moments" in card) == (options["dataset"] == "mnist")
    code, found = card.split("```python\n")[1].split("```")[0], {}
    exec(code.replace("path/to/this/folder", "there"), found)
    side = 8 if options["dataset"] == "digits" else 16
    assert {image.size for image in found["images"]} == {(side, side)} and len(found["images"]) == (classes or 4)


def test_safetensors_there_and_back(folder):
    """Weights, moments, configuration and class names survive, and anybody's reader sees them."""
    checkpoint(folder / "here.pt", dataset="digits", **TINY)
    convert.to_safetensors("here.pt", "w.safetensors")
    with safe_open("w.safetensors", "pt") as file:
        about = json.loads(file.metadata()["diffuser"])
    assert about["class_names"] == ["class 0", "class 1", "class 2"] and about["config"]["base_channels"] == 8
    convert.from_safetensors("w.safetensors", "back.pt")
    before, back = (load(p, device="cpu", precision="fp32") for p in ("here.pt", "back.pt"))
    assert torch.equal(before.generate(["class 1"], 2, steps=3), back.generate(["class 1"], 2, steps=3))
    assert dataclasses.asdict(before.config) == dataclasses.asdict(back.config)
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(UserError, match="no configuration"):
        convert.from_safetensors("other.safetensors", "other.pt")


def test_the_command_line(folder, capsys):
    """As a user types it; existing files are kept, mistakes are one line with a status."""
    checkpoint(folder / "here.pt", dataset="digits", **TINY)
    done = cli("to-diffusers", "here.pt", "there", cwd=folder, script="convert.py")
    assert done.returncode == 0 and "there/README.md" in done.stdout, done.stderr
    for arguments, words in (("to-diffusers here.pt there", "exists"), ("from-diffusers nowhere x.pt", "neither"),
                             ("to-safetensors nothing.pt x", "no checkpoint"), ("from-safetensors here.pt x.pt", "here.pt is no whole file of safetensors"),
                             ("to-diffusers here.pt x --label cat", "unknown class cat"), ("from-diffusers there x", "end in .pt"),
                             ("from-safetensors there x.pt", "no such file")):
        assert convert.main(arguments.split()) in (1, 2)
        error = capsys.readouterr().err
        assert words in error and error.startswith("convert: ") and error.count("\n") == 1
    assert sorted(p.name for p in folder.iterdir()) == ["here.pt", "there"]


def test_without_diffusers_the_line_says_what_to_install(folder, monkeypatch, capsys):
    """diffusers and safetensors are optional."""
    checkpoint(folder / "here.pt", dataset="digits", **TINY)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert convert.main(["to-diffusers", "here.pt", "there"]) == 1
    assert "pip install diffusers" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(folder):
    """Status 130 and one line; nothing is left."""
    done = interrupted("convert.py", "to-safetensors", "some.pt", "w.safetensors", cwd=folder)
    assert done.returncode == 130 and done.stderr.strip() == "convert: interrupted"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("arguments", [["from-safetensors", "some.st", "x.pt", "--debug"],
                                       ["--debug", "from-safetensors", "some.st", "x.pt"]])
def test_debug_shows_the_traceback(arguments, folder):
    """Before the command and behind it; of a library's error, that one's too."""
    (folder / "some.st").write_bytes(b"no tensors")
    done = cli(*arguments, cwd=folder, script="convert.py")
    assert done.returncode == 1 and done.stderr.count("Traceback") == 2 and "SafetensorError" in done.stderr
    done = cli("from-safetensors", "some.st", "x.pt", cwd=folder, script="convert.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "some.st is no whole file of safetensors" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    ("to-safetensors some.pt x --rawest", "unknown option --rawest"), ("from-diffusers there x.pt --raw", "unknown option --raw"),
    ("to-diffusers some.pt", "folder"), ("", "COMMAND"), ("to-onnx a b", "to-onnx")])
def test_a_mistyped_command_line_is_one_line(arguments, words, capsys):
    """Status 2, no usage text of a screen."""
    assert convert.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("changes, words", [
    (dict(block_out_channels=[10**9, 10**9]), "block_out_channels is .*lies between 1 and 16,384"),
    (dict(block_out_channels=[16_384, 16_384], layers_per_block=16, norm_num_groups=32), "GiB"),
    (dict(block_out_channels="wide"), "block_out_channels is 'wide'"), (dict(block_out_channels=[]), "0 entries"),
    (dict(block_out_channels=[16, 32, 64]), "down_block_types has another number"),
    (dict(layers_per_block=10**6), "layers_per_block is 1000000, and lies between 1 and 16"),
    (dict(layers_per_block=1.5), "layers_per_block"), (dict(norm_num_groups=0), "norm_num_groups is 0"),
    (dict(norm_num_groups=7), "norm_num_groups, 7, does not divide"), (dict(attention_head_dim=0), "attention_head_dim is 0"),
    (dict(attention_head_dim=1000), "attention_head_dim, 1000, does not divide"),
    (dict(num_class_embeds=10**9), "num_class_embeds"), (dict(sample_size=10**9), "sample_size"),
    (dict(time_embedding_dim=10**9), "time_embedding_dim"), (dict(in_channels=None), "in_channels is None"),
    (dict(down_block_types=["Nothing", "Nothing"]), "no network can be made of it"), (dict(act_fn=3), "act_fn is 3")])
def test_the_sizes_of_a_foreign_network_are_checked_before_it_is_built(changes, words, folder, monkeypatch):
    """config.json is read first: a network that no machine holds, or that is none, takes no memory and no weights."""
    foreign(PLAIN).save_pretrained("there")
    path = folder / "there" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    monkeypatch.setattr(UNet2DModel, "from_pretrained", None)
    with pytest.raises(UserError, match=rf"there/config\.json.*{words}"):
        convert.from_diffusers("there", "here.pt")


@pytest.mark.parametrize("changes, words", [
    (dict(num_train_timesteps=10**9), "num_train_timesteps"), (dict(trained_betas=["x"]), "trained_betas"),
    (dict(beta_schedule="steep"), ".* its beta_schedule is 'steep'"),
    (dict(beta_start="low"), "beta_start"), (dict(clip_sample={}), "clip_sample")])
def test_a_foreign_schedule_is_checked_before_it_is_built(changes, words, folder):
    """The same for scheduler_config.json: its table of betas is made in memory."""
    DDPMPipeline(foreign(PLAIN), DDPMScheduler()).save_pretrained("there")
    path = folder / "there" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=rf"scheduler_config\.json cannot be used: (its )?{words}"):
        convert.from_diffusers("there", "here.pt")


def test_safetensors_of_other_hands_are_converted_or_refused(folder):
    """Tensors in double precision become float32; what is missing or does not fit is named, without a KeyError."""
    path = str(trained_before())
    convert.to_safetensors(path, "there.safetensors")
    with safe_open("there.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}         # noqa: SIM118 (not a dictionary)
    save_file({name: value.double() for name, value in tensors.items()}, "double.safetensors", metadata)
    convert.from_safetensors("double.safetensors", "double.pt")
    state = torch.load("double.pt", weights_only=True)
    assert {value.dtype for value in (*state["model"].values(), *state["moments"].values())} == {torch.float32}
    assert load("double.pt", device="cpu").generate([0], 1, steps=2).dtype == torch.uint8

    about = json.loads(metadata["diffuser"])
    without = {name: value for name, value in tensors.items() if name != "moments.mean"}
    bad = {
        "it lacks the tensor moments.mean": (without, about),
        "tensors are not those": ({**tensors, "more": torch.zeros(1)}, about),
        "the shape in its metadata": (tensors, {**about, "shape": [1, "x", 8]}),
        "the class_names in its metadata": (tensors, {**about, "class_names": 3}),
        "the config in its metadata": (tensors, {**about, "config": []}),
        "dataset cannot be": (tensors, {**about, "config": {"dataset": {}}}),
        "no configuration": (tensors, 3),
        "moments": ({**tensors, "moments.var": torch.full_like(tensors["moments.var"], torch.nan)}, about),
    }
    for words, (content, text) in bad.items():
        save_file(content, "bad.safetensors", {"diffuser": json.dumps(text)})
        with pytest.raises(UserError, match=rf"bad\.safetensors .*{words}"):
            convert.from_safetensors("bad.safetensors", "bad.pt")
    (folder / "bad.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="no whole file of safetensors"):
        convert.from_safetensors("bad.safetensors", "bad.pt")
    assert not (folder / "bad.pt").exists()


def test_a_damaged_export_says_which_file(folder):
    """diffuser.json and moments.safetensors beside a pipeline: a line that names the file, exit 2."""
    convert.to_diffusers(str(trained_before()), "there")
    (folder / "there" / "moments.safetensors").unlink()
    with pytest.raises(UserError, match=r"moments\.safetensors is missing or damaged"):
        convert.from_diffusers("there", "here.pt")
    (folder / "there" / "diffuser.json").write_text('{"config": 3}')
    with pytest.raises(UserError, match=r"diffuser\.json is damaged"):
        convert.from_diffusers("there", "here.pt")


def test_a_target_that_cannot_be_written_is_told_before_the_work(folder, capsys):
    """The line names the argument, and nothing was read."""
    (folder / "file").write_text("")
    for arguments in (["from-diffusers", "nowhere", "file/x.pt"], ["to-safetensors", "nowhere.pt", "file/x"],
                      ["to-diffusers", "nowhere.pt", "file/x"], ["from-safetensors", "nowhere", "file/x.pt"]):
        assert convert.main(arguments) == 2
        assert "cannot write to file/x" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError(28, "full", "there")])
def test_a_full_disk_is_exit_1_and_names_the_target(folder, monkeypatch, capsys, error):
    """Whichever library meets it, and with whatever words."""
    path = str(trained_before())
    capsys.readouterr()
    monkeypatch.setattr(DDPMPipeline, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(error))
    assert convert.main(["to-diffusers", path, "there"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert:")]
    assert len(errors) == 1 and errors[0].startswith("convert: there: ")


# ---- the Hub -----------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as publishing a folder takes. asked: (method, path, content) of all requests."""

    asked: ClassVar = []

    def log_message(self, *_):
        pass

    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.asked.append(("GET", self.path, b""))
        self.answer({})

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(("POST", self.path, content))
        assert self.headers["Authorization"] == "Bearer hf_secret"
        here = f"http://{self.headers['Host']}"
        if self.path.endswith("/create"):
            return self.answer(dict(url=f"{here}/spaces/me/digits", name="me/digits"))
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            return self.answer(dict(files=[dict(path=file["path"], uploadMode="regular", shouldIgnore=False)
                                           for file in files]))
        if "/commit/" in self.path:
            return self.answer(dict(commitUrl=f"{here}/spaces/me/digits/commit/1", commitOid="1", success=True))
        return self.answer(dict(errors=[], warnings=[]))


@pytest.fixture
def space(folder):
    """A Space of a network that is not trained."""
    diffuser.Model.from_network(tiny_unet(classes=10), tiny_training(), (1, 8, 8), list("0123456789")).save("digits.pt")
    convert.to_space("digits.pt", "space")
    return folder / "space"


def test_a_space_is_of_one_reading_of_the_checkpoint(folder, monkeypatch):
    """A run may save meanwhile: weights, samples and the card are of the same step."""
    diffuser.Model.from_network(tiny_unet(classes=10), tiny_training(), (1, 8, 8), list("0123456789")).save("digits.pt")
    read, readings = diffuser.load_checkpoint, []
    monkeypatch.setattr(diffuser, "load_checkpoint", lambda *a, **k: readings.append(a) or read(*a, **k))
    convert.to_space("digits.pt", "space")
    assert len(readings) == 1


def test_a_space_is_published(space, tmp_path):
    """to-hub makes the repository as a Space of gradio and sends every file of the folder, by the library's own way."""
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    env = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_TOKEN="hf_secret", HF_HOME=str(tmp_path / "hub"),
               HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    try:
        done = cli("to-hub", space, "me/digits", script="convert.py", cwd=tmp_path, env=env)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert "/spaces/me/digits" in done.stdout

    create = next(json.loads(content) for _, path, content in Hub.asked if path.endswith("/create"))
    assert (create["type"], create["name"], create["organization"], create["sdk"]) == ("space", "digits", "me", "gradio")
    commit = next(content for _, path, content in Hub.asked if "/commit/" in path)
    sent = {}
    for line in commit.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            sent[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
    files = {path.relative_to(space).as_posix(): path.read_bytes() for path in space.rglob("*") if path.is_file()}
    assert sent == files and {"app.py", "README.md", "model.safetensors", "diffuser_lib/files.py"} <= sent.keys()


def test_without_a_token_the_command_is_told(space, tmp_path):
    """Where nobody has logged in nothing is sent, and the command to do it by hand is said; wrong folders are refused."""
    pytest.importorskip("huggingface_hub")
    env = dict(HF_TOKEN="", HF_HOME=str(tmp_path / "hub"), HF_ENDPOINT="http://127.0.0.1:9")
    done = cli("to-hub", space, "me/digits", script="convert.py", cwd=tmp_path, env=env)
    assert done.returncode == 2 and f"hf upload me/digits {space} --repo-type space" in done.stderr
    for source, target in ((tmp_path, "me/digits"), (convert.__file__.rpartition("/")[0], "me/digits"), (space, "digits"), (tmp_path / "nothing", "me/digits")):
        with pytest.raises(UserError):
            convert.to_hub(str(source), target)


def test_a_space_says_nothing_of_the_machine(space, tmp_path):
    """What is published holds no path of the machine that it was made on, and no leftovers."""
    for path in space.rglob("*"):
        assert "__pycache__" not in path.name
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
    with pytest.raises(UserError, match="exists"):
        convert.to_space("digits.pt", str(space))
