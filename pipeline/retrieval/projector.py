"""The projector: backbone features in, L2-normalised embeddings out.

This file is published with the model: it imports torch alone.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Linear(nn.Module):
    """A linear layer that computes in float32 (or as autocast says) whatever type its weights have.

    It is no `nn.Linear`, which libraries replace by quantised layers: the projector is a thousandth of a backbone's
    work, and eight bits would cost it more than they save.
    """

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        start = nn.Linear(input_dim, output_dim)
        self.weight, self.bias = start.weight, start.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs (B, input_dim) to (B, output_dim)."""
        return functional.linear(inputs, self.weight.float(), self.bias.float())


class Norm(nn.Module):
    """A LayerNorm that computes in float32 whatever type its weights have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalise inputs (B, width)."""
        return functional.layer_norm(inputs.float(), self.weight.shape, self.weight.float(), self.bias.float())


class Projector(nn.Module):
    """A linear shortcut plus an MLP branch, whose sum is L2-normalised.

    The branch's last layer starts at zero, so a new projector equals its shortcut. With `num_hidden_layers` 0 there
    is no branch. Shortcut and branch read the features raised to `input_power` with their signs kept. `hidden_dims`,
    for hidden layers of different widths, replaces `hidden_dim` and `num_hidden_layers`. With `layer_norm` a LayerNorm
    follows each layer of the branch, before the activation. Without `use_residual` the branch is all, if there is one.
    """

    def __init__(  # noqa: PLR0917 (the published configuration's names, in its order)
        self,
        input_dim: int,
        output_dim: int = 256,
        hidden_dim: int = 512,
        num_hidden_layers: int = 1,
        dropout: float = 0.1,
        activation: str = "gelu",
        input_power: float = 1.0,
        hidden_dims: list[int] | None = None,
        layer_norm: bool = False,
        use_residual: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: must be one of {', '.join(ACTIVATIONS)}")
        self.architecture: dict[str, Any] = {
            "input_dim": input_dim, "output_dim": output_dim, "hidden_dim": hidden_dim,
            "num_hidden_layers": num_hidden_layers, "dropout": dropout, "activation": activation,
            "input_power": input_power, "hidden_dims": None if hidden_dims is None else list(hidden_dims),
            "layer_norm": layer_norm, "use_residual": use_residual,
        }  # fmt: skip
        widths = [input_dim, *([hidden_dim] * num_hidden_layers if hidden_dims is None else hidden_dims)]
        self.input_power = float(input_power)
        self.shortcut = Linear(input_dim, output_dim) if use_residual or len(widths) == 1 else None
        self.hidden = nn.ModuleList(Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.output = Linear(widths[-1], output_dim) if len(widths) > 1 else None
        norm_dims = [*widths[1:], output_dim]
        self.norms = nn.ModuleList(Norm(width) if layer_norm else nn.Identity() for width in norm_dims)
        if self.output is not None and self.shortcut is not None:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (B, input_dim) of any float type to float32 embeddings (B, output_dim) of norm 1."""
        return functional.normalize(self.map(features), p=2.0, dim=1)

    def map(self, features: torch.Tensor) -> torch.Tensor:
        """Return the float32 embeddings before they are normalised."""
        # Half-precision weights are widened: centring subtracts numbers of one size, and a half-precision sum would
        # keep little of the difference.
        inputs = features.float()
        if self.input_power != 1.0:
            # At 0 the power's slope is infinite, which would make the backbone's gradients NaN.
            inputs = inputs.sign() * inputs.abs().clamp_min(torch.finfo(inputs.dtype).tiny) ** self.input_power
        # In float32 under autocast too, because the shortcut centres; without one the branch does.
        exact = torch.autocast("cuda" if inputs.is_cuda else "cpu", enabled=False)
        if self.shortcut is None:
            with exact:
                return self._map_branch(inputs).float()
        with exact:
            outputs: torch.Tensor = self.shortcut(inputs)  # (B, output_dim)
        if self.output is not None:
            outputs = outputs + self._map_branch(inputs)
        return outputs.float()

    def _map_branch(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.hidden, self.norms, strict=False):  # the last norm is the output's
            hidden = self.dropout(self.activation(norm(layer(hidden))))
        assert self.output is not None
        outputs: torch.Tensor = self.norms[-1](self.output(hidden))
        return outputs
