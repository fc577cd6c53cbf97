"""The reference implementation's projector as its checkpoints describe it, written independently of ours."""

import torch
from torch import nn

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


class ReferenceProjector(nn.Module):
    """An input layer, hidden layers that shrink, an output layer, and a linear residual."""

    def __init__(
        self,
        input_dim: int,
        widths: list[int],
        output_dim: int,
        activation: str,
        *,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.drop = nn.Dropout(0.2)
        self.input_layer = nn.Linear(input_dim, widths[0])
        self.hidden_layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.output_layer = nn.Linear(widths[-1], output_dim)
        self.residual_proj = nn.Linear(input_dim, output_dim) if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.act(self.input_layer(x)))
        for layer in self.hidden_layers:
            h = self.drop(self.act(layer(h)))
        y = self.output_layer(h)
        if self.residual_proj is not None:
            y = y + self.residual_proj(x)
        return y / y.norm(dim=1, keepdim=True)
