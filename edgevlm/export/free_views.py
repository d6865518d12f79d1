"""A vision encoder that takes the pixels of Idefics3's processor as they come."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

PIXELS = "pixel_values"


def take_views(model: ir.Model) -> None:
    """Let ``pixel_values`` be (S, 3, H, W) or, as transformers and transformers.js hand it over, (B, S, 3, H, W).

    The input loses its declared rank, and a Reshape gives the graph behind it the four axes back; the output stays
    (B · S, N, D).  Engines that must know every rank are told it by the manifest.
    """
    graph = model.graph
    pixels = next(value for value in graph.inputs if value.name == PIXELS)
    assert pixels.shape is not None
    sizes = [size if isinstance(size, int) else -1 for size in pixels.shape]
    shape = ir.tensor(np.array(sizes, np.int64), name=f"{PIXELS}.sizes")
    constant = ir.Value(name=shape.name, shape=ir.Shape([4]), type=ir.TensorType(shape.dtype), const_value=shape)
    node = ir.Node("", "Reshape", [pixels, constant], num_outputs=1, name=f"node.{PIXELS}.views")
    views = node.outputs[0]
    views.name, views.shape, views.type = f"{PIXELS}.views", pixels.shape, pixels.type
    for user, index in tuple(pixels.uses()):
        if user is not node:
            user.replace_input_with(index, views)
    pixels.shape = None
    graph.register_initializer(constant)
    graph.insert_before(graph[0], node)
