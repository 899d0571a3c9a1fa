"""The limits of `lingen data pack`. Imports nothing heavy: the command line makes its flags of them."""

from typing import Annotated

from lingen.prepare.looks import BANDS, LOOKS
from lingen.recipe.bounds import AtLeast, Between
from lingen.recipe.signature import section


@section
class Filters:
    """Limits of `lingen data pack`; None switches a filter off. Raises SettingError for one out of bounds."""

    min_side: Annotated[int | None, AtLeast(0), "pixels of the shorter side"] = None
    min_fps: Annotated[float | None, AtLeast(0), "frames a second"] = None
    min_seconds: Annotated[float | None, AtLeast(0), "keep shorter shots than any stage wants, down to this"] = None
    black: Annotated[float | None, Between(0, 1), "largest share of black frames"] = 0.3
    frozen: Annotated[
        float | None, Between(0, 1), "largest share of time that stands still for half a second or more"
    ] = 0.5
    still: Annotated[float | None, AtLeast(0), "least motion, in picture heights a second"] = 0.01
    jerky: Annotated[float | None, AtLeast(0), "largest jerk of the camera, in picture heights a second"] = 1.0
    hdr: Annotated[float | None, Between(0, 1), "largest share of frames in PQ or HLG"] = 0.0
    interlaced: Annotated[float | None, Between(0, 1), "largest share of frames that are declared interlaced"] = 0.0
    duplicates: Annotated[
        int | None, Between(0, BANDS - 1), f"of {64 * LOOKS} bits of its looks, how few may differ from another clip's"
    ] = 10
