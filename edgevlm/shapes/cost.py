"""What a layer costs, from its shape alone.

A multiply and an add are two floating-point operations.  Norms, activations, softmax and rotary positions are not
counted, as in the published tables (counted, they are about one in a hundred).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, and the operations of linear maps (convolutions included) and of attention's two products."""

    parameters: int = 0
    linear_flops: int = 0
    attention_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            parameters=self.parameters + other.parameters,
            linear_flops=self.linear_flops + other.linear_flops,
            attention_flops=self.attention_flops + other.attention_flops,
        )

    @property
    def flops(self) -> int:
        """Both kinds of operations."""
        return self.linear_flops + self.attention_flops

    def layers(self, count: int) -> Cost:
        """``count`` layers of this kind, each with its own weights."""
        return Cost(
            parameters=count * self.parameters,
            linear_flops=count * self.linear_flops,
            attention_flops=count * self.attention_flops,
        )

    def runs(self, count: int) -> Cost:
        """The same weights used ``count`` times."""
        return Cost(
            parameters=self.parameters,
            linear_flops=count * self.linear_flops,
            attention_flops=count * self.attention_flops,
        )


NOTHING = Cost()


def linear(rows: int, inputs: int, outputs: int, *, bias: bool = True) -> Cost:
    """``rows`` vectors of ``inputs`` numbers to ``outputs``."""
    return Cost(parameters=outputs * (inputs + bias), linear_flops=2 * rows * inputs * outputs)


def conv(inputs: int, outputs: int, kernel: int, pixels: int, *, groups: int = 1, bias: bool = True) -> Cost:
    """A square kernel that leaves ``pixels`` pixels of ``outputs`` channels."""
    weights = outputs * (inputs // groups) * kernel**2
    return Cost(parameters=weights + outputs * bias, linear_flops=2 * pixels * weights)


def norm(width: int, *, bias: bool = True) -> Cost:
    """Weight and bias of a norm."""
    return Cost(parameters=width * (1 + bias))


def table(rows: int, width: int) -> Cost:
    """Vectors that are looked up or added."""
    return Cost(parameters=rows * width)


def products(queries: int, keys: int, width: int) -> Cost:
    """``queries · keysᵀ`` and the weighted sum of values, all heads together ``width`` wide, the full square."""
    return Cost(attention_flops=4 * queries * keys * width)
