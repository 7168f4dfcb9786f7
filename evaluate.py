#!/usr/bin/env python3
"""evaluate: score generated images against a dataset or another folder.

    python evaluate.py out --against mnist                          class accuracy and Frechet distance, no download
    python evaluate.py out --against cifar10 --metrics fid,kid,is,pr  Inception metrics, by torch-fidelity
    python evaluate.py out --against photos.zip --metrics fid --weights W.pth
    python evaluate.py --bpd checkpoint.pt                          bits per dimension of a model's held-out images

DIR is a folder as `diffuser.py --mode inference --save_dir DIR` leaves it, or any folder or ZIP of images. The judge
is a small classifier, trained once on the reference and kept in --data_dir: class accuracy is the share of images
that it takes for the class in their file name, the distance is that of Heusel et al. 2017 between its features. Its
floor is the distance that real images outside the training set have. A metric that the images are too few for is left
out, with the number that it needs.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import diffuser
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
    write_atomically,
    write_json,
)
from diffuser_lib.images import DecodedImages, ImageData, ImageFiles, Shape, file_names, from_uint8
from diffuser_lib.machine import is_installed

# ---- Images ------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The real images: what a classifier is trained on, and others to test it with.

    own_test: whether the test images are the dataset's own, and not divided off here.
    """

    name: str
    train: ImageData
    test: ImageData
    own_test: bool = False

    def everything(self) -> ImageData:
        """The training images; all images where the set was divided here."""
        if self.own_test:
            return self.train
        images = torch.cat([self.train.images, self.test.images])
        labels = torch.cat([self.train.labels, self.test.labels])
        return ImageData(images, labels, self.train.class_names)


def find_images(path: str) -> ImageFiles:
    """The image files of a folder or ZIP; of DIR/images, where there is one. Raises UserError."""
    inner = Path(path, "images")
    try:
        return ImageFiles(str(inner) if inner.is_dir() else path, "DIR")
    except UserError:
        raise UserError(f"{path} is no folder or ZIP file with images in it") from None


def shape_of_first(files: ImageFiles) -> Shape:
    """(C, H, W): the size of the first image, in colour if any of a few is. Raises whatever a broken file leads to."""
    image, _ = files[0]
    with image:
        return files.guess_channels(), image.height, image.width


def class_in_name(name: str) -> str:
    """The class in a file name such as images/000012_cat.png; empty where there is none."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return stem.partition("_")[2]


def read_images(path: str, shape: Shape | None = None) -> ImageData:
    """All images of a folder or ZIP (of DIR/images, where there is one), uint8 [N, C, H, W].

    The label is the class in a name such as 000012_cat.png, else the folder's. shape: (C, H, W), by default the first
    image's own. Raises UserError, also for a single image that cannot be read: figures without it would be wrong.
    """
    files = find_images(path)
    if shape is None:
        try:
            shape = shape_of_first(files)
        except Exception as error:                               # broken files raise errors of every kind
            raise UserError(f"{files.names[0]} in {path} cannot be read ({first_line(error)})") from error

    # Decode all of them, then say which cannot be read.
    decoded = DecodedImages(files, shape)
    items = [decoded[i] for i in tqdm(range(len(files)), "reading", leave=False, disable=None)]
    pixels = []
    for name, item in zip(files.names, items, strict=True):
        if isinstance(item, str):
            raise UserError(f"{name} in {path} cannot be read ({item}): remove it")
        pixels.append(torch.from_numpy(item[0]))
    images = torch.stack(pixels)

    # Classes: of the folders, or of the file names if all of them have one.
    if files.class_names:
        return ImageData(images, torch.tensor(files.labels), files.class_names)
    classes = [class_in_name(name) for name in files.names]
    if not all(classes):
        return ImageData(images, torch.zeros(len(images), dtype=torch.int64), [])
    class_names = sorted(set(classes))
    labels = [class_names.index(name) for name in classes]
    return ImageData(images, torch.tensor(labels), class_names)


def load_reference(against: str, data_dir: str, shape: Shape) -> Reference:
    """The dataset of that name, or the folder or ZIP there, its images in the given shape (C, H, W).

    One image in six is for testing where the dataset has no test part of its own. Raises UserError.
    """
    if against not in diffuser.DATASETS or against == "folder":
        train, test = divide(read_images(against, shape))
        return Reference(Path(against).stem, train, test)

    channels, height, width = shape
    cfg = diffuser.configure(dataset=against, data_dir=data_dir, channels=channels, img_size=(height, width),
                             channel_mults=(1,))
    data = diffuser.load_data(cfg)
    spec = diffuser.DATASETS[against]
    if not spec.has_test or tuple(shape) != spec.shape:
        train, test = divide(data)
        return Reference(against, train, test)
    return Reference(against, data, diffuser.load_data(cfg, train=False), own_test=True)


def count_reference(against: str) -> int:
    """How many real images load_reference will find, but for a test part of their own. Raises UserError."""
    if against in diffuser.DATASETS and against != "folder":
        return diffuser.DATASETS[against].num_images or 10**6    # unknown: of a dataset of one's own
    return len(find_images(against))


def divide(data: ImageData) -> tuple[ImageData, ImageData]:
    """Five sixths and one sixth of the images, the same ones every time."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    test_size = len(order) // 6
    train = order[test_size:]
    test = order[:test_size]
    return (ImageData(data.images[train], data.labels[train], data.class_names),
            ImageData(data.images[test], data.labels[test], data.class_names))


# ---- Classifier --------------------------------------------------------------------------------


def read_tensors(path: str) -> dict:
    """The tensors in a file; nothing in it is executed. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:                                   # torch raises many kinds here
        raise UserError(f"{path} is not a readable file of tensors ({type(error).__name__})") from error


class Classifier(nn.Module):
    """A small convolutional classifier: uint8 [N, C, H, W] -> (features [N, 128], logits [N, classes])."""

    FEATURES = 128

    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        channels, height, width = shape
        base = 64 if channels == 3 else 32
        halvings = int(math.log2(min(height, width) / 4))        # down to about 4x4 pixels
        stages = max(1, min(3, halvings))

        layers = []
        cin = channels
        for stage in range(stages):
            cout = base << stage
            for stride in (1, 2):
                layers.append(nn.Conv2d(cin, cout, 3, stride, 1, bias=False))
                layers.append(nn.BatchNorm2d(cout))
                layers.append(nn.ReLU())
                cin = cout

        self.body = nn.Sequential(
            *layers,
            nn.AdaptiveAvgPool2d(4),                             # [N, cin, 4, 4]
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(16 * cin, self.FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(from_uint8(images))
        return features, self.head(features)


def augment(x: Tensor, reach: int, mirror: bool) -> Tensor:
    """A batch [N, C, H, W] shifted by up to `reach` pixels each way, all images alike, and mirrored if wanted."""
    height, width = x.shape[2:]
    top, left = torch.randint(2 * reach + 1, (2,)).tolist()
    padded = F.pad(x, (reach, reach, reach, reach))
    x = padded[:, :, top : top + height, left : left + width]
    return x.flip(-1) if mirror else x


def train_classifier(reference: Reference, device: torch.device) -> Classifier:
    """A classifier trained on shifted (and, in colour, mirrored) images.

    It takes a minute or two for grey images on two cores, ten for colour.
    """
    torch.manual_seed(0)
    fast = diffuser.pick_precision(diffuser.Config(), device) == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=fast)
    data = reference.train
    colour = data.images.shape[1] == 3
    classifier = Classifier(tuple(data.images.shape[1:]), len(data.class_names)).to(device)

    batch = 128
    steps_per_epoch = math.ceil(len(data.images) / batch)
    epochs = 12 if colour else max(4, 100_000 // len(data.images))
    steps = steps_per_epoch * epochs
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    reach = max(1, data.images.shape[-1] // 14)
    for step in tqdm(range(steps), f"training the judge on {reference.name}", disable=None):
        # Take the next batch of a new order in each epoch.
        position = step % steps_per_epoch
        if position == 0:
            order = torch.randperm(len(data.images))
        chosen = order[position * batch : (position + 1) * batch]
        x = data.images[chosen].to(device)
        y = data.labels[chosen].to(device)
        x = augment(x, reach, mirror=colour and step % 2 == 1)

        # Update the weights.
        with autocast:
            _, logits = classifier(x)
        F.cross_entropy(logits.float(), y, label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
    return classifier.eval()


@torch.no_grad()
def extract_features(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """The classifier's features of images uint8 [N, C, H, W], float64 [N, 128], and its choice of class, int64 [N]."""
    device = next(classifier.parameters()).device
    features = []
    choices = []
    for batch in images.split(500):
        batch_features, logits = classifier(batch.to(device))
        features.append(batch_features.cpu().double())
        choices.append(logits.argmax(1).cpu())
    return torch.cat(features), torch.cat(choices)


# ---- Distance ----------------------------------------------------------------------------------


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of features [N, D]."""
    return features.mean(0), features.T.cov()


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between two Gaussians, (mean [D], covariance [D, D]) each.

    Heusel et al. 2017, eq. 6.
    """
    m1, s1 = a
    m2, s2 = b

    # S1 S2 has the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * middle).item()


class ReferenceStats:
    """The classifier of a reference, trained or found in data_dir, and what it makes of the reference's own images.

    accuracy: on the test images; floor: the distance of all test images, nan for too few of them. Raises UserError for
    images without classes.
    """

    def __init__(self, reference: Reference, data_dir: str):
        self.class_names = reference.train.class_names
        require_classes(reference)
        self.classifier = load_or_train_classifier(reference, data_dir)

        train_features, _ = extract_features(self.classifier, reference.train.images)
        self.train_size = len(train_features)
        self.real = moments(train_features)
        self.test_features, choice = extract_features(self.classifier, reference.test.images)
        self.accuracy = (choice == reference.test.labels).double().mean().item()
        self.floor = math.nan
        if len(self.test_features) > Classifier.FEATURES:
            self.floor = frechet_distance(self.real, moments(self.test_features))

    def floor_of(self, n: int) -> float:
        """The distance of n test images, the mean of up to five draws: what n perfect images would score.

        n is at most the number of test images.
        """
        order = torch.randperm(len(self.test_features), generator=torch.Generator().manual_seed(0))
        whole_draws = [draw for draw in order.split(n) if len(draw) == n]
        draws = whole_draws[:5]
        distances = [frechet_distance(self.real, moments(self.test_features[draw])) for draw in draws]
        return sum(distances) / len(draws)

    def scores(self, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """accuracy (only with labels int64 [N]) and distance (only of enough images) of images uint8 [N, C, H, W]."""
        features, choice = extract_features(self.classifier, images)
        scores = {}
        if labels is not None:
            scores["accuracy"] = (choice == labels).double().mean().item()
        if min(len(images), self.train_size) > Classifier.FEATURES:
            scores["distance"] = frechet_distance(self.real, moments(features))
        return scores


def require_classes(reference: Reference) -> None:
    """Raise UserError for images without classes."""
    if len(reference.train.class_names) < 2:
        raise UserError(f"{reference.name} has no classes to train a judge on: use --metrics fid")


def load_or_train_classifier(reference: Reference, data_dir: str) -> Classifier:
    """The classifier kept in data_dir for these very images, else a new one, which is kept there. Raises UserError."""
    shape = tuple(reference.train.images.shape[1:])
    size = "x".join(map(str, shape))
    digest = reference.train.digest()[:12]
    path = Path(data_dir, f"judge_{reference.name}_{digest}_{size}.pt")
    device = diffuser.pick_device("auto")

    if path.exists():
        classifier = Classifier(shape, len(reference.train.class_names)).to(device).eval()
        weights = read_tensors(str(path))
        try:
            classifier.load_state_dict(weights)
        except Exception as error:                               # anything may be in it
            raise UserError(f"{path} is no judge of {reference.name}: remove it, and a new one is trained") from error
        return classifier

    # A folder of datasets may well be for reading only.
    can_keep = True
    try:
        require_writable(path, "--data_dir")
    except UserError as error:
        if not Path(data_dir).is_dir():
            raise
        warn(f"evaluate: {error}, or the judge is trained anew each time")
        can_keep = False

    classifier = train_classifier(reference, device)
    if can_keep:
        write = partial(diffuser.write_tensors, classifier.state_dict())
        warn_on_oserror(f"the judge, {path},", lambda: write_atomically(path, write))
    return classifier


def labels_in_reference(generated: ImageData, class_names: list[str]) -> Tensor | None:
    """The labels of a folder of images by the reference's numbers, int64 [N]; None where it has other classes."""
    numbers = {name: i for i, name in enumerate(file_names(class_names))}
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
    scores["judge's own accuracy"] = stats.accuracy
    return scores


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
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the Inception network could not be loaded ({reason}): give its weights as torch-fidelity has "
                        "them with --weights", code=1) from error


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
    parser.add_argument("folder", nargs="?", help="folder or ZIP of images to score")
    parser.add_argument("--against", default="", metavar="NAME|PATH", help="dataset, folder or ZIP of real images")
    parser.add_argument("--metrics", default="", metavar="NAME,NAME",
                        help="judge, fid, kid, is, pr [judge for named datasets, else fid]")
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
    usual = "judge" if args.against in diffuser.DATASETS else "fid"
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


def too_few_for(metric: str, generated: int, real: int, args: argparse.Namespace) -> str:
    """Why a metric cannot be computed from so many generated and real images; empty where it can be.

    The judge makes two of them, accuracy and distance.
    """
    width = Classifier.FEATURES
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
        trained_on = real - real // 6
        if trained_on < 10:
            return f"{real} real images are too few to train a judge on: it needs 12"
        real = trained_on
    if generated < least:
        return f"{generated} images are too few for {title}: it needs {least}, since {why}"
    if metric not in ("accuracy", "is") and real < least:
        return f"{real} real images are too few for {title}: it needs {least}, since {why}"
    return ""


def choose_possible(metrics: list[str], generated: int, real: int, args: argparse.Namespace) -> list[str]:
    """The metrics that so many images are enough for; says which are left out. Raises UserError where all are."""
    problems = {metric: too_few_for(metric, generated, real, args) for metric in metrics}
    possible = [metric for metric, problem in problems.items() if not problem]
    left_out = [problem for problem in problems.values() if problem]
    if not possible:
        raise UserError("\n".join(dict.fromkeys(left_out)))
    for problem in left_out:
        warn(f"evaluate: left out: {problem}")
    return possible


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """The figures that the command line asks for, by name. Raises UserError."""
    if args.num_images < 1 or args.kid_subset_size < 2:
        raise UserError("--num_images has to be at least 1, --kid_subset_size at least 2")
    if args.bpd:
        return checkpoint_bpd(args.bpd, args.data_dir, args.num_images)
    if not args.folder or not args.against:
        raise UserError("name a folder of images and what to hold them --against: evaluate.py DIR --against mnist")

    # Counts and packages first: reading, training a judge and Inception take their time.
    wanted = choose_metrics(args)
    inception = [name for name in wanted if name in METRICS]
    if inception:
        require_inception(inception, args.weights)
    metrics = choose_possible(wanted, len(find_images(args.folder)), count_reference(args.against), args)
    inception = [name for name in metrics if name in METRICS]

    generated = read_images(args.folder)
    reference = load_reference(args.against, args.data_dir, tuple(generated.images.shape[1:]))
    figures: dict[str, float] = {"images": len(generated.images)}
    if "accuracy" in metrics:
        require_classes(reference)
        if labels_in_reference(generated, reference.train.class_names) is None:
            problem = f"accuracy needs the classes of {reference.name} in names of files (000012_cat.png) or folders"
            if metrics == ["accuracy"]:
                raise UserError(f"{problem}; a distance needs {Classifier.FEATURES + 1} images")
            warn(f"evaluate: left out: {problem}")
        stats = ReferenceStats(reference, args.data_dir)
        figures |= classifier_scores(generated, stats)
    if inception:
        real = reference.everything().images
        figures |= inception_scores(generated.images, real, inception, args.weights, args.features,
                                    args.kid_subset_size)
    return figures


def run(args: argparse.Namespace) -> None:
    """Print what the command line asks for, and write it to a file where one is given. Raises UserError, OSError."""
    start_time = time.perf_counter()
    if args.json:
        require_writable(args.json, "--json")
    figures = evaluate(args)
    for name, value in figures.items():
        print(f"{name:40} {value:.5g}")
    print(f"{'seconds':40} {time.perf_counter() - start_time:.0f}")
    if args.json:
        write_json(Path(args.json), figures)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    explain = partial(diffuser.explain, remedy="give fewer images at a time, or close other programs")
    return run_script("evaluate", lambda: build_parser().parse_args(argv), run, explain)


if __name__ == "__main__":
    end_process(main)
