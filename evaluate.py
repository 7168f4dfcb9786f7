#!/usr/bin/env python3
"""evaluate: score generated images against a dataset or another folder.

    python evaluate.py out --against mnist                          class accuracy and Frechet distance, no download
    python evaluate.py out --against cifar10 --metrics fid,kid,is,pr  Inception metrics, by torch-fidelity
    python evaluate.py out --against other_folder.zip --metrics fid --weights inception.pth
    python evaluate.py --bpd checkpoint.pt                          bits per dimension of a model's held-out images

DIR is a folder as `diffuser.py --mode inference --save_dir DIR` leaves it, or any folder or ZIP of images. The judge
is a small classifier, trained once on the reference and kept in --data_dir: class accuracy is the share of images
that it takes for the class in their file name, the distance is that of Heusel et al. 2017 between its features. Its
floor is the distance that real images outside the training set have.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import diffuser
from diffuser import ImageData, UserError

# ------------------------------------------------------------------------------------------------
# Images


@dataclass
class Reference:
    """The real images: what a judge is trained on, and others to test it with."""

    name: str
    train: ImageData
    test: ImageData
    own_test: bool = False

    def everything(self) -> ImageData:
        """The training images; all images where the set was divided here."""
        if self.own_test:
            return self.train
        images, labels = (torch.cat([getattr(part, name) for part in (self.train, self.test)])
                          for name in ("images", "labels"))
        return ImageData(images, labels, self.train.class_names)


def read_images(path: str, shape: tuple[int, int, int] | None = None) -> ImageData:
    """All images of a folder or ZIP (of DIR/images, where there is one), uint8 [N, C, H, W]; the label is the class
    in a name such as 000012_cat.png, else the folder's. shape: (C, H, W), by default the first image's own."""
    try:
        files = diffuser.ImageFiles(str(Path(path, "images")) if Path(path, "images").is_dir() else path)
    except UserError:
        raise UserError(f"{path} is no folder or ZIP file with images in it") from None
    if shape is None:
        try:
            with files[0][0] as first:
                shape = files.guess_channels(), first.height, first.width
        except Exception as error:                                           # broken files raise errors of every kind
            raise UserError(f"{files.names[0]} in {path} cannot be read ({diffuser.first_line(error)})") from error
    decoder = diffuser.Decoder(files, shape)
    items = [decoder[i] for i in tqdm(range(len(files)), "reading", leave=False, disable=None)]
    for name, item in zip(files.names, items, strict=True):
        if isinstance(item, str):
            raise UserError(f"{name} in {path} cannot be read ({item}): remove it")
    images = torch.stack([torch.from_numpy(image) for image, _ in items])
    if files.class_names:
        return ImageData(images, torch.tensor(files.labels), files.class_names)
    named = [name.rpartition("/")[2].rpartition(".")[0].partition("_")[2] for name in files.names]
    names = sorted(set(named)) if all(named) else []
    return ImageData(images, torch.tensor([names.index(n) if names else 0 for n in named]), names)


def load_reference(against: str, data_dir: str, shape: tuple[int, int, int]) -> Reference:
    """The dataset of that name, or the folder or ZIP there, its images in the given shape; one image in six is for
    testing where the dataset has no test part of its own."""
    if against not in diffuser.DATASETS or against == "folder":
        data = read_images(against, shape)
        return Reference(Path(against).stem, *divide(data))
    data = diffuser.load_data(diffuser.configure(dataset=against, data_dir=data_dir, channels=shape[0],
                                                 img_size=tuple(shape[1:]), channel_mults=(1,)))
    test = {"mnist": "MNIST", "cifar10": "CIFAR10"}.get(against)
    if test is None or tuple(shape) != diffuser.DATASETS[against].shape:
        return Reference(against, *divide(data))
    cfg = diffuser.configure(data_dir=data_dir)
    raw = diffuser.torchvision_dataset(test, cfg, f"the files of {test}", "", train=False)
    images = torch.as_tensor(raw.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Reference(against, data, ImageData(images, torch.as_tensor(raw.targets), data.class_names), own_test=True)


def divide(data: ImageData) -> tuple[ImageData, ImageData]:
    """Five sixths and one sixth of the images, the same ones every time."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    parts = order[len(order) // 6 :], order[: len(order) // 6]
    return tuple(ImageData(data.images[i], data.labels[i], data.class_names) for i in parts)


# ------------------------------------------------------------------------------------------------
# The judge


def read_tensors(path: str) -> dict:
    """The tensors in a file; nothing in it is executed. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                               # torch raises many kinds here
        raise UserError(f"{path} is not a readable file of tensors ({type(error).__name__})") from error


class Judge(nn.Module):
    """A small convolutional classifier: uint8 [N, C, H, W] -> (features [N, 128], logits [N, classes])."""

    FEATURES = 128

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        width, cin, layers = (64 if shape[0] == 3 else 32), shape[0], []
        stages = max(1, min(3, int(math.log2(min(shape[1:]) / 4))))          # down to about 4x4 pixels
        for stage in range(stages):
            for stride in (1, 2):
                cout = width << stage
                layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
                cin = cout
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3),
                                  nn.Linear(16 * cin, self.FEATURES), nn.ReLU())
        self.head = nn.Linear(self.FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(diffuser.from_uint8(images))
        return features, self.head(features)


def train_judge(reference: Reference, device: torch.device) -> Judge:
    """A judge trained on shifted (and, in colour, mirrored) images: a minute or two for grey ones on two cores, ten
    for colour."""
    torch.manual_seed(0)
    fast = diffuser.precisions(diffuser.Config(), device) == ["bf16"]
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=fast)
    data, batch = reference.train, 128
    judge = Judge(tuple(data.images.shape[1:]), len(data.class_names)).to(device)
    per_epoch = math.ceil(len(data.images) / batch)
    steps = per_epoch * (12 if data.images.shape[1] == 3 else max(4, 100_000 // len(data.images)))
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    reach = max(1, data.images.shape[-1] // 14)
    for step in tqdm(range(steps), f"training the judge on {reference.name}", disable=None):
        if step % per_epoch == 0:
            order = torch.randperm(len(data.images))
        chosen = order[step % per_epoch * batch :][:batch]
        x, y = data.images[chosen].to(device), data.labels[chosen].to(device)
        height, width = x.shape[2:]
        top, left = torch.randint(2 * reach + 1, (2,)).tolist()
        x = F.pad(x, (reach,) * 4)[:, :, top : top + height, left : left + width]
        x = x.flip(-1) if x.shape[1] == 3 and step % 2 else x
        with bf16:
            logits = judge(x)[1]
        F.cross_entropy(logits.float(), y, label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def look(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """The judge's features, float64 [N, 128], and its choice of class, int64 [N]."""
    device = next(judge.parameters()).device
    seen = [judge(batch.to(device)) for batch in images.split(500)]
    return torch.cat([f.cpu().double() for f, _ in seen]), torch.cat([logits.argmax(1).cpu() for _, logits in seen])


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of features [N, D]."""
    return features.mean(0), features.T.cov()


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between two Gaussians, (mean [D], covariance [D, D]) each
    (Heusel et al. 2017, eq. 6)."""
    (m1, s1), (m2, s2) = a, b
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * middle).item()


class Court:
    """The judge of a reference, trained or found in data_dir, with the reference's own figures."""

    def __init__(self, reference: Reference, data_dir: str):
        shape, self.class_names = tuple(reference.train.images.shape[1:]), reference.train.class_names
        device, key = diffuser.pick_device("auto"), f"{reference.train.digest()[:12]}_{'x'.join(map(str, shape))}"
        path = Path(data_dir, f"judge_{reference.name}_{key}.pt")
        if len(self.class_names) < 2:
            raise UserError(f"{reference.name} has no classes to train a judge on: use --metrics fid")
        if path.exists():
            self.judge = Judge(shape, len(self.class_names)).to(device).eval()
            self.judge.load_state_dict(read_tensors(str(path)))
        else:
            self.judge = train_judge(reference, device)
            diffuser.write_atomically(path, lambda file: torch.save(self.judge.state_dict(), file))
        self.real = moments(look(self.judge, reference.train.images)[0])
        self.test_features, choice = look(self.judge, reference.test.images)
        self.accuracy = (choice == reference.test.labels).double().mean().item()
        self.floor = frechet_distance(self.real, moments(self.test_features))

    def floor_of(self, n: int) -> float:
        """The distance of n test images, the mean of up to five draws: what n perfect images would score. n is at
        most the number of test images."""
        order = torch.randperm(len(self.test_features), generator=torch.Generator().manual_seed(0))
        draws = [part for part in order.split(n) if len(part) == n][:5]
        return sum(frechet_distance(self.real, moments(self.test_features[d])) for d in draws) / len(draws)

    def scores(self, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """accuracy (only with labels int64 [N]) and distance of images uint8 [N, C, H, W]. Raises UserError for
        fewer images than the covariance of the features needs."""
        if len(images) <= Judge.FEATURES:
            raise UserError(f"{len(images)} images are too few for a Frechet distance over {Judge.FEATURES} features: "
                            f"their covariance would be singular; give at least {Judge.FEATURES + 1}, better 1,000")
        features, choice = look(self.judge, images)
        named = {} if labels is None else {"accuracy": (choice == labels).double().mean().item()}
        return {**named, "distance": frechet_distance(self.real, moments(features))}


def judge_folder(generated: ImageData, court: Court) -> dict[str, float]:
    """What the judge says of a folder of images, beside what it says of real ones."""
    names = {diffuser.file_name(name): i for i, name in enumerate(court.class_names)}
    known = generated.class_names and set(generated.class_names) <= set(names)
    labels = torch.tensor([names[n] for n in generated.class_names])[generated.labels] if known else None
    count = min(len(generated.images), len(court.test_features))
    return {**court.scores(generated.images, labels), "floor": court.floor,
            f"floor of {count} images": court.floor_of(count), "judge's own accuracy": court.accuracy}


# ------------------------------------------------------------------------------------------------
# Inception metrics, by torch-fidelity

METRICS = {"fid": "fid", "kid": "kid", "is": "isc", "pr": "prc"}             # ours, torch-fidelity's


class Colour(torch.utils.data.Dataset):
    """uint8 [N, C, H, W] as uint8 [3, H, W] items."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].expand(3, -1, -1)


def inception_scores(generated: Tensor, real: Tensor, metrics: list[str], weights: str, features: int,
                     subset: int) -> dict[str, float]:
    """FID, KID (subsets of `subset` images), Inception Score, precision and recall of images uint8 [N, C, H, W].
    features: width of the layer, 64, 192, 768 or 2048 (the usual one). Raises UserError for too few images."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError(f"{', '.join(metrics)} need torch-fidelity: pip install torch-fidelity")
    need = {"fid": (features + 1, f"its covariance has {features} dimensions"),
            "kid": (subset, "its subsets are that large (--kid_subset_size)"),
            "is": (100, "it averages over ten parts"), "pr": (100, "it looks for nearest neighbours")}
    for metric in metrics:
        least, why = need[metric]
        counted = [len(generated)] if metric == "is" else [len(generated), len(real)]
        if min(counted) < least:
            raise UserError(f"{min(counted)} images are too few for {metric}: it needs {least}, since {why}")
    if weights:
        read_tensors(weights)                                                # torch-fidelity would run its code
    from torch_fidelity import calculate_metrics

    layers = {f"feature_layer_{m}": str(features) for m in ("fid", "kid", "prc")}
    asked = {METRICS[m]: True for m in metrics}
    try:
        return calculate_metrics(
            input1=Colour(generated), input2=Colour(real), **asked, **layers, kid_subset_size=subset, verbose=False,
            feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights or None,
            cuda=torch.cuda.is_available(), batch_size=50, save_cpu_ram=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the Inception network could not be loaded ({reason}): give its weights as torch-fidelity has "
                        "them with --weights", code=1) from error


# ------------------------------------------------------------------------------------------------
# The variational bound


def discretised_nll(x0: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """-log P(x0) under a Gaussian cut into the 256 levels of [-1, 1], the outer ones open (DDPM, eq. 13), in nats."""
    upper, lower = ((x0.double() + half - mean) / sigma for half in (1 / 255, -1 / 255))
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    return -torch.where(x0 < -0.999, torch.special.log_ndtr(upper),
                        torch.where(x0 > 0.999, torch.special.log_ndtr(-lower), inside))


def gaussian_kl(mean1: Tensor, var1: float, mean2: Tensor | float, var2: float) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    return 0.5 * (math.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


@torch.no_grad()
def bits_per_dimension(denoise: Callable, x0: Tensor, alpha_bar: Tensor, variance: str = "small",
                       noise: Callable = torch.randn_like, tick: Callable = lambda: None) -> dict:
    """The variational bound on -log2 p(x0) per dimension (DDPM, eq. 5), as improved-diffusion's calc_bpd_loop has it.

    denoise: (xt, t) -> (x0_hat, eps_hat), on whatever device; x0: [N, C, H, W] in [-1, 1] on the CPU, as is noise(x0);
    alpha_bar: float64 [T], T > 1; variance: of p(x_{t-1} | x_t), small or large as for --variance. Returns total,
    prior and terms (list, t = 0 first).
    """
    bar = [1.0, *alpha_bar.tolist()]                                         # bar[t + 1] is alpha_bar_t
    beta = [1 - b / a for a, b in zip(bar, bar[1:])]
    posterior = [beta[t] * (1 - bar[t]) / (1 - bar[t + 1]) for t in range(len(beta))]  # DDPM, eq. 7
    var = [posterior[1], *(beta if variance == "large" else posterior)[1:]]  # at t = 0 the posterior has none
    terms = []
    for t in reversed(range(len(beta))):
        xt = math.sqrt(bar[t + 1]) * x0 + math.sqrt(1 - bar[t + 1]) * noise(x0)
        x0_hat = denoise(xt, t)[0].cpu().double()
        to_x0 = math.sqrt(bar[t]) * beta[t] / (1 - bar[t + 1])
        mean = to_x0 * x0_hat + math.sqrt(1 - beta[t]) * (1 - bar[t]) / (1 - bar[t + 1]) * xt
        nats = (gaussian_kl(mean + to_x0 * (x0 - x0_hat), posterior[t], mean, var[t]) if t else
                discretised_nll(x0, mean, math.sqrt(var[0])))
        terms.append(nats.mean().item() / math.log(2))
        tick()
    prior = gaussian_kl(math.sqrt(bar[-1]) * x0.double(), 1 - bar[-1], 0.0, 1.0).mean().item() / math.log(2)
    return dict(total=sum(terms) + prior, prior=prior, terms=terms[::-1])


def checkpoint_bpd(path: str, data_dir: str, count: int, batch: int = 250) -> dict[str, float]:
    """The bound for the model in a checkpoint given the class of each image, in float32, over `count` of the images
    that it was not trained on."""
    model = diffuser.load(path, data_dir=data_dir, guidance_scale=0.0, precision="fp32")
    cfg = model.config
    if cfg.dataset == "folder":
        raise UserError(f"{path} was trained on a folder of images: --bpd is for named datasets")
    data = diffuser.load_data(cfg)
    held_out = diffuser.split(data, cfg.val_fraction)[1][:count]
    if not len(held_out):
        raise UserError(f"{path} was trained with --val_fraction 0: no image is left to test it with")
    random, total, prior, last = diffuser.generator(cfg.seed, diffuser.STREAM_VALIDATION), 0.0, 0.0, 0.0
    with tqdm(total=cfg.timesteps * math.ceil(len(held_out) / batch), desc="bound", leave=False, disable=None) as bar:
        for part in held_out.split(batch):
            denoise = model.denoiser(data.labels[part].to(model.device), cfg)
            bound = bits_per_dimension(
                lambda xt, t, denoise=denoise: denoise(xt.to(model.device), t), diffuser.from_uint8(data.images[part]),
                model.diffusion.alpha_bar, cfg.variance, lambda x: torch.randn(x.shape, generator=random), bar.update)
            share = len(part) / len(held_out)
            total, prior = total + share * bound["total"], prior + share * bound["prior"]
            last += share * bound["terms"][0]
    return {"bits per dimension": total, "of these the prior": prior, "of these t = 0": last, "images": len(held_out)}


# ------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__.partition("\n")[0], allow_abbrev=False,
                                     epilog=__doc__.partition("\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder or ZIP of images to score")
    parser.add_argument("--against", default="", help="dataset, folder or ZIP of real images")
    parser.add_argument("--metrics", default="", help="judge, fid, kid, is, pr [judge for named datasets, else fid]")
    parser.add_argument("--bpd", default="", metavar="CKPT", help="bits per dimension of the model in this checkpoint")
    parser.add_argument("--num_images", type=int, default=1000, help="held-out images for --bpd, at most [1000]")
    parser.add_argument("--data_dir", default="data", help="where datasets are and the judge is kept [data]")
    parser.add_argument("--weights", default="", help="Inception weights [torch-fidelity downloads them]")
    parser.add_argument("--features", type=int, default=2048, choices=(64, 192, 768, 2048),
                        help="width of the Inception layer for fid, kid, pr [2048]")
    parser.add_argument("--kid_subset_size", type=int, default=1000, help="images in a subset for kid [1000]")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    return parser


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """What the command line asks for. Raises UserError."""
    if args.num_images < 1 or args.kid_subset_size < 2:
        raise UserError("--num_images and --kid_subset_size must be positive")
    if args.bpd:
        return checkpoint_bpd(args.bpd, args.data_dir, args.num_images)
    if not args.folder or not args.against:
        raise UserError("name a folder of images and what to hold them --against: evaluate.py DIR --against mnist")
    usual = "judge" if args.against in diffuser.DATASETS else "fid"
    metrics = [m.strip() for m in (args.metrics or usual).split(",")]
    unknown = [m for m in metrics if m not in ("judge", *METRICS)]
    if unknown:
        raise UserError(f"--metrics {unknown[0]}: choose from judge, {', '.join(METRICS)}")
    generated = read_images(args.folder)
    reference = load_reference(args.against, args.data_dir, tuple(generated.images.shape[1:]))
    found: dict[str, float] = {"images": len(generated.images)}
    if "judge" in metrics:
        found |= judge_folder(generated, Court(reference, args.data_dir))
    inception = [m for m in metrics if m != "judge"]
    if inception:
        real = reference.everything().images
        found |= inception_scores(generated.images, real, inception, args.weights, args.features, args.kid_subset_size)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        args = build_parser().parse_args(argv)
        started = time.perf_counter()
        found = evaluate(args)
        for name, value in found.items():
            print(f"{name:40} {value:.5g}")
        print(f"{'seconds':40} {time.perf_counter() - started:.0f}")
        if args.json:
            diffuser.write_json(Path(args.json), found)
        return 0
    except (UserError, OSError) as error:
        print("evaluate:", error, file=sys.stderr)
        return getattr(error, "code", 1)


if __name__ == "__main__":
    sys.exit(main())
