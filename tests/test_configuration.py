"""Chapter 1: options, their precedence, their checks."""

import dataclasses
import json
import shlex

import pytest
import torch

import diffuser
from diffuser import UserError, configure


def test_precedence_flag_checkpoint_preset_default():
    """An explicit flag beats the checkpoint, which beats the preset, which beats the default."""
    assert configure(dataset="mnist").timesteps == 500                       # preset
    assert configure(dataset="mnist").cosine_s == 0.008                      # default
    saved = dataclasses.asdict(configure(dataset="mnist", timesteps=300, epochs=7))
    assert configure(saved).timesteps == 300 and configure(saved).epochs == 7
    assert configure(saved, epochs=9).epochs == 9


def test_a_checkpoint_does_not_bring_its_paths_along():
    """A checkpoint from elsewhere must not choose where files are written or which device is used."""
    saved = dataclasses.asdict(configure(dataset="mnist", generated_directory="/elsewhere", device="cpu"))
    assert configure(saved).generated_directory == "samples" and configure(saved).device == "auto"


def test_a_preset_gives_way_to_a_smaller_network():
    """Fewer levels asked for: the preset's attention at a level that is gone is dropped, not an error."""
    assert configure(dataset="celeba").attention_levels == (2,)
    assert configure(dataset="celeba", channel_mults=(1, 2)).attention_levels == ()


def test_a_recipe_counts_as_asked_for():
    """--recipe sets a whole configuration, and a flag beside it still wins."""
    cfg = configure(**{"dataset": "cifar10", "recipe": "ho2020", "batch_size": 16})
    assert (cfg.num_heads, cfg.batch_size, cfg.conditioning, cfg.timesteps) == (1, 16, "add", 1000)


def test_path_to_data_means_dataset_folder(image_folder):
    """Giving a folder of images is enough to train on it."""
    assert diffuser.requested({"path_to_data": str(image_folder)})["dataset"] == "folder"


@pytest.mark.parametrize("text, value", [("True", True), ("false", False), ("1", True), ("off", False)])
def test_booleans_are_read_as_words(text, value):
    """`--flag False` means False, which type=bool would get wrong."""
    assert diffuser.parse_value("use_ema", text) is value


@pytest.mark.parametrize("name, text, value", [
    ("channel_mults", "1,2,2", (1, 2, 2)), ("channel_mults", "[1, 2, 2, 2]", (1, 2, 2, 2)), ("img_size", "64", (64, 64)),
    ("img_size", "48x64", (48, 64)), ("schedule_type", "DNS", "dns"), ("schedule_type", "cos", "cosine"),
    ("loss_fn", "l2", "mse"), ("attention_levels", "", ()), ("learning_rate", "1e-4", 1e-4)])
def test_values_are_read_in_every_spelling(name, text, value):
    """Lists, sizes and the other names of choices are understood."""
    assert diffuser.parse_value(name, text) == value


@pytest.mark.parametrize("name, text", [
    ("epochs", "0"), ("epochs", "ten"), ("epochs", "1.5"), ("learning_rate", "-1"), ("learning_rate", "nan"),
    ("dropout", "1.5"), ("schedule_type", "quadratic"), ("img_size", "1x2x3"), ("img_size", "0"), ("use_ema", "maybe"),
    ("channel_mults", "1,-2"), ("seed", "-1")])
def test_bad_values_are_refused_by_name(name, text):
    """A value out of range or of the wrong kind is an error that names the flag."""
    with pytest.raises(UserError, match=f"{name}"):
        diffuser.parse_value(name, text)


@pytest.mark.parametrize("settings, words", [
    (dict(beta_start=0.02, beta_end=0.01), "beta_end"), (dict(attention_levels=(5,)), "attention_levels 5"),
    (dict(num_heads=7), "num_heads 7 does not divide"), (dict(head_dim=7), "head_dim 7 does not divide"),
    (dict(steps=600, timesteps=500), "steps 600"), (dict(channel_mults=()), "channel_mults"),
    (dict(img_size=(30, 30), channel_mults=(1, 2, 2)), "28 or 32"), (dict(epochs="5"), "epochs"),
    (dict(base_channels=10**9), "base_channels"), (dict(nonsense=1), "nonsense")])
def test_contradictions_are_refused(settings, words):
    """Options that cannot hold together, or come from a file with wrong types, are one clear error."""
    with pytest.raises(UserError, match=words):
        configure(**{"dataset": "mnist", **settings})


def test_every_preset_and_recipe_is_valid():
    """No preset or recipe sets an unknown option or contradicts itself."""
    for dataset in diffuser.PRESETS:
        configure(dataset=dataset)
    for recipe in diffuser.RECIPES:
        configure(**{"dataset": "cifar10", "recipe": recipe})


def test_recommended_settings_are_the_documented_ones():
    """The recommended hyperparameters stay the defaults of their datasets."""
    table = {"mnist": (500, "linear", 1e-5, 0.01, 128, 1e-3, 32), "cifar10": (500, "linear", 1e-5, 0.012, 32, 1e-4, 128),
             "cifar10_optimized": (500, "linear", 1e-5, 0.012, 128, 1e-4, 128),
             "celeba": (1000, "cosine", 1e-4, 0.02, 8, 1e-4, 256)}
    for dataset, row in table.items():
        cfg = configure(dataset=dataset)
        assert row == (cfg.timesteps, cfg.schedule_type, cfg.beta_start, cfg.beta_end, cfg.batch_size, cfg.learning_rate,
                       cfg.emb_dim)
    assert configure(dataset="cifar10").num_heads == 8 and configure(dataset="cifar10_optimized").num_heads == 4


@pytest.fixture
def on_a_cpu(monkeypatch):
    """A machine without an accelerator."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_folder_alone_trains_for_minutes_on_small_images(on_a_cpu):
    """With no flag but the path a run is as long as one can wait for, and its network suits that time."""
    cfg = configure(path_to_data="x")
    assert (cfg.train_minutes, cfg.img_size, cfg.patch_size, cfg.prediction) == (3.0, (32, 32), 4, "x0")
    assert cfg.time_sampling == "logit_normal" and cfg.schedule_type == "cosine"


@pytest.mark.parametrize("minutes, tokens, channels", [(3, 8, 64), (10, 8, 64), (30, 16, 64), (120, 16, 64), (200, 16, 128), (5000, 16, 128)])
@pytest.mark.parametrize("size", [64, 128])
def test_a_folders_network_grows_with_the_minutes(on_a_cpu, minutes, tokens, channels, size):
    """The longer the training, the finer and wider the network, whatever the size of the images."""
    cfg = configure(path_to_data="x", train_minutes=minutes, img_size=size)
    assert (size // cfg.patch_size, cfg.base_channels) == (tokens, channels)


def test_a_folders_network_is_larger_on_an_accelerator(monkeypatch):
    """A GPU does in a minute what a CPU does in many, in larger batches; --device cpu is a CPU all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there, here = (configure(path_to_data="x", device=device) for device in ("auto", "cpu"))
    assert (there.img_size, there.batch_size) == ((64, 64), 256)
    assert there.batch_size * 64 * 64 // there.patch_size**2 <= 2**18                    # so its steps are CUDA graphs
    assert (here.img_size, here.batch_size) == ((32, 32), 16)


@pytest.mark.parametrize("device, minutes, patches, w", [("cuda", 10, 16, 1.0), ("cuda", 20, 32, 0.5), ("cpu", 10_000, 16, 1.0)])
def test_the_largest_network_for_pictures_is_left_to_cuda(monkeypatch, device, minutes, patches, w):
    """A CPU would show it too few pictures in any time one waits for; a GPU's twenty minutes have it, as measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = configure(path_to_data="x", train_minutes=minutes, device=device)
    assert (cfg.img_size[0] // cfg.patch_size, cfg.guidance_scale) == (patches, w)


def test_a_minute_of_apples_chips_is_worth_less_than_one_of_cuda(on_a_cpu, monkeypatch):
    """Three minutes there get the second row's network, and a batch no larger."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    cfg = configure(path_to_data="x")
    assert (cfg.img_size, cfg.optimizer, cfg.batch_size) == ((64, 64), "muon", 128)


@pytest.mark.parametrize("size, patch_size", [((48, 64), 4), ((50, 70), 1), ((36, 36), 2), ((8, 8), 1), ((512, 512), 16)])
def test_a_folders_patches_divide_the_image(on_a_cpu, size, patch_size):
    """Whatever size is asked for, the patches that go with it leave images that the levels can halve."""
    assert configure(path_to_data="x", img_size=size).patch_size == patch_size


def test_half_an_hour_of_pictures_has_the_settings_that_were_measured(on_a_cpu):
    """What benchmarks/ found best on CIFAR-10 for 30 minutes, by value."""
    cfg = configure(path_to_data="x", img_size=32, train_minutes=30)
    assert (cfg.base_channels, cfg.channel_mults, cfg.patch_size, cfg.attention_levels) == (64, (1, 2), 2, (1,))
    assert cfg.num_res_blocks == 1 and configure(path_to_data="x", train_minutes=31).num_res_blocks == 2
    assert (cfg.optimizer, cfg.learning_rate, cfg.batch_size, cfg.detail_weight) == ("muon", 2e-3, 128, 4.0)
    assert (cfg.spacing, cfg.steps, cfg.guidance_scale, cfg.guidance_interval) == ("logsnr", 10, 1.5, None)


def test_a_folders_learning_rate_falls_with_the_width(on_a_cpu):
    """Wider networks get less, and no more is given to narrow ones."""
    rates = [configure(path_to_data="x", base_channels=channels).learning_rate for channels in (32, 64, 128, 256)]
    assert rates == [2e-3, 2e-3, 1e-3, 5e-4]


@pytest.mark.parametrize("minutes, w", [(3, 1.5), (30, 1.5), (31, 1.0), (2000, 1.0)])
def test_a_folders_guidance_follows_the_minutes(on_a_cpu, minutes, w):
    """After half an hour classes are unclear and want more guidance; after more, it costs variety for nothing."""
    assert configure(path_to_data="x", train_minutes=minutes).guidance_scale == w
    assert configure(path_to_data="x", train_minutes=minutes, guidance_scale=0.3).guidance_scale == 0.3


def test_details_weigh_more_where_the_network_predicts_pictures(on_a_cpu):
    """Whose loss has nothing to say of them by itself; v and eps weigh them already."""
    assert configure(path_to_data="x").detail_weight == configure(dataset="cifar10", recipe="best").detail_weight == 4.0
    assert configure(path_to_data="x", prediction="v").detail_weight == 0
    assert configure(path_to_data="x", min_snr_gamma=5.0).detail_weight == 0
    assert configure(path_to_data="x", detail_weight=1.0).detail_weight == 1.0


def test_any_length_asked_for_replaces_a_folders_minutes(on_a_cpu):
    """Epochs and steps count where they are given, and flags beat the preset."""
    for length in (dict(epochs=3), dict(iterations=7), dict(recipe="celebahq128")):
        assert configure(path_to_data="x", **length).train_minutes == 0
    assert configure(path_to_data="x", patch_size=1, base_channels=32, prediction="v").patch_size == 1


@pytest.mark.parametrize("recipe", ["ho2020", "celebahq128"])
def test_recipes_of_ddpm_mean_the_same_for_every_dataset(recipe):
    """A recipe leaves nothing of the method to the dataset's preset."""
    for dataset in ("mnist", "cifar10", "celeba", "folder"):
        cfg = configure(dataset=dataset, recipe=recipe, img_size=64)
        assert (cfg.timesteps, cfg.schedule_type, cfg.beta_start, cfg.beta_end) == (1000, "linear", 1e-4, 0.02)
        assert (cfg.prediction, cfg.time_sampling, cfg.patch_size, cfg.ema_decay) == ("eps", "uniform", 1, 0.9999)


# The documented command lines of other systems, with the recipe in the place of the script's name, and the values that
# their documentation has for them.
SYSTEMS = [
    ("--recipe ddpm_abarankab --iterations 800000 --batch_size 256 --log_to_wandb True",
     dict(dataset="cifar10", timesteps=1000, learning_rate=2e-4, batch_size=256, dropout=0.01, iterations=800_000,
          use_ema=True, ema_decay=0.9999, ema_update_rate=1, ema_start=1, use_labels=False, scale_betas=True,
          base_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2, attention_levels=(1,), optimizer="adam",
          beta_start=1e-4, beta_end=0.02, loss_fn="mse", use_wandb=True)),
    ("--recipe ddpm_abarankab --learning_rate 2e-4 --batch_size 256 --iterations 800000 --schedule DNS --schedule_low 1e-4 "
     "--schedule_high 0.02 --use_ema True --log_to_wandb True --project_name ddpm-cifar10",
     dict(schedule_type="dns", beta_start=1e-4, beta_end=0.02, scale_betas=True, learning_rate=2e-4,
          project_name="ddpm-cifar10", dropout=0.01, use_labels=False)),
    ("--recipe ddpm_abarankab --use_labels True --schedule l --num_timesteps 500",
     dict(use_labels=True, schedule_type="linear", timesteps=500, scale_betas=True)),

    ("--recipe diffusion_mac_m3 --experiment_name E --path_to_data pics --working_directory W --generated_directory G",
     dict(img_size=(128, 128), base_channels=128, timesteps=1000, iterations=150_000, batch_size=32,
          gradient_accumulation_steps=1, learning_rate=1e-4, warmup_steps=5000, weight_decay=1e-4, max_grad_norm=1.0,
          loss_fn="mse", checkpoint_rate=5000, plot_freq_interval=100, num_generations=5, num_keep_checkpoints=1,
          use_wandb=False, optimizer="adamw", lr_schedule="cosine", schedule_type="linear",
          channel_mults=(1, 2, 3, 4), attention_levels=(1, 2, 3), up_attention_levels=(0, 1, 2))),
    ("--recipe diffusion_mac_m3 --experiment_name celebA_diffusion_m3_ultra --path_to_data ./celeb_hq_128 --batch_size 16 "
     "--img_size 128 --starting_channels 96 --num_training_steps 100000 --evaluation_interval 5000 --learning_rate 0.0001 "
     "--warmup_steps 5000 --num_workers 4 --loss_fn mse --max_grad_norm 1.0 --weight_decay 0.0001 "
     "--num_keep_checkpoints 2 --num_generations 5 --plot_freq_interval 100",
     dict(batch_size=16, base_channels=96, iterations=100_000, num_keep_checkpoints=2, channel_mults=(1, 2, 3, 4))),
    ("--recipe diffusion_mac_m3 --path_to_data ./data/celeba --num_diffusion_timesteps 1000 --num_training_steps 200000 "
     "--batch_size 32 --gradient_accumulation_steps 2 --learning_rate 1e-4 --warmup_steps 5000 --evaluation_interval 5000 "
     "--img_size 128 --starting_channels 128 --loss_fn mse --use_wandb",
     dict(iterations=200_000, gradient_accumulation_steps=2, use_wandb=True, plot_freq_interval=100)),

    ("--recipe cifar10_ddpm",
     dict(dataset="cifar10", base_channels=64, channel_mults=(1, 2, 4), emb_dim=128, num_res_blocks=2, optimizer="adam",
          learning_rate=2e-4, batch_size=128, epochs=100, iterations=0, timesteps=1000, schedule_type="linear",
          beta_start=1e-4, beta_end=0.02, checkpoint_every=10, sample_every=20, checkpoint_rate=0, use_tensorboard=True)),

    ("--dataset cifar10 --timesteps 500 --beta_start 1e-5 --beta_end 0.012 --epochs 500 --batch_size 32 "
     "--learning_rate 1e-4 --schedule_type linear --emb_dim 128 --use_attention True",
     dict(timesteps=500, beta_start=1e-5, beta_end=0.012, epochs=500, batch_size=32, learning_rate=1e-4,
          schedule_type="linear", emb_dim=128, use_attention=True, num_heads=8)),
]


@pytest.mark.parametrize("line, documented", SYSTEMS)
def test_recipes_are_what_other_systems_document(line, documented):
    """The command line of each system means what it meant: flags and, under them, the documented defaults."""
    given = diffuser.build_parser().parse_args(["--mode", "train", *line.split()])
    cfg = configure(**diffuser.translate_flags(vars(given), diffuser.parse_value))
    assert {name: getattr(cfg, name) for name in documented} == documented
    shape = diffuser.image_shape(cfg)
    diffuser.network_size(cfg, shape, 0)                                     # it can be built


def test_scaled_betas_of_a_recipe():
    """ddpm_abarankab's betas are multiplied by 1000 / T: its dynamic negative square, as its formula has it."""
    cfg = configure(recipe="ddpm_abarankab", timesteps=500)
    t = torch.arange(500, dtype=torch.float64)
    low, high = 1e-4 * 2, 0.02 * 2
    beta = ((t + 5) / (500 + 1 + 5)) ** 2 * (high - low) + low
    torch.testing.assert_close(diffuser.alpha_bar_table(cfg), torch.cumprod(1 - beta, 0))


@pytest.mark.parametrize("channels", [64, 80, 96, 128])
def test_a_recipe_takes_the_widths_that_its_system_recommends(channels):
    """diffusion_mac_m3's README lowers --starting_channels where memory runs out."""
    assert configure(recipe="diffusion_mac_m3", dataset="celeba", base_channels=channels).base_channels == channels


def test_a_recipe_gives_way_to_data_of_ones_own():
    """A recipe that names a dataset is used for a folder where one is given."""
    assert configure(recipe="cifar10_ddpm", path_to_data="pics").dataset == "folder"
    assert configure(recipe="cifar10_ddpm", dataset="mnist").dataset == "mnist"


@pytest.mark.parametrize("dataset", sorted(diffuser.BEST))
def test_best_is_a_recipe_of_its_dataset(dataset):
    """--recipe best stands above the preset and below flags; the network it names can be built."""
    cfg = configure(dataset=dataset, recipe="best")
    assert all(getattr(cfg, name) == value for name, value in diffuser.BEST[dataset].items())
    assert configure(dataset=dataset, recipe="best", batch_size=7).batch_size == 7
    shape = diffuser.image_shape(cfg)
    with torch.device("meta"):
        network = diffuser.build_unet(cfg, shape[0], 10)
        assert network(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long)).shape == (1, *shape)


def test_best_for_pictures_follows_the_time(on_a_cpu):
    """Colour datasets and folders at the same size have the same network, by the minutes; the dataset's own size stays."""
    for minutes in (5, 30, 150, 300):
        own, folder = (configure(recipe="best", train_minutes=minutes, **data) for data in (
            dict(dataset="cifar10"), dict(path_to_data="x", img_size=32)))
        for name in ("base_channels", "channel_mults", "patch_size", "batch_size", "learning_rate", "prediction", "schedule_type"):
            assert getattr(own, name) == getattr(folder, name)
        assert own.img_size is None and own.train_minutes == minutes
    few, many = (configure(recipe="best", dataset="cifar10", train_minutes=m) for m in (5, 2000))
    assert (few.patch_size, few.base_channels) != (many.patch_size, many.base_channels)
    assert configure(recipe="best", dataset="cifar10").train_minutes == 30 and configure(dataset="cifar10").prediction == "eps"


def test_an_older_checkpoint_is_what_it_was(on_a_cpu):
    """What a preset says today of an option that the checkpoint does not know yet changes nothing about it."""
    stored = dataclasses.asdict(configure(path_to_data="x", img_size=64))
    for name in ("patch_size", "time_sampling", "guidance_scale", "detail_weight"):
        del stored[name]
    cfg = configure(stored)
    assert (cfg.patch_size, cfg.time_sampling, cfg.guidance_scale, cfg.detail_weight) == (1, "uniform", 0, 0)


def test_a_presets_sampling_steps_are_those_of_its_sampler():
    """Another sampler has its own number, from a preset as from a checkpoint; few timesteps are no more than there are."""
    assert configure(dataset="digits").steps == 10 and configure(dataset="digits", sampler="ddpm").steps is None
    stored = dataclasses.asdict(configure(dataset="digits"))
    assert configure(stored).steps == 10 and configure(stored, sampler="ddpm").steps is None
    assert configure(dataset="digits", timesteps=5).steps == 5


def test_a_length_that_is_no_datasets_own_is_recorded(on_a_cpu):
    """A folder counts minutes: 100 epochs, the default elsewhere, have to be asked for."""
    for length in (dict(epochs=100), dict(epochs=99), dict(iterations=7), dict(train_minutes=5.0)):
        assert diffuser.chosen_length(configure(path_to_data="x", **length)) == length
    assert diffuser.chosen_length(configure(path_to_data="x")) == diffuser.chosen_length(configure(dataset="digits")) == {}


def test_a_value_that_is_left_to_the_program_is_auto():
    """In questions, which take it back, and in commands."""
    text = diffuser.format_value("sample_every", None)
    assert text == "auto" and diffuser.parse_value("sample_every", text) is None


def test_settings_that_do_not_touch_the_loss_leave_its_range():
    """How often grids are drawn and how, and when to stop, are no reason to forget which losses are usual."""
    others = {"sample_every", "sampler", "steps", "num_keep_checkpoints", "early_stop_loss_change", "epochs", "device", "working_directory"}
    assert not diffuser.OF_THE_LOSS & others
    assert {"learning_rate", "batch_size", "timesteps", "val_fraction", "log_every", "seed", "img_size", "ema_decay"} <= diffuser.OF_THE_LOSS


def test_a_level_that_is_not_there_is_named_by_its_option():
    """--up_attention_levels has a name of its own."""
    for name in ("attention_levels", "up_attention_levels"):
        with pytest.raises(UserError, match=f"^{name} 5: the network has levels 0 to 1"):
            configure(channel_mults=(1, 2), **{"attention_levels": (1,), name: (5,)})


def test_best_is_refused_where_there_is_none(monkeypatch):
    """A dataset of one's own that has no best: which have one."""
    monkeypatch.setitem(diffuser.DATASETS, "mine", diffuser.DATASETS["mnist"])
    with pytest.raises(UserError, match=r"best knows digits, mnist, cifar10, .*, not mine"):
        configure(dataset="mine", recipe="best")


def test_a_length_asked_for_beats_a_recipes_minutes():
    """--epochs and --iterations count where a recipe or a checkpoint counts in minutes."""
    for length in (dict(epochs=3), dict(iterations=7)):
        assert configure(dataset="mnist", recipe="best", **length).train_minutes == 0
        assert configure({"dataset": "mnist", "train_minutes": 10.0, "iterations": 5}, **length).train_minutes == 0


def test_a_number_of_steps_goes_with_its_sampler():
    """Ten steps are for the sampler they were chosen with: another one takes its own number, unless one is asked for."""
    best = dict(dataset="mnist", recipe="best")
    assert configure(**best).steps == 10 and configure(**best, sampler="dpmpp").steps == 10
    assert configure(**best, sampler="ddpm").steps is None and configure(**best, sampler="ddim", steps=7).steps == 7
    checkpoint = dict(dataset="mnist", sampler="dpmpp", steps=10)
    assert [configure(checkpoint, sampler=name).steps for name in ("dpmpp", "heun")] == [10, None]
    assert configure(dict(checkpoint, sampler="heun"), sampler="dpmpp").steps is None

    model = diffuser.Model.from_network(torch.nn.Identity(), configure(**best), (1, 28, 28))
    assert model.sampling_config({}).steps == 10 and model.sampling_config({"sampler": "ddim"}).steps is None


@pytest.mark.parametrize("options, words", [
    (dict(zero_terminal_snr=True), "zero_terminal_snr needs another prediction than eps"),
    (dict(train_minutes=5.0, epochs=3), "train_minutes sets the number of steps"),
    (dict(guide_path="weak.pt"), "guide_path needs guidance_scale"),
    (dict(guidance_interval=(2.0, 0.5)), "guidance_interval"), (dict(guidance_interval=(1.0,)), "guidance_interval"),
    (dict(train_minutes=-1.0), "train_minutes"), (dict(time_scale=0.0), "time_scale")])
def test_contradicting_sampling_and_training_options(options, words):
    """Options that contradict each other are one line that names the flag."""
    with pytest.raises(UserError, match=words):
        configure(**options)


def test_pairs_of_numbers():
    """--guidance_interval 0.2,2 is a pair of numbers; its ends keep their decimals."""
    assert diffuser.parse_value("guidance_interval", "0.2,2") == (0.2, 2.0)


def test_options_from_python_take_what_python_has():
    """Lists, a number for a square image; a misspelt option names the nearest one."""
    cfg = configure(dataset="folder", path_to_data="x", img_size=64, channel_mults=[1, 2])
    assert cfg.img_size == (64, 64) and cfg.channel_mults == (1, 2)
    with pytest.raises(UserError, match="no option epoch: did you mean epochs"):
        configure(dataset="digits", epoch=3)


@pytest.mark.parametrize("text, value", [("1,1.5,2", (1, 1.5, 2)), ("1,2,2", (1, 2, 2))])
def test_levels_may_be_fractions(text, value):
    """Multipliers that make whole numbers of channels, shown as they were written; others are refused."""
    assert str(diffuser.parse_value("channel_mults", text)) == str(value)
    assert configure(dataset="digits", base_channels=32, channel_mults=(1, 1.5)).channel_mults == (1, 1.5)
    with pytest.raises(UserError, match="no whole numbers of 10 channels"):
        configure(base_channels=10, channel_mults=(1, 1.25))


def test_a_number_of_heads_beats_a_preset_of_channels_per_head():
    """--num_heads counts where the preset or recipe says --head_dim."""
    assert configure(dataset="celeba").head_dim == 64
    assert configure(dataset="celeba", num_heads=8).head_dim == 0
    assert configure(dataset="folder", path_to_data="x", base_channels=24).head_dim == 8    # narrower: as far as it divides
    assert configure(dataset="celeba", recipe="celebahq128", num_heads=4).head_dim == 0


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"config": ' * 5000, '{"init_from": 3}', '{"dataset": {}}', '{"config": {"path_to_data": [1]}}'])
def test_a_config_file_of_any_content_is_used_or_refused(tmp_path, text):
    """Nested without end, or values of another kind: one error that says so, before any work."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError):
        configure(config=str(path))


def test_the_latest_checkpoint_is_what_a_run_goes_on_from_anyway():
    """--resume_from_checkpoint latest is --resume auto: where there is none, a run begins."""
    asked = diffuser.requested({"resume_from_checkpoint": "latest"})
    assert (asked["resume_from_checkpoint"], asked["resume"]) == ("", "auto")


def test_an_empty_choice_is_none():
    """--dataset "" and --mode "" are the same as leaving them out."""
    assert diffuser.requested({"dataset": "", "mode": "", "epochs": 3}) == {"epochs": 3, "iterations": 0, "train_minutes": 0.0}


@pytest.mark.parametrize("name", [".", "..", "../x", "a/../../x", "a/../b", "a/.", "./a", "/a", "a/", "a//b", "a\\..\\b", " "])
def test_an_experiment_stays_below_its_folder(name):
    """Its name is that of a folder below --working_directory: others would take checkpoints of other runs along."""
    with pytest.raises(UserError, match="experiment_name"):
        configure(dataset="digits", experiment_name=name)
    assert configure(dataset="digits", experiment_name="a/b.c").experiment_name == "a/b.c"


@pytest.mark.parametrize("options, chosen", [
    (dict(dataset="digits"), {}), (dict(dataset="digits", epochs=10, learning_rate=1e-3), dict(learning_rate=1e-3)),
    (dict(dataset="mnist", iterations=50, flip=False, img_size=(28, 28), use_labels=True, channels=1), dict(iterations=50)),
    (dict(dataset="celeba", channel_mults=(1, 2)), dict(channel_mults=(1, 2), attention_levels=())),
    (dict(dataset="digits", time_sampling="laplace", time_mean=-1.5, experiment_name="a b"),
     dict(time_sampling="laplace", time_mean=-1.5, experiment_name="a b")),
    (dict(dataset="folder", path_to_data="my pictures", base_channels=48),
     dict(path_to_data="my pictures", base_channels=48)),
    (dict(dataset="cifar10", recipe="ho2020"), None), (dict(dataset="mnist", recipe="best"), None),
    (dict(dataset="cifar10", warmup_steps=None, compile=True, num_heads=2, generated_directory="elsewhere"), None)])
def test_what_was_chosen_repeats_the_run(options, chosen):
    """What differs from the dataset's own settings, and nothing else, and a command line that leads to the same settings,
    also where the number of steps of so many minutes is known by then."""
    cfg = configure(**options)
    if chosen is not None:
        told = diffuser.chosen_options(cfg)
        told.pop("head_dim", None)                                           # what divides other widths
        assert told.items() >= chosen.items() and set(told) - set(chosen) <= {"learning_rate", "patch_size"}
    if cfg.train_minutes:
        cfg = dataclasses.replace(cfg, iterations=123)
    words = shlex.split(diffuser.repeating_command(cfg))
    assert words[:6] == ["python", "diffuser.py", "--mode", "train", "--dataset", cfg.dataset]
    again = diffuser.complete(diffuser.requested(vars(diffuser.build_parser().parse_args(words[2:]))))
    left = set(diffuser.PER_RUN - diffuser.REPEATED) | {"epochs", "train_minutes"}
    for name in diffuser.FIELDS.keys() - left:
        natural = name in ("flip", "img_size", "use_labels", "channels")
        assert getattr(again, name) == getattr(cfg, name) or natural, name


@pytest.mark.parametrize("options, words", [
    (dict(ema_halflife=1000.0, ema_decay=0.99), "takes the place of"), (dict(lr_cycles=3), "not onecycle"),
    (dict(lr_schedule="linear", lr_cycles=3), "not linear"), (dict(adam_betas=(0.9, 1.0)), "adam_betas"),
    (dict(adam_betas=(0.9,)), "adam_betas"), (dict(ema_halflife=-1.0), "ema_halflife")])
def test_options_of_training_that_contradict_each_other(options, words):
    """A half-life beside a decay, cycles of a schedule that has none, betas that are none."""
    with pytest.raises(UserError, match=words):
        configure(dataset="digits", **options)


def test_a_stronger_option_switches_off_what_would_overrule_it():
    """A decay that is asked for beats a half-life in the checkpoint, another schedule its cycles; and the other way round."""
    stored = dict(ema_halflife=1000.0, lr_schedule="cosine_with_restarts", lr_cycles=3)
    assert configure(stored, ema_decay=0.9).ema_halflife == 0 and configure(stored).ema_halflife == 1000
    assert configure(stored, lr_schedule="linear").lr_cycles is None and configure(stored).lr_cycles == 3
    assert configure(dict(ema_decay=0.9), ema_halflife=5.0).ema_halflife == 5


@pytest.mark.parametrize("options", [dict(recipe="ho2020"), dict(config="c.json")])
def test_a_half_life_takes_the_place_of_a_recipes_decay(options, tmp_path, monkeypatch):
    """What is asked for can be asked for again, as by the questions, and the command in config.json can be run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(dict(ema_decay=0.9, ema_halflife=3.0)))
    asked = diffuser.requested(dict(dataset="cifar10", ema_halflife=500_000.0, **options))
    cfg = diffuser.complete(diffuser.requested(asked))
    assert cfg.ema_halflife == 500_000
    words = shlex.split(diffuser.repeating_command(cfg))[2:]
    assert "--ema_decay" not in words
    assert diffuser.requested(vars(diffuser.build_parser().parse_args(words)))["ema_halflife"] == 500_000


@pytest.mark.parametrize("options", [dict(timesteps=50_000, beta_end=0.02), dict(beta_end=0.6, timesteps=1000)])
def test_a_schedule_that_leaves_nothing_is_refused_for_eps(options):
    """x0_hat would be divided by nothing, and every picture be black: told before a run, not after it."""
    with pytest.raises(UserError, match="leaves nothing of the picture"):
        configure(dataset="mnist", **options)
    assert configure(dataset="mnist", prediction="v", **options).prediction == "v"
    assert configure(dataset="mnist", timesteps=100_000, scale_betas=True).prediction == "eps"


@pytest.mark.parametrize("name", ["x" * 300, "é" * 127, "x" * 230, "a/" + "x" * 230, "ab/" * 400 + "z"])
def test_a_name_too_long_says_so(name):
    """Before the system does, and without showing all of it: the folders of samples and their locks have longer names."""
    with pytest.raises(UserError, match=r"experiment_name .* is too long") as error:
        configure(dataset="digits", experiment_name=name)
    assert len(str(error.value)) < 250
    assert configure(dataset="digits", experiment_name="x" * 200).experiment_name == "x" * 200


def test_ranges_are_written_as_people_write_them():
    """No message has 1e+07 in it."""
    with pytest.raises(UserError, match=r"epochs lies between 1 and 10,000,000, not 0"):
        configure(epochs=0)
    with pytest.raises(UserError, match=r"beta_start lies between 1e-09 and 0.999, not 2"):
        configure(beta_start=2)


@pytest.mark.parametrize("options", [
    dict(dataset={}), dict(dataset=[[1]]), dict(recipe=[{}]), dict(epochs=10**5000), dict(img_size=[None]),
    dict(channel_mults=[[1]]), dict(init_from=3), dict(config=["x"]), dict(learning_rate=float("nan"))])
def test_odd_types_are_one_error_that_names_the_flag(options):
    """From Python, a checkpoint or a file: no TypeError from the depths."""
    with pytest.raises(UserError, match=f"{next(iter(options))} "):
        configure(**options)
    if "config" not in options and "recipe" not in options and "init_from" not in options:
        with pytest.raises(UserError, match=f"{next(iter(options))} "):
            configure(options)


@pytest.mark.parametrize("minutes, steps", [(5.0, 5000), (10.0, 0)])
def test_other_minutes_than_those_of_the_checkpoint_are_more_steps(monkeypatch, minutes, steps):
    """A run of five minutes is as long as its checkpoint says; ten more are what fits into them, in --dry_run as well."""
    stored = dataclasses.asdict(configure(dataset="digits", train_minutes=5.0)) | dict(iterations=5000)
    monkeypatch.setattr(diffuser, "find_resume_checkpoint", lambda *_: ("a.pt", dict(config=stored)))
    assert diffuser.settle_run(dict(dataset="digits", train_minutes=minutes)).iterations == steps
