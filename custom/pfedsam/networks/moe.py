"""The localized mixture of experts (L-MoE): the personal part of a site."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gate = Literal["image", "token"]


class LMoE(nn.Module):
    """Mixture of bottleneck adapters, parallel to an MLP: `s * sum_e g_e(n) * Up_e(GELU(Down_e(n)))`.

    `n` is the normed input of the MLP and `g = softmax(Wg n)`. `Up` is zero at the start: a no-op. The L-MoE of arXiv
    2509.15638; the form of an expert is ours.

    Args:
        dim: channels of the tokens.
        experts: number of experts E.
        bottleneck: hidden width of each expert.
        scale: s.
        gate: `image` gates by the mean token of an image, `token` gates each token.
        top_k: only the k largest gates count, scaled to sum 1; 0 for all of them. With k = 1 the largest counts as it
            is, as in Switch Transformers (Fedus et al., arXiv 2101.03961, section 2.1): scaled it would always be 1,
            and the gate would have no gradient of the task.
        generator: for the initial weights.
        device: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 4,
        bottleneck: int = 16,
        scale: float = 1.0,
        gate: Gate = "image",
        top_k: int = 0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.number, self.bottleneck, self.scale = experts, bottleneck, scale
        self.gate_per, self.top_k = gate, top_k
        self.enabled = True
        #: Whether the gates of a pass in training are of the site's own images, and count in `usage`.
        self.counted = True
        #: Factor of the output, to see what `interpolate` would give.
        self.strength = 1.0
        self.gate = nn.Linear(dim, experts, device=device)
        self.down = nn.Linear(dim, experts * bottleneck, device=device)
        #: `(E, bottleneck, dim)`
        self.up = nn.Parameter(torch.zeros(experts, bottleneck, dim, device=device))
        #: `(E, dim)`
        self.up_bias = nn.Parameter(torch.zeros(experts, dim, device=device))
        if self.up.device.type != "meta":
            for layer in (self.gate, self.down):
                layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * dim**-0.5)
                layer.bias.data.zero_()
        #: Load-balance loss of the last forward pass in training, with its graph; None where all gates count.
        self.balance: Tensor | None = None
        self.forget_usage()

    def gates(self, n: Tensor) -> Tensor:
        """Gate values `(B, ..., E)` that sum to 1, but for top 1; for gates per image the spatial dimensions are 1."""
        return self._select(self._probabilities(n))

    def forward(self, n: Tensor) -> Tensor:
        """`(B, ..., dim)` to the same shape; zeros when the experts are off."""
        if not self.enabled:
            return torch.zeros_like(n)
        probabilities = self._probabilities(n)
        gates = self._select(probabilities)
        if self.training and self.counted:
            self._note(gates)
            self.balance = load_balance(probabilities, gates) if self.top_k else None
        hidden = F.gelu(self.down(n)).unflatten(-1, (self.number, self.bottleneck)) * gates.unsqueeze(-1)
        mixed = F.linear(hidden.flatten(-2), self.up.flatten(0, 1).T) + gates @ self.up_bias
        return self.scale * self.strength * mixed

    @torch.no_grad()
    def interpolate(self, alpha: float) -> None:
        """Move the last layers towards zero, where they start and the mixture is a no-op; 1 leaves them as they are."""
        self.up.mul_(alpha)
        self.up_bias.mul_(alpha)

    def train(self, mode: bool = True) -> LMoE:
        """Set the mode, and let the graph of the last step go."""
        self.balance = None
        return super().train(mode)

    def forget_usage(self) -> None:
        """Start counting the gates anew."""
        self._share: Tensor | None = None
        self._entropy: Tensor | None = None
        self._seen = 0

    def usage(self) -> dict[str, float]:
        """Mean entropy of the gates in nats and mean share of each expert since `forget_usage`, of gates of sum 1."""
        if self._share is None or self._entropy is None:
            return {}
        shares = (self._share / self._seen).tolist()
        return {"entropy": float(self._entropy / self._seen)} | {f"share_{e}": share for e, share in enumerate(shares)}

    def _probabilities(self, n: Tensor) -> Tensor:
        if self.gate_per == "image":
            n = n.mean(dim=tuple(range(1, n.ndim - 1)), keepdim=True)
        return self.gate(n).softmax(dim=-1)

    def _select(self, probabilities: Tensor) -> Tensor:
        if not 0 < self.top_k < self.number:
            return probabilities
        values, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, chosen, values)

    @torch.no_grad()
    def _note(self, gates: Tensor) -> None:
        flat = gates.detach().float().flatten(0, -2)
        flat = flat / flat.sum(-1, keepdim=True)  # top 1 does not sum to 1
        share, entropy = flat.sum(0), -(flat * flat.clamp_min(1e-12).log()).sum()
        self._share = share if self._share is None else self._share + share
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        self._seen += len(flat)


def load_balance(probabilities: Tensor, gates: Tensor) -> Tensor:
    """`E * sum_e f_e P_e` (Fedus et al., Switch Transformers, arXiv 2101.03961): 1 when all experts are used alike.

    Args:
        probabilities: `(..., E)`, softmax of the gate; P_e is its mean.
        gates: `(..., E)`, what counts; f_e is the share of an expert among all gates that are not zero.
    """
    used = (gates.detach() > 0).float().flatten(0, -2).sum(0)
    return len(used) * (used / used.sum() * probabilities.float().flatten(0, -2).mean(0)).sum()
