"""The reference implementation's projector, written independently of ours from the order of its layers."""

import torch
from torch import nn

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


def list_widths(hidden_dim: int, num_hidden_layers: int, multiplier: float) -> list[int]:
    """The first width is `hidden_dim`, each other one the one before times the multiplier, at least 16."""
    widths = [hidden_dim]
    while len(widths) < num_hidden_layers:
        widths.append(max(16, round(widths[-1] * multiplier)))
    return widths


class ReferenceProjector(nn.Module):
    """An input layer, hidden layers, an output layer, a LayerNorm behind each, and a linear residual."""

    def __init__(
        self,
        input_dim: int,
        widths: list[int],
        output_dim: int,
        activation: str,
        *,
        residual: bool = True,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.drop = nn.Dropout(0.2)
        self.input_layer = nn.Linear(input_dim, widths[0])
        self.input_norm = nn.LayerNorm(widths[0]) if norm else None
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.hidden_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.hidden_norms = nn.ModuleList(nn.LayerNorm(b) for _, b in pairs) if norm else None
        self.output_layer = nn.Linear(widths[-1], output_dim)
        self.output_norm = nn.LayerNorm(output_dim) if norm else None
        self.residual_proj = nn.Linear(input_dim, output_dim) if residual else None
        for layer in self.modules():
            if isinstance(layer, nn.LayerNorm):  # as after training
                nn.init.normal_(layer.weight, 1.0, 0.3)
                nn.init.normal_(layer.bias, 0.0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.input_layer(x)
        if self.input_norm is not None:
            h = self.input_norm(h)
        h = self.drop(self.act(h))
        for number, layer in enumerate(self.hidden_layers):
            h = layer(h)
            if self.hidden_norms is not None:
                h = self.hidden_norms[number](h)
            h = self.drop(self.act(h))
        y = self.output_layer(h)
        if self.output_norm is not None:
            y = self.output_norm(y)
        y = self.drop(y)
        if self.residual_proj is not None:
            y = y + self.residual_proj(x)
        return y / y.norm(dim=1, keepdim=True)
