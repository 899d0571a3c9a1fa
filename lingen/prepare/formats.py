"""Which files are films and which are pictures: by the extensions that FFmpeg and Pillow declare for what they read."""

from contextlib import suppress
from functools import cache

from av.format import ContainerFormat
from PIL import Image, ImageFile

READ = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,gif,asf,flv,mxf,ogg,dv,rm,nut,ivf,wtv,h264,hevc,yuv4mpegpipe,apng,gxf,m4v"
)
"""Containers of films that lie in one file. What FFmpeg reads beside them (playlists, lists of pictures, scripts,
devices, text) can name other files, or is no film."""
WRITTEN = (
    "mov,mp4,ipod,3gp,3g2,psp,ismv,f4v,matroska,webm,avi,mpeg,dvd,vob,svcd,mpegts,mpeg1video,mpeg2video,gif,asf,flv,"
    "mxf,ogv,dv,rm,nut,ivf,wtv,h264,hevc,yuv4mpegpipe,apng,gxf,m4v"
)
"""The same as FFmpeg names them where it writes: there it declares extensions that it reads by content alone."""
NO_FILMS = frozenset((".m4a", ".m4b", ".wma", ".ra", ".isma", ".mka", ".mks", ".heic", ".heif"))
"""Extensions of the same containers for sound, subtitles and pictures alone."""
NO_PICTURES = frozenset(("EPS", "FLI", "MPEG", "IPTC"))
"""What Pillow reads by running another program, or reads no picture of."""
MEMBERS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""Formats of pictures that training reads, as Pillow names them, and the extensions of their members in a shard."""
MOVING = ("GIF", "WEBP", "PNG", "AVIF")
"""Formats whose pictures follow each other in time; several pictures of others are pages or sizes."""
CAPTIONS = (".txt", ".json")
"""Extensions of captions beside a file."""


@cache
def extensions(kind: str) -> frozenset[str]:
    """Extensions of a kind, ``image`` or ``video``, in lower case with their dots. ``.gif`` and a few are of both."""
    if kind == "image":
        read = picture_formats()
        return frozenset(one for one, name in Image.registered_extensions().items() if name in read)
    found = {".gif", ".apng", ".webp"}
    for name in f"{READ},{WRITTEN}".split(","):
        with suppress(ValueError):  # FFmpeg was built without it
            found |= {f".{one}" for one in ContainerFormat(name).extensions} - NO_FILMS - extensions("image")
    return frozenset(found)


@cache
def picture_formats() -> tuple[str, ...]:
    """The formats that Pillow opens by itself, by its names."""
    Image.init()
    opened = ((name, opener) for name, (opener, _) in Image.OPEN.items())
    stubs = {name for name, one in opened if isinstance(one, type) and issubclass(one, ImageFile.StubImageFile)}
    return tuple(sorted(Image.OPEN.keys() - stubs - NO_PICTURES))
