#!/usr/bin/env python3
"""evaluate: score generated images against a dataset or another folder.

    python evaluate.py out --against mnist                          class accuracy and Frechet distance, no download
    python evaluate.py out --against cifar10 --metrics fid,kid,is,pr  Inception metrics, by torch-fidelity
    python evaluate.py out --against photos.zip --metrics fid --weights W.pth
    python evaluate.py out --against photos.zip --copies            is anything a copy of a training image?
    python evaluate.py --bpd checkpoint.pt                          bits per dimension of a model's held-out images

DIR is a folder as `diffuser.py --mode inference --save_dir DIR` leaves it, or any folder, ZIP or .npz of images. The
judge is a small classifier, trained once on the reference and kept in --data_dir: class accuracy is the share of images
that it takes for the class in their file name, the distance is that of Heusel et al. 2017 between its features. Its
floor is the distance that real images outside the training set have. Without classes a network of fixed random
weights takes its place. A metric that the images are too few for is left out, with the number that it needs.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import diffuser
from diffuser_lib import copies
from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    first_line,
    require_writable,
    run_script,
    warn,
    warn_on_oserror,
    write_json,
)
from diffuser_lib.images import (
    ARCHIVES,
    ENDINGS,
    DecodedImages,
    ImageData,
    ImageSource,
    Shape,
    file_names,
    from_uint8,
    upright_size,
)
from diffuser_lib.judge import FEATURES, Reference, ReferenceStats, divide, extract_features
from diffuser_lib.machine import is_installed
from diffuser_lib.sources import HUB, open_images
from diffuser_lib.tensors import read_tensors

# ---- Images ------------------------------------------------------------------------------------


def find_images(path: str) -> ImageSource:
    """The images of a folder or file; of what diffuser.py or edit.py has left in a folder. Raises UserError."""
    if not path.startswith(HUB) and not Path(path).exists():
        raise UserError(f"{path} is no folder or file with images in it")
    if any(Path(path, record).exists() for record in ("samples.json", "edit.json")):
        kept_in = [Path(path, name) for name in (*(f"images.{kind}" for kind in ARCHIVES), "images")]
        path = str(next(filter(Path.exists, kept_in), path))
    return open_images(path, "images")


def shape_of_first(files: ImageSource) -> Shape:
    """(C, H, W): the size of the first image, in colour if any of a few is. Raises whatever a broken file leads to."""
    image, _ = files[0]
    with image:
        width, height = upright_size(image)
    return files.guess_channels(), height, width


def class_in_name(name: str) -> str:
    """The class in a file name such as images/000012_cat.png; empty where there is none."""
    if not name.lower().endswith(ENDINGS):                       # a place in an array or table
        return ""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return stem.partition("_")[2]


def read_images(path: str, shape: Shape | None = None) -> ImageData:
    """All images of a folder, ZIP or .npz file, as from find_images: uint8 [N, C, H, W].

    The label is the class in a name such as 000012_cat.png, else the folder's or the array's. shape: (C, H, W), by
    default the first image's own. Raises UserError, also for a single image that cannot be read: figures without it
    would be wrong.
    """
    return read_all(find_images(path), path, shape)


def read_all(files: ImageSource, path: str, shape: Shape | None = None) -> ImageData:
    """See read_images; files: what is at the path. Raises UserError."""
    if shape is None:
        try:
            shape = shape_of_first(files)
        except Exception as error:                               # broken files raise errors of every kind
            raise UserError(f"{files.name_of(0)} in {path} cannot be read ({first_line(error)})") from error

    decoded = DecodedImages(files, shape)
    pixels = []
    for i in tqdm(range(len(files)), "reading", leave=False, disable=None):
        item = decoded[i]
        if isinstance(item, str):
            raise UserError(f"{files.name_of(i)} in {path} cannot be read ({item}): remove it")
        pixels.append(torch.from_numpy(item[0]))
    images = torch.stack(pixels)

    # Classes: of the folders, or of the file names if all of them have one.
    if files.class_names:
        return ImageData(images, torch.tensor(files.labels), files.class_names)
    classes = [class_in_name(files.name_of(i)) for i in range(len(files))]
    if not all(classes):
        return ImageData(images, torch.zeros(len(images), dtype=torch.int64), [])
    class_names = sorted(set(classes))
    numbers = {name: i for i, name in enumerate(class_names)}
    labels = [numbers[name] for name in classes]
    return ImageData(images, torch.tensor(labels), class_names)


def is_dataset(against: str) -> bool:
    """Whether that is the name of a dataset, and no folder or file."""
    return against in diffuser.DATASETS and against != "folder"


def load_reference(against: str, data_dir: str, shape: Shape, test: str = "") -> Reference:
    """The dataset of that name, or the folder or file there, its images in the given shape (C, H, W).

    test: a folder or file of other images to test with. One image in six is for testing where neither that nor the
    dataset has a test part. Raises UserError.
    """
    if test:
        return load_both(against, data_dir, shape, test)
    if not is_dataset(against):
        files = find_images(against)
        data = read_all(files, against, shape)
        if len(data.class_names) > len(data.images) / 2:         # IMG_0001.jpg: numbers, no classes
            data = ImageData(data.images)
        test_files = files.test_part()
        if test_files is not None:
            held_out = read_all(test_files, against, shape)
            labels = labels_in_reference(held_out, data.class_names) if data.class_names else held_out.labels
            if labels is not None:
                held_out = ImageData(held_out.images, labels, data.class_names)
                return Reference(Path(against).stem, data, held_out, own_test=True)
        train, held_out = divide(data)
        return Reference(Path(against).stem, train, held_out)

    channels, height, width = shape
    cfg = diffuser.configure(dataset=against, data_dir=data_dir, channels=channels, img_size=(height, width),
                             channel_mults=(1,))
    return diffuser.real_images(cfg, diffuser.load_data(cfg))


def load_both(against: str, data_dir: str, shape: Shape, test: str) -> Reference:
    """All images of `against` to train with, those of `test` to test with. Raises UserError."""
    reference = load_reference(against, data_dir, shape)
    data = reference.everything()
    held_out = read_images(test, shape)
    if data.class_names:
        labels = labels_in_reference(held_out, data.class_names)
        if labels is None:
            raise UserError(f"--test {test} has other classes than {against}, or none: they have to be the same")
        held_out = ImageData(held_out.images, labels, data.class_names)
    return Reference(reference.name, data, held_out, own_test=True)


def count_reference(against: str, test: str) -> tuple[int, int]:
    """How many real images load_reference will find, but for a test part of their own; how many the judge learns from.

    Raises UserError.
    """
    if is_dataset(against):
        spec = diffuser.DATASETS[against]
        count = spec.num_images or 10**6                         # unknown: of a dataset of one's own
        has_test = test or spec.has_test
    else:
        files = find_images(against)
        count = len(files)
        has_test = test or files.test_part() is not None
    return count, count if has_test else count - count // 6


# ---- The judge ---------------------------------------------------------------------------------


def judge_of(reference: Reference, data_dir: str) -> ReferenceStats:
    """The judge of a reference, on the best device of this machine. Raises UserError."""
    device = diffuser.pick_device("auto")
    bf16 = diffuser.pick_precision(diffuser.Config(), device) == "bf16"
    return ReferenceStats(reference, data_dir, device, bf16)


def labels_in_reference(generated: ImageData, class_names: list[str]) -> Tensor | None:
    """The labels of a folder of images by the reference's numbers, int64 [N]; None where it has other classes."""
    numbers = {name: i for names in (file_names(class_names), class_names) for i, name in enumerate(names)}
    if not generated.class_names:
        return None
    if not set(generated.class_names) <= set(numbers):
        return None
    number_of_label = torch.tensor([numbers[name] for name in generated.class_names])
    return number_of_label[generated.labels]


def classifier_scores(generated: ImageData, stats: ReferenceStats) -> dict[str, float]:
    """What the classifier says of a folder of images, beside what it says of real ones. Raises UserError."""
    labels = labels_in_reference(generated, stats.class_names)
    scores = stats.scores(generated.images, labels)

    # The floor of a distance is a distance, too.
    count = min(len(generated.images), len(stats.test_features))
    if "distance" in scores and not math.isnan(stats.floor):
        scores["floor"] = stats.floor
        scores[f"floor of {count} images"] = stats.floor_of(count)
    if stats.has_classes:
        scores["judge's own accuracy"] = stats.accuracy
    return scores


# ---- Copies ------------------------------------------------------------------------------------

MOST_REAL = 1000                                                 # real images that drawn ones are held against


def look_for_copies(path: str, files: ImageSource, generated: ImageData, reference: Reference, stats: ReferenceStats,
                    page: Path) -> dict[str, float]:
    """The figures of diffuser_lib/copies.py for the images at a path, by pixels and by the judge's features.

    Real images are those of the reference's own test part; where it has none, some of the training images, each held
    against the others. Writes the page.
    """
    training = reference.everything()
    if reference.own_test:
        chosen = torch.linspace(0, len(reference.test.images) - 1, min(MOST_REAL, len(reference.test.images))).long()
        real = reference.test.images[chosen]
        itself = None
    else:
        itself = torch.linspace(0, len(training.images) - 1, min(MOST_REAL, len(training.images))).long()
        real = training.images[itself]

    spaces = {
        "pixels": copies.pixel_vectors,
        "features": lambda images: extract_features(stats.classifier, images)[0].float(),
    }
    comparisons = []
    for space, vectors in spaces.items():
        found = vectors(training.images)
        drawn = copies.nearest(vectors(generated.images), vectors(generated.images.flip(-1)), found)
        usual = copies.nearest(vectors(real), vectors(real.flip(-1)), found, itself)
        comparisons.append(copies.compare(space, drawn, usual))

    title = f"{len(generated.images):,} images of {path} against {len(training.images):,} of {reference.name}"
    names = [files.name_of(i) for i in range(len(files))]
    if warn_on_oserror(str(page), lambda: copies.write_page(
            page, title, names, generated.images, training.images, comparisons)):
        print(f"the nearest pairs are in {page}")

    figures = {}
    for comparison in comparisons:
        figures |= comparison.figures()
        if comparison.doubles:
            figures[f"real images that are there twice, by {comparison.space}"] = comparison.doubles
    return figures


# ---- Inception metrics -------------------------------------------------------------------------
# By torch-fidelity: Heusel et al. 2017 (fid), Binkowski et al. 2018 (kid), Salimans et al. 2016 (is),
# Kynkaanniemi et al. 2019 (pr).

# Our names, and torch-fidelity's.
METRICS = {"fid": "fid", "kid": "kid", "is": "isc", "pr": "prc"}


class ColourImages(torch.utils.data.Dataset):
    """uint8 [N, C, H, W] as uint8 [3, H, W] items."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].expand(3, -1, -1)


def require_inception(metrics: list[str], weights: str) -> None:
    """Raise UserError where torch-fidelity is missing, or the weights are no file of tensors but code to be run."""
    if not is_installed("torch_fidelity"):
        raise UserError(f"{', '.join(metrics)} need torch-fidelity: pip install torch-fidelity")
    if weights:
        read_tensors(weights)


def inception_scores(generated: Tensor, real: Tensor, metrics: list[str], weights: str, features: int,
                     subset: int) -> dict[str, float]:
    """FID, KID (subsets of `subset` images), Inception Score, precision and recall of images uint8 [N, C, H, W].

    weights: a file of the network's weights, else torch-fidelity downloads them; features: width of the layer, 64, 192,
    768 or 2048 (the usual one). Raises UserError for what cannot be loaded.
    """
    require_inception(metrics, weights)
    from torch_fidelity import calculate_metrics

    layers = {f"feature_layer_{name}": str(features) for name in ("fid", "kid", "prc")}
    wanted = {METRICS[metric]: True for metric in metrics}
    try:
        return calculate_metrics(
            input1=ColourImages(generated), input2=ColourImages(real), **wanted, **layers, kid_subset_size=subset,
            feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights or None,
            cuda=torch.cuda.is_available(), batch_size=50, save_cpu_ram=True, verbose=False)
    except (OSError, RuntimeError) as error:
        if isinstance(diffuser.explain(error), UserError):       # out of memory
            raise
        raise UserError(f"the Inception network could not be loaded ({first_line(error)}): give its weights as "
                        "torch-fidelity has them with --weights", code=1) from error


# ---- Variational bound -------------------------------------------------------------------------


def discretised_nll(x0: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """-log P(x0) under a Gaussian cut into the 256 levels of [-1, 1], the outer ones open, in nats (DDPM, eq. 13)."""
    upper = (x0.double() + 1 / 255 - mean) / sigma
    lower = (x0.double() - 1 / 255 - mean) / sigma
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    darkest = torch.special.log_ndtr(upper)
    lightest = torch.special.log_ndtr(-lower)
    log_p = torch.where(x0 > 0.999, lightest, inside)
    return -torch.where(x0 < -0.999, darkest, log_p)


def gaussian_kl(mean1: Tensor, var1: float, mean2: Tensor | float, var2: float) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    return 0.5 * (math.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


@torch.no_grad()
def bits_per_dimension(denoise: diffuser.Denoiser, x0: Tensor, alpha_bar: Tensor, variance: str = "small",
                       noise: Callable[[Tensor], Tensor] = torch.randn_like,
                       tick: Callable[[], object] = lambda: None) -> dict:
    """The variational bound on -log2 p(x0) per dimension (DDPM, eq. 5), as improved-diffusion's calc_bpd_loop has it.

    denoise: (xt, t) -> (x0_hat, eps_hat), on whatever device; x0: [N, C, H, W] in [-1, 1] on the CPU, as is noise(x0);
    alpha_bar: float64 [T], T > 1; variance: of p(x_{t-1} | x_t), small or large as for --variance; tick(): called after
    each timestep. Returns total, prior and terms (list, t = 0 first).
    """
    T = len(alpha_bar)
    bar = alpha_bar.tolist()
    bar_prev = [1.0, *bar[:-1]]
    beta = [1 - bar[t] / bar_prev[t] for t in range(T)]

    # Variances of q(x_{t-1} | x_t, x0) (DDPM, eq. 7) and of p(x_{t-1} | x_t); at t = 0 the former is 0.
    posterior = [beta[t] * (1 - bar_prev[t]) / (1 - bar[t]) for t in range(T)]
    chosen = beta if variance == "large" else posterior
    var = [posterior[1], *chosen[1:]]

    terms = []
    for t in reversed(range(T)):
        xt = math.sqrt(bar[t]) * x0 + math.sqrt(1 - bar[t]) * noise(x0)                    # DDPM, eq. 4
        x0_hat = denoise(xt, t)[0].cpu().double()

        # The means of p and q (DDPM, eq. 7); they differ by what is wrong in x0_hat.
        x0_factor = math.sqrt(bar_prev[t]) * beta[t] / (1 - bar[t])
        xt_factor = math.sqrt(1 - beta[t]) * (1 - bar_prev[t]) / (1 - bar[t])
        mean = x0_factor * x0_hat + xt_factor * xt
        if t > 0:
            nats = gaussian_kl(mean + x0_factor * (x0 - x0_hat), posterior[t], mean, var[t])
        else:
            nats = discretised_nll(x0, mean, math.sqrt(var[0]))
        terms.append(nats.mean().item() / math.log(2))
        tick()

    prior_nats = gaussian_kl(math.sqrt(bar[-1]) * x0.double(), 1 - bar[-1], 0.0, 1.0)
    prior = prior_nats.mean().item() / math.log(2)
    return dict(total=sum(terms) + prior, prior=prior, terms=terms[::-1])


def fed_from_cpu(denoise: diffuser.Denoiser, device: torch.device) -> diffuser.Denoiser:
    """A denoiser on the device, for xt on the CPU."""
    return lambda xt, t: denoise(xt.to(device), t)


def checkpoint_bpd(path: str, data_dir: str, count: int, batch: int = 250) -> dict[str, float]:
    """The bound for the model in a checkpoint, given the class of each image, in float32.

    It is the mean over `count` of the images that it was not trained on. Raises UserError.
    """
    model = diffuser.load(path, data_dir=data_dir, guidance_scale=0.0, precision="fp32")
    cfg = model.config
    if cfg.dataset == "folder":
        raise UserError(f"{path} was trained on a folder of images: --bpd is for named datasets")

    data = diffuser.load_data(cfg)
    _, val_indices = diffuser.split(data, cfg.val_fraction)
    val_indices = val_indices[:count]
    if len(val_indices) == 0:
        raise UserError(f"{path} was trained with --val_fraction 0: no image is left to test it with")

    random = diffuser.generator(cfg.seed, diffuser.STREAM_VALIDATION)

    def draw_noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=random)

    total = 0.0
    prior = 0.0
    first_term = 0.0
    steps = cfg.timesteps * math.ceil(len(val_indices) / batch)
    with tqdm(total=steps, desc="bound", leave=False, disable=None) as bar:
        for part in val_indices.split(batch):
            labels = data.labels[part].to(model.device)
            denoise = fed_from_cpu(model.denoiser(labels, cfg), model.device)
            x0 = from_uint8(data.images[part])
            bound = bits_per_dimension(denoise, x0, model.diffusion.alpha_bar, cfg.variance, draw_noise, bar.update)
            share = len(part) / len(val_indices)
            total += share * bound["total"]
            prior += share * bound["prior"]
            first_term += share * bound["terms"][0]

    return {
        "bits per dimension": total,
        "of these the prior": prior,
        "of these t = 0": first_term,
        "images": len(val_indices),
    }


# ---- Command line ------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser("evaluate.py", usage="python evaluate.py [FOLDER] [options]", doc=__doc__)
    parser.add_argument("folder", nargs="?", help="folder or file of images to score")
    parser.add_argument("--against", default="", metavar="NAME|PATH", help="dataset, folder or file of real images")
    parser.add_argument("--test", default="", metavar="PATH",
                        help="folder or file of other real images to test with [a test part of --against, or a sixth]")
    parser.add_argument("--metrics", default="", metavar="NAME,NAME",
                        help="judge, fid, kid, is, pr [judge for named datasets and with --test, else fid]")
    parser.add_argument("--copies", nargs="?", const="copies.html", default="", metavar="PATH",
                        help="find each image's nearest training image, and write a page of them [copies.html]")
    parser.add_argument("--bpd", default="", metavar="CKPT", help="bits per dimension of the model in this checkpoint")
    parser.add_argument("--num_images", type=int, default=1000, help="held-out images for --bpd, at most [1000]")
    parser.add_argument("--data_dir", default="data", metavar="PATH",
                        help="where datasets are and the judge is kept [data]")
    parser.add_argument("--weights", default="", metavar="PATH",
                        help="Inception weights [torch-fidelity downloads them]")
    parser.add_argument("--features", type=int, default=2048, choices=(64, 192, 768, 2048),
                        help="width of the Inception layer for fid, kid, pr [2048]")
    parser.add_argument("--kid_subset_size", type=int, default=1000, help="images in a subset for kid [1000]")
    parser.add_argument("--json", default="", metavar="PATH", help="also write the figures to this file")
    add_debug(parser)
    return parser


def choose_metrics(args: argparse.Namespace) -> list[str]:
    """The metrics asked for, or those that are usual for what is compared with; the judge's by their own names.

    Raises UserError.
    """
    usual = "judge" if is_dataset(args.against) or args.test else "fid"
    names = args.metrics or usual
    metrics = []
    for name in names.split(","):
        name = name.strip()
        if name == "judge":
            metrics += ["accuracy", "distance"]
        elif name in METRICS:
            metrics.append(name)
        else:
            raise UserError(f"--metrics {name}: choose from judge, {', '.join(METRICS)}")
    return metrics


def too_few_for(metric: str, generated: int, real: int, trained_on: int, args: argparse.Namespace) -> str:
    """Why a metric cannot be computed from so many generated and real images; empty where it can be.

    trained_on: the real images that the judge learns from. It makes two of the metrics, accuracy and distance.
    """
    width = FEATURES
    title = f"a Frechet distance over {width} features" if metric == "distance" else metric
    needs = {
        "accuracy": (1, ""),
        "distance": (width + 1, "its covariance would be singular; 1,000 are better"),
        "fid": (args.features + 1, f"its covariance has {args.features} dimensions"),
        "kid": (args.kid_subset_size, "its subsets are that large (--kid_subset_size)"),
        "is": (100, "it averages over ten parts"),
        "pr": (100, "it looks for nearest neighbours"),
    }
    least, why = needs[metric]
    if metric in ("accuracy", "distance"):
        if trained_on < 10:
            return f"{real} real images are too few to train a judge on: it needs a dozen"
        real = trained_on
    if generated < least:
        return f"{generated} images are too few for {title}: it needs {least}, since {why}"
    if metric not in ("accuracy", "is") and real < least:
        use = "real images to train the judge on" if metric == "distance" else "real images"
        return f"{real} {use} are too few for {title}: it needs {least}, since {why}"
    return ""


def choose_possible(metrics: list[str], generated: int, real: int, trained_on: int,
                    args: argparse.Namespace) -> list[str]:
    """The metrics that so many images are enough for; says which are left out. Raises UserError where all are."""
    problems = {metric: too_few_for(metric, generated, real, trained_on, args) for metric in metrics}
    possible = [metric for metric, problem in problems.items() if not problem]
    left_out = [problem for problem in problems.values() if problem]
    if not possible:
        if "distance" not in metrics and not too_few_for("distance", generated, real, trained_on, args):
            left_out[-1] += "; --metrics judge needs fewer images"
        raise UserError("\n".join(dict.fromkeys(left_out)))
    for problem in left_out:
        warn(f"evaluate: left out: {problem}")
    return possible


def without_accuracy(metrics: list[str], generated: ImageData, reference: Reference) -> list[str]:
    """The metrics but for accuracy, where there are no classes to be right about; says why. Raises UserError where
    none is left."""
    class_names = reference.train.class_names
    if "accuracy" not in metrics:
        return metrics
    if len(class_names) >= 2 and labels_in_reference(generated, class_names) is not None:
        return metrics

    problem = f"accuracy needs the classes of {reference.name} in names of files (000012_cat.png) or folders"
    if len(class_names) < 2:
        problem = f"accuracy needs classes, which {reference.name} does not have"
    left = [metric for metric in metrics if metric != "accuracy"]
    if not left:
        raise UserError(f"{problem}; a distance needs {FEATURES + 1} images")
    if len(class_names) >= 2:                                    # without any, nobody expects an accuracy
        warn(f"evaluate: left out: {problem}")
    return left


def evaluate(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """The figures that the command line asks for, by name, as they are found. Raises UserError."""
    if args.num_images < 1 or args.kid_subset_size < 2:
        raise UserError("--num_images has to be at least 1, --kid_subset_size at least 2")
    if args.copies and (args.bpd or not args.copies.endswith(".html")):
        raise UserError("--copies is for a folder of images: evaluate.py DIR --against DATA --copies PAGE.html")
    if args.bpd:
        if args.folder or args.against or args.test or args.metrics:
            raise UserError("--bpd is about a model, not about images: leave out the folder, --against, --test and "
                            "--metrics")
        yield checkpoint_bpd(args.bpd, args.data_dir, args.num_images)
        return
    if not args.folder or not args.against:
        raise UserError("name a folder of images and what to hold them --against: evaluate.py DIR --against mnist")
    if args.test:
        find_images(args.test)                                   # raises UserError

    # Counts and packages first: reading, training a judge and Inception take their time.
    files = find_images(args.folder)
    there, trained_on = count_reference(args.against, args.test)
    metrics = []
    if args.metrics or not args.copies:
        wanted = choose_metrics(args)
        inception = [name for name in wanted if name in METRICS]
        if inception:
            require_inception(inception, args.weights)
        metrics = choose_possible(wanted, len(files), there, trained_on, args)
    if args.copies and there < 12:
        raise UserError(f"{there} real images are too few to tell copies: it needs 12, and a hundred say more")

    generated = read_all(files, args.folder)
    reference = load_reference(args.against, args.data_dir, tuple(generated.images.shape[1:]), args.test)
    yield {"images": len(generated.images)}

    metrics = without_accuracy(metrics, generated, reference)
    by_judge = "accuracy" in metrics or "distance" in metrics
    if by_judge or args.copies:
        stats = judge_of(reference, args.data_dir)
    if by_judge:
        yield classifier_scores(generated, stats)
    inception = [name for name in metrics if name in METRICS]
    if inception:
        real = reference.everything().images
        yield inception_scores(generated.images, real, inception, args.weights, args.features, args.kid_subset_size)
    if args.copies:
        yield look_for_copies(args.folder, files, generated, reference, stats, Path(args.copies))


def run(args: argparse.Namespace) -> None:
    """Print what the command line asks for, and write it to a file where one is given. Raises UserError, OSError.

    What is found is kept where something fails after it.
    """
    start_time = time.perf_counter()
    for flag in ("json", "copies"):
        if getattr(args, flag):
            require_writable(getattr(args, flag), f"--{flag}")
    figures = {}
    try:
        for found in evaluate(args):
            figures |= found
            for name, value in found.items():
                shown = str(value) if isinstance(value, int) else f"{value:.5g}"
                print(f"{name:48} {shown}", flush=True)
    finally:
        if args.json and figures.keys() - {"images"}:            # something was found
            write_json(Path(args.json), figures)
    print(f"{'seconds':48} {time.perf_counter() - start_time:.0f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    explain = partial(diffuser.explain, remedy="give fewer images at a time, or close other programs")
    return run_script("evaluate", lambda: build_parser().parse_args(argv), run, explain)


if __name__ == "__main__":
    end_process(main)
