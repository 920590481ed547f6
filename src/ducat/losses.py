"""The losses of adversarial training, as functions of logits: one value per sample, gradients through every argument.

All of them work in log space: in probability space KL gives NaN as soon as a probability underflows.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Logits = Float[Tensor, "batch outputs"]
Labels = Int[Tensor, " batch"]
PerSample = Float[Tensor, " batch"]


def _without(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logits with each label's own at minus infinity."""
    return logits.scatter(1, y[:, None], -torch.inf)


def soft_cross_entropy(logits: Logits, targets: Logits) -> PerSample:
    """CE(z, t) = -sum_k t_k log softmax(z)_k.

    Args:
        logits: z, shape (B, K).
        targets: t, shape (B, K), rows that sum to 1.
    """
    return -(targets * F.log_softmax(logits, dim=1)).sum(1)


def cross_entropy(logits: Logits, y: Labels, label_smoothing: float | int = 0.0) -> PerSample:
    """CE(z, y) = -log softmax(z)_y, for labels y of shape (B,).

    Label smoothing s in [0, 1] makes the target (1 - s) e_y + s / K (Szegedy et al. 2016, arXiv 1512.00567).
    """
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)


def kl(clean_logits: Logits, adversarial_logits: Logits) -> PerSample:
    """KL(p(x) || p(x')), the regulariser of TRADES (Zhang et al. 2019, arXiv 1901.08573).

    Gradients flow through both arguments: with the clean branch detached TRADES loses robustness.
    """
    clean = F.log_softmax(clean_logits, dim=1)
    return (clean.exp() * (clean - F.log_softmax(adversarial_logits, dim=1))).sum(1)


def js(logits1: Logits, logits2: Logits, temperature: float | int = 1.0) -> PerSample:
    """Jensen-Shannon divergence of two sharpened predictions, softmax(z / T) (Tack et al. 2022, arXiv 2103.04623).

    Args:
        logits1: shape (B, K).
        logits2: shape (B, K).
        temperature: T > 0; Consistency-AT uses 0.5.
    """
    first = F.log_softmax(logits1 / temperature, dim=1)
    second = F.log_softmax(logits2 / temperature, dim=1)
    middle = torch.logaddexp(first, second) - torch.log(first.new_tensor(2.0))
    return 0.5 * (first.exp() * (first - middle) + second.exp() * (second - middle)).sum(1)


def mart_margin(adversarial_logits: Logits, y: Labels) -> PerSample:
    """-log(1 - max_{k != y} p_k(x')), the margin term of MART's boosted cross-entropy (Wang et al. 2020)."""
    strongest = _without(adversarial_logits, y).argmax(1)
    return adversarial_logits.logsumexp(1) - _without(adversarial_logits, strongest).logsumexp(1)


def mart_divergence(clean_logits: Logits, adversarial_logits: Logits, y: Labels) -> PerSample:
    """KL(p(x) || p(x')) (1 - p_y(x)), MART's weighted divergence (Wang et al. 2020)."""
    doubt = 1 - F.softmax(clean_logits, dim=1).gather(1, y[:, None]).squeeze(1)
    return kl(clean_logits, adversarial_logits) * doubt


def margin(logits: Logits, y: Labels) -> PerSample:
    """max_{k != y} z_k - z_y: above 0 exactly when the sample is misclassified (Carlini & Wagner 2017)."""
    return _without(logits, y).amax(1) - logits.gather(1, y[:, None]).squeeze(1)
