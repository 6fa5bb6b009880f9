"""What a student is to learn from a teacher, besides the labels: one module per method.

A distiller is built from an example output of student and teacher, and called with the
:class:`~ses_lab.models.Outputs` of both on the same batch, of N samples each; it returns a ()
tensor. The teacher's gets no gradient. Stages may differ in number (those evenly spaced up to the
last are paired), in width and in size (the larger map is averaged down to the smaller); tokens
(N, T, D) are the map of their patches, without the class token, and features (N, D) a map of one
pixel. Default weights, but that of FitNets, are those with which Tian et al. (ICLR 2020) compare
the methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ses_lab.models import Outputs


def as_map(x: Tensor) -> Tensor:
    """(N, C, H, W), tokens (N, T, D) or features (N, D) -> (N, C, H, W).

    T is a square, or one more for a class token, which is dropped; ValueError otherwise.
    """
    if x.dim() == 4:
        return x
    if x.dim() == 2:
        return x[:, :, None, None]
    tokens = x.shape[1] if x.dim() == 3 else 0
    side = math.isqrt(tokens)
    if not side or tokens - side**2 > 1:
        raise ValueError(
            "a stage is (N, C, H, W), (N, D), or (N, T, D) with a square of tokens and at most a "
            f"class token before it; got {tuple(x.shape)}"
        )
    return x[:, tokens - side**2 :].mT.unflatten(2, (side, side))


def pairs(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """[(N, C_s, H, W), (N, C_t, H, W)]: stages of both at the same depth and of the same size."""
    n = min(len(student.stages), len(teacher.stages))
    if not n:
        raise ValueError("student and teacher need stages; pass stages= to an imported model")
    paired = []
    for i in range(1, n + 1):
        s, t = (as_map(x[i * len(x) // n - 1]) for x in (student.stages, teacher.stages))
        size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
        paired.append((F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t.detach(), size)))
    return paired


def _spatial(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """The pairs as (N, C, positions), without those of one position, whose maps are all equal."""
    found = [
        (s.flatten(2), t.flatten(2)) for s, t in pairs(student, teacher) if s[0, 0].numel() > 1
    ]
    if not found:
        raise ValueError("this distiller compares maps, and no pair of stages has two positions")
    return found


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    """x / norm, zero where x is; F.normalize would have a gradient of 1e12 there."""
    return x / torch.where(norm > 0, norm, 1)


class Distiller(nn.Module):
    """Base of the distillers. Train the parameters that require a gradient with the student's."""

    def __init__(self, student: Outputs, teacher: Outputs, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def prepare(self, teacher: Iterable[Outputs]) -> None:
        """Trains on outputs of the teacher what a method trains before the student, if anything."""

    def forward(self, student: Outputs, teacher: Outputs) -> Tensor:
        return self.weight * self.loss(student, teacher)


class KD(Distiller):
    """T^2 KL(softmax(teacher / T), softmax(student / T)), mean over the batch.

    Hinton, Vinyals & Dean (2015), whose cross-entropy with the soft targets has the same gradient.
    """

    def __init__(
        self, student: Outputs, teacher: Outputs, *, temperature: float = 4.0, weight: float = 1.0
    ) -> None:
        super().__init__(student, teacher, weight)
        if student.logits.shape != teacher.logits.shape:
            shapes = tuple(student.logits.shape), tuple(teacher.logits.shape)
            raise ValueError(f"kd needs logits of the same classes, got shapes {shapes}")
        self.temperature = temperature

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        s, t = (x.div(self.temperature).log_softmax(1) for x in (student.logits, teacher.logits))
        return self.temperature**2 * F.kl_div(s, t.detach(), log_target=True, reduction="batchmean")


class FitNets(Distiller):
    """Mean squared error of a regressor from the student's middle stage to the teacher's.

    Romero et al. (ICLR 2015), with the mean for their half sum, a 1 x 1 convolution as regressor,
    and the hint during the whole training rather than in a stage before it. The loss has the scale
    of the teacher's features squared, about 100 in a deep residual network: hence the weight of 1.
    """

    def __init__(self, student: Outputs, teacher: Outputs, *, weight: float = 1.0) -> None:
        super().__init__(student, teacher, weight)
        s, t = self._middle(student, teacher)
        self.regressor = nn.Conv2d(s.shape[1], t.shape[1], 1)

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        s, t = self._middle(student, teacher)
        return F.mse_loss(self.regressor(s), t)

    @staticmethod
    def _middle(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        paired = pairs(student, teacher)
        return paired[len(paired) // 2]


class Attention(Distiller):
    """Squared differences of attention maps, averaged over positions and summed over stages.

    Zagoruyko & Komodakis (ICLR 2017): a map is the mean over channels of the squared activations,
    at norm 1. The squared difference is that of their code; their equation (2) has its root. The
    weight suits maps of 8 to 32 pixels a side; fewer positions make a larger mean, and want less.
    """

    def __init__(self, student: Outputs, teacher: Outputs, *, weight: float = 1000.0) -> None:
        super().__init__(student, teacher, weight)
        _spatial(student, teacher)

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return sum(
            F.mse_loss(self._attention(s), self._attention(t))
            for s, t in _spatial(student, teacher)
        )

    @staticmethod
    def _attention(x: Tensor) -> Tensor:  # (N, C, P) -> (N, P)
        x = x.square().mean(1)
        return _unit(x, x.norm(dim=1, keepdim=True))


class RKD(Distiller):
    """Huber losses of pairwise distances over their mean, and of the cosines in triangles.

    Park et al. (CVPR 2019), on the last stage averaged over its positions, with their weights for
    classification. Each batch of embeddings is divided by its own mean distance, so the loss is
    free of the scale of either. Means over N^2 and N^3 as in their code, for the sums of the paper.
    Cost: O(N^3 + N^2 D) memory.
    """

    def __init__(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        distance: float = 25.0,
        angle: float = 50.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, weight)
        pairs(student, teacher)
        self.distance, self.angle = distance, angle

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        s = self._relations(as_map(student.stages[-1]).mean((2, 3)))
        t = self._relations(as_map(teacher.stages[-1].detach()).mean((2, 3)))
        distance, angle = (F.huber_loss(a, b) for a, b in zip(s, t, strict=True))
        return self.distance * distance + self.angle * angle

    @staticmethod
    def _relations(x: Tensor) -> tuple[Tensor, Tensor]:  # (N, D) -> (N, N), (N, N, N)
        difference = x[:, None] - x  # (N, N, D)
        distance = difference.norm(dim=2)
        mean = distance.sum() / max(1, len(x) * (len(x) - 1))
        direction = _unit(difference, distance[..., None])
        return _unit(distance, mean), direction @ direction.mT


class NST(Distiller):
    """Squared MMD between the channels' maps, each at norm 1; kernel (x . y)^2, summed over stages.

    Huang & Wang (2017), with their polynomial kernel, d = 2 and c = 0.
    """

    def __init__(self, student: Outputs, teacher: Outputs, *, weight: float = 50.0) -> None:
        super().__init__(student, teacher, weight)
        _spatial(student, teacher)

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        total = 0
        for s, t in _spatial(student, teacher):  # (N, C_s, P), (N, C_t, P)
            s, t = (_unit(x, x.norm(dim=2, keepdim=True)) for x in (s, t))
            kernel = [(a @ b.mT).square().mean() for a, b in ((s, s), (t, t), (s, t))]
            total = total + kernel[0] + kernel[1] - 2 * kernel[2]
        return total


class FactorTransfer(Distiller):
    """L1 distance, averaged, of factors at norm 1: translated student and paraphrased teacher.

    Kim, Park & Kwak (NeurIPS 2018), on the last stage. The paraphraser is an autoencoder with
    ``rate`` times the teacher's channels, which :meth:`prepare` trains on the teacher's maps and
    freezes (here by Adam, one step per batch); RuntimeError without it.
    """

    def __init__(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        rate: float = 0.5,
        lr: float = 1e-3,
        weight: float = 200.0,
    ) -> None:
        super().__init__(student, teacher, weight)
        s, t = pairs(student, teacher)[-1]
        factors = max(1, round(rate * t.shape[1]))
        self.lr = lr
        self.encoder = _convolutions(t.shape[1], t.shape[1], factors, factors)
        self.decoder = _convolutions(factors, factors, t.shape[1], t.shape[1])
        self.translator = _convolutions(s.shape[1], s.shape[1], factors, factors)
        self.prepared = False
        self._freeze(True)

    def prepare(self, teacher: Iterable[Outputs]) -> None:
        self._freeze(False)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, self.lr)
        for batch in teacher:
            x = as_map(batch.stages[-1]).detach()
            optimizer.zero_grad()
            F.mse_loss(self.decoder(self.encoder(x)), x).backward()
            optimizer.step()
            self.prepared = True
        self._freeze(True)

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        if not self.prepared:
            raise RuntimeError("call prepare() with outputs of the teacher before the first loss")
        s, t = pairs(student, teacher)[-1]
        s, t = self.translator(s).flatten(1), self.encoder(t).flatten(1)
        return F.l1_loss(*(_unit(x, x.norm(dim=1, keepdim=True)) for x in (s, t)))

    def train(self, mode: bool = True) -> FactorTransfer:
        super().train(mode)
        self._freeze(True)  # the statistics of its batch norms too
        return self

    def get_extra_state(self) -> dict[str, bool]:
        return {"prepared": self.prepared}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        self.prepared = state["prepared"]

    def _freeze(self, frozen: bool) -> None:
        for module in (self.encoder, self.decoder):
            module.train(not frozen).requires_grad_(not frozen)


def _convolutions(*channels: int) -> nn.Sequential:
    """3 x 3 convolutions between these numbers of channels, as in the paper's code."""
    layers = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


DISTILLERS: dict[str, type[Distiller]] = {
    "kd": KD,
    "fitnets": FitNets,
    "attention": Attention,
    "rkd": RKD,
    "nst": NST,
    "factor": FactorTransfer,
}
