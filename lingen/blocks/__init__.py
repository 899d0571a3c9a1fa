"""The parts of a layer: token mixers, scan orders and small layers.

A mixer is `Mixer(dim, layer, *, settings...)`, an `nn.Module` with `forward(x [b t h w d]) -> [b t h w d]`; it reads
the grid off the shape, an image is t = 1. `layer` counts the layers of the same mixer and picks scan order and shift.
"""
