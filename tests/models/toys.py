"""A toy normalization and a toy head, to show that an entry in NORMS or HEADS is all that a new part needs."""

import torch
from torch import nn
from transformers import initialization as init

from hf_dl.models.layers_norm import Norm2d
from hf_dl.models.layers_output_head import OutputHead


class ToyNorm(Norm2d):
    """Divide each channel by its root mean square; the power of the divisor is learned and starts at 1."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.power = nn.Parameter(torch.full((channels,), torch.nan))  # only reset_parameters makes it usable

    def reset_parameters(self):
        super().reset_parameters()
        init.ones_(self.power)

    def forward(self, x):
        rms = (x.square().mean((2, 3), keepdim=True) + self.eps).sqrt()
        weight, bias, power = (values[:, None, None] for values in (self.weight, self.bias, self.power))
        return weight * x / rms**power + bias


class ToyHead(OutputHead):
    """Softmax over cosine similarities times a learned scale, with a buffer that counts the classes."""

    has_class_rows = True

    def __init__(self, in_features, num_classes, *, first_scale=8.0):
        super().__init__(in_features, num_classes)
        self.first_scale = first_scale
        self.weight = nn.Parameter(torch.full((num_classes, in_features), torch.nan))
        self.scale = nn.Parameter(torch.tensor(torch.nan))
        self.register_buffer("offset", self.make_buffers()["offset"])
        self.reset_parameters()

    def make_buffers(self):
        return {"offset": torch.linspace(0, 1, self.num_classes)}

    def reset_parameters(self, std=None):
        super().reset_parameters(std)
        init.constant_(self.scale, self.first_scale)

    def _log_prob(self, hidden):
        cosines = nn.functional.normalize(hidden, dim=1) @ nn.functional.normalize(self.weight, dim=1).T
        return (self.scale * cosines + self.offset).float().log_softmax(1)

    def _losses(self, hidden, labels, temperature, generator):
        return -self._log_prob(hidden).gather(1, labels[:, None]).squeeze(1)
