"""How good drawn images are: a network that was trained on real ones judges them.

Classifiers   Classifier, train_classifier; random_network, where there are no classes to train one on
Features      extract_features
Figures       moments, frechet_distance, precision_and_recall
All of it     Reference: the real images; ReferenceStats: their classifier, which scores other images

Needs torch and tqdm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from diffuser_lib.cpu_kernels import keep_freed_memory
from diffuser_lib.files import (
    UserError,
    hold_lock,
    lock_holder,
    require_writable,
    warn,
    warn_on_oserror,
    write_atomically,
)
from diffuser_lib.images import ImageData, Shape, file_name, from_uint8
from diffuser_lib.tensors import read_tensors, write_tensors

# ---- Classifiers -------------------------------------------------------------------------------

FEATURES = 128                                                   # of an image, before the last layer


def grey_body(shape: Shape) -> nn.Sequential:
    """Plain strided convolutions: grey [N, 1, H, W] -> [N, C]. They suffice for digits and the like."""
    cin, height, width = shape
    halvings = int(math.log2(min(height, width) / 4))            # down to about 4x4 pixels
    stages = max(1, min(3, halvings))

    layers = []
    for stage in range(stages):
        cout = 32 << stage
        for stride in (1, 2):
            layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
            cin = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * cin, FEATURES))


class Residual(nn.Module):
    """x + f(x), with f two convolutions, each with its norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def convolution(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout),
                         nn.ReLU())


def colour_body(shape: Shape) -> nn.Sequential:
    """A residual network of nine layers: colour [N, 3, H, W] -> [N, C]. Larger images begin with a stride."""
    channels, height, width = shape
    stride = max(1, min(height, width) // 32)
    halve = partial(nn.MaxPool2d, 2, ceil_mode=True)
    return nn.Sequential(
        convolution(channels, 32, kernel=2 * stride + 1, stride=stride),     # [N, 32, 32, 32] from 32x32 pixels
        convolution(32, 64), halve(), Residual(64),                          # [N, 64, 16, 16]
        convolution(64, 128), halve(),                                       # [N, 128, 8, 8]
        convolution(128, 256), halve(), Residual(256),                       # [N, 256, 4, 4]
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, FEATURES),
    )


class Classifier(nn.Module):
    """A small convolutional classifier: uint8 [N, C, H, W] -> (features [N, 128], logits [N, classes])."""

    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        self.body = grey_body(shape) if shape[0] == 1 else colour_body(shape)
        self.body.append(nn.ReLU())
        self.head = nn.Linear(FEATURES, classes)

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


def train_classifier(data: ImageData, name: str, device: torch.device, bf16: bool) -> Classifier:
    """A classifier trained on shifted (and, in colour, mirrored) images; bf16: whether that is fast on the device.

    It takes about a minute for MNIST on two cores, and up to a quarter of an hour for CIFAR-10.
    """
    torch.manual_seed(0)
    if device.type == "cpu":
        keep_freed_memory()
    colour = data.images.shape[1] == 3
    classifier = Classifier(tuple(data.images.shape[1:]), len(data.class_names)).to(device)
    classifier.to(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    batch = 128
    steps_per_epoch = max(1, len(data.images) // batch)          # others wait for the next epoch
    least, images_seen = (8, 30_000) if colour else (4, 100_000)
    epochs = max(least, min(200, images_seen // len(data.images)))
    steps = steps_per_epoch * epochs
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01, fused=device.type in ("cpu", "cuda"))
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)

    reach = max(1, data.images.shape[-1] // 14)
    for step in tqdm(range(steps), f"training the judge on {name}", disable=None):
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


def random_network(data: ImageData, device: torch.device) -> Classifier:
    """A Classifier that was never trained, the same one each time, normalized on some of the images.

    The features of a random network tell images apart, too, though not as people do (2002.09797, sec. 4).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(tuple(data.images.shape[1:]), max(1, len(data.class_names)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None                               # the mean over all that it is shown

    chosen = torch.linspace(0, len(data.images) - 1, min(1000, len(data.images))).long()
    network.train().to(device)
    with torch.no_grad():
        for batch in chosen.chunk(math.ceil(len(chosen) / 250)):
            network(data.images[batch].to(device))
    return network.eval()


# ---- Features ----------------------------------------------------------------------------------


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


# ---- Figures -----------------------------------------------------------------------------------


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
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * middle
    return max(distance.item(), 0.0)                             # rounding may lead below; nan stays nan


def share_within(points: Tensor, of: Tensor, k: int) -> float:
    """The share of points [N, D] that lie in the manifold of others [M, D]: nearer to one than its k-th neighbour."""
    inside = torch.zeros(len(points), dtype=torch.bool)
    for part in of.split(1000):
        radius = torch.cdist(part, of).kthvalue(k + 1, dim=1).values         # it is its own nearest
        inside |= (torch.cdist(points, part) <= radius).any(1)
    return inside.double().mean().item()


def precision_and_recall(drawn: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """How many drawn images look real, and how many real ones are covered, by features [N, D] of equally many.

    Kynkaanniemi et al. 2019 (1904.06991, eq. 1 and 2).
    """
    return share_within(drawn, real, k), share_within(real, drawn, k)


# ---- All of it ---------------------------------------------------------------------------------


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


def fixed_order(n: int) -> Tensor:
    """The numbers 0 to n - 1 in a mixed order, the same one every time: int64 [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def divide(data: ImageData) -> tuple[ImageData, ImageData]:
    """Five sixths and one sixth of the images, the same ones every time."""
    order = fixed_order(len(data.images))
    test_size = len(order) // 6
    train = order[test_size:]
    test = order[:test_size]
    return (ImageData(data.images[train], data.labels[train], data.class_names),
            ImageData(data.images[test], data.labels[test], data.class_names))


class ReferenceStats:
    """The classifier of a reference, trained or found in data_dir, and what it makes of the reference's own images.

    Images without classes are judged by a random network. accuracy: on the test images, nan without classes; floor: the
    distance of all test images, nan for too few of them. Raises UserError where data_dir cannot be used.
    """

    def __init__(self, reference: Reference, data_dir: str, device: torch.device, bf16: bool = False):
        self.class_names = reference.train.class_names
        self.has_classes = len(self.class_names) >= 2
        if self.has_classes:
            self.classifier = load_or_train_classifier(reference, data_dir, device, bf16)
        else:
            self.classifier = random_network(reference.train, device)

        self.train_features, _ = extract_features(self.classifier, reference.train.images)
        self.real = moments(self.train_features)
        self.test_features, choice = extract_features(self.classifier, reference.test.images)
        self.accuracy = math.nan
        if self.has_classes:
            self.accuracy = (choice == reference.test.labels).double().mean().item()
        self.floor = math.nan
        if len(self.test_features) > FEATURES:
            self.floor = frechet_distance(self.real, moments(self.test_features))

    def floor_of(self, n: int) -> float:
        """The distance of n test images, the mean of up to five draws: what n perfect images would score.

        n is at most the number of test images.
        """
        order = fixed_order(len(self.test_features))
        whole_draws = [draw for draw in order.split(n) if len(draw) == n]
        draws = whole_draws[:5]
        distances = [frechet_distance(self.real, moments(self.test_features[draw])) for draw in draws]
        return sum(distances) / len(draws)

    def scores(self, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """accuracy (only with labels int64 [N]), distance (only of enough images), precision and recall.

        images: uint8 [N, C, H, W]. Precision and recall are those against as many training images, 10,000 at most.
        """
        features, choice = extract_features(self.classifier, images)
        scores = {}
        if labels is not None and self.has_classes:
            scores["accuracy"] = (choice == labels).double().mean().item()
        n = min(len(images), len(self.train_features), 10_000)
        if n > FEATURES:
            scores["distance"] = frechet_distance(self.real, moments(features))
            drawn = features[fixed_order(len(features))[:n]]
            real = self.train_features[fixed_order(len(self.train_features))[:n]]
            scores["precision"], scores["recall"] = precision_and_recall(drawn, real)
        return scores


def load_or_train_classifier(reference: Reference, data_dir: str, device: torch.device, bf16: bool) -> Classifier:
    """The classifier kept in data_dir for images of this digest, else a new one, to be kept there. Raises UserError."""
    shape = tuple(reference.train.images.shape[1:])
    size = "x".join(map(str, shape))
    digest = reference.train.digest()[:12]
    kind = "" if shape[0] == 1 else "_residual"
    path = Path(data_dir, f"judge_{file_name(reference.name)}_{digest}_{size}{kind}.pt")

    def read() -> Classifier:
        classifier = Classifier(shape, len(reference.train.class_names)).to(device).eval()
        try:
            classifier.load_state_dict(read_tensors(str(path)))
        except Exception as error:                               # anything may be in it
            raise UserError(f"{path} is no judge of {reference.name}: remove it, and a new one is trained") from error
        return classifier

    if path.exists():
        return read()

    # A folder of datasets may well be for reading only.
    try:
        require_writable(path, "--data_dir")
    except UserError as error:
        if not Path(data_dir).is_dir():
            raise
        warn(f"{error}, or the judge is trained anew each time")
        return train_classifier(reference.train, reference.name, device, bf16)

    # Two that want the same judge train it once.
    if lock_holder(path) is not None:
        print(f"waiting for another process, which is training {path}", flush=True)
    with hold_lock(path, "--data_dir", "", patience=-1):
        if path.exists():
            return read()
        classifier = train_classifier(reference.train, reference.name, device, bf16)
        write = partial(write_tensors, classifier.state_dict())
        warn_on_oserror(f"the judge, {path},", lambda: write_atomically(path, write))
    return classifier
