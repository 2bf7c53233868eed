"""Writes small pictures of every kind into tests/fuzz/seeds/image, and what Pillow (13, with libjpeg-turbo 3.2) and the
definition of PNG say of their pixels into expected.json: {file: {"shape": ..., "bytes": hex}} in several variants; and
resized.json.

    python make.py        needs Pillow, NumPy, and jpegtran of libjpeg-turbo-progs
"""
import io
import json
import pathlib
import struct
import subprocess
import zlib

import numpy
from PIL import Image, ImageOps

FOLDER = pathlib.Path(__file__).parent
SEEDS = FOLDER.parents[1] / "fuzz" / "seeds" / "image"
RANDOM = numpy.random.default_rng(7)
expected = {}


def describe(pixels):
    """(H, W) or (H, W, C) as ours are: (C, H, W)."""
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return {"shape": list(planes.shape), "bytes": planes.astype(">u2" if planes.dtype == numpy.uint16 else "u1").tobytes().hex()}


def write(name, data, **variants):
    (SEEDS / name).write_bytes(data)
    expected[name] = {key: describe(value) for key, value in variants.items()}


# ---- PNG, assembled here: Pillow writes neither all types nor interlaced ones

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rows_of(samples, depth):
    """Filter bytes and packed samples."""
    lines = b""
    for row in samples:
        flat = row.reshape(-1)
        if depth == 16:
            packed = flat.astype(">u2").tobytes()
        elif depth == 8:
            packed = flat.astype("u1").tobytes()
        else:
            bits = "".join(format(int(v), f"0{depth}b") for v in flat)
            bits += "0" * (-len(bits) % 8)
            packed = bytes(int(bits[k:k + 8], 2) for k in range(0, len(bits), 8))
        lines += b"\0" + packed
    return lines


def png(samples, kind, depth, interlaced=False, before=(), after=()):
    height, width = samples.shape[:2]
    if interlaced:
        passes = [samples[y::dy, x::dx] for y, x, dy, dx in ADAM7]
        lines = b"".join(rows_of(p, depth) for p in passes if p.size)
    else:
        lines = rows_of(samples, depth)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(interlaced))
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(lines, 9)), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def gray_of(rgb):
    red, green, blue = (rgb[..., c].astype(numpy.uint64) for c in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(rgb.dtype)


def to_bytes(samples, depth):
    if depth == 16:
        return ((samples.astype(numpy.uint64) * 255 + 32895) >> 16).astype(numpy.uint8)
    return (samples.astype(numpy.uint32) * (255 // (2**depth - 1))).astype(numpy.uint8)


def variants(rgb, alpha):
    """What is expected of colours (H, W, 3) or gray (H, W), and of opacity or None."""
    colour = rgb if rgb.ndim == 3 else numpy.stack([rgb] * 3, axis=2)
    opacity = alpha if alpha is not None else numpy.full(rgb.shape[:2], numpy.iinfo(rgb.dtype).max, rgb.dtype)
    return {"default": rgb, "1": gray_of(rgb) if rgb.ndim == 3 else rgb, "3": colour, "4": numpy.dstack([colour, opacity])}


def agrees(data, wanted):
    """Pillow sees the same, where it reads that type without losing bits."""
    picture = Image.open(io.BytesIO(data))
    assert (numpy.asarray(picture.convert("RGBA")) == wanted["4"]).all()
    assert (numpy.asarray(picture.convert("RGB")) == wanted["3"]).all()


def write_png(name, kind, depth, size=(5, 7), interlaced=False, transparent=None):
    shape = size if CHANNELS[kind] == 1 else (*size, CHANNELS[kind])
    samples = RANDOM.integers(0, 2**depth, shape)
    before = []
    if transparent is not None:
        before = [chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
        samples[1, 2] = transparent if len(transparent) > 1 else transparent[0]
    data = png(samples, kind, depth, interlaced, before)
    samples = samples.astype(numpy.uint16 if depth == 16 else numpy.uint8)
    alpha = samples[..., -1] if kind in (4, 6) else None
    rgb = samples[..., :-1].squeeze() if kind in (4, 6) else samples
    if transparent is not None:
        same = rgb == numpy.array(transparent) if len(transparent) > 1 else rgb[..., None] == transparent[0]
        alpha = numpy.where(same.all(axis=2), 0, 2**depth - 1).astype(samples.dtype)
    narrow = variants(to_bytes(rgb, depth), None if alpha is None else to_bytes(alpha, depth))
    if depth < 16:
        agrees(data, narrow)
    else:
        narrow["wide"] = variants(rgb, alpha)["4"]
    write(name, data, **narrow)


def write_palette(name, depth, transparent, interlaced=False):
    colours = RANDOM.integers(0, 256, (2**depth, 3)).astype(numpy.uint8)
    opacity = numpy.full(2**depth, 255, numpy.uint8)
    samples = RANDOM.integers(0, 2**depth, (6, 5)).astype(numpy.uint8)
    before = [chunk(b"PLTE", colours.tobytes())]
    if transparent:
        opacity[:3] = [0, 100, 200]
        before.append(chunk(b"tRNS", opacity[:3].tobytes()))
    data = png(samples, 3, depth, interlaced, before)
    wanted = variants(colours[samples], opacity[samples])
    agrees(data, wanted)
    write(name, data, indices=samples, **wanted)


def exif(orientation, order):
    return struct.pack(order + "2sHIHHHIHHI", b"II" if order == "<" else b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def pngs():
    write_png("rgb.png", 2, 8)
    write_png("rgba.png", 6, 8)
    write_png("gray.png", 0, 8)
    write_png("gray1.png", 0, 1, (3, 11))
    write_png("gray2.png", 0, 2)
    write_png("gray4.png", 0, 4)
    write_png("gray_opacity.png", 4, 8)
    write_png("gray16.png", 0, 16)
    write_png("gray_opacity16.png", 4, 16)
    write_png("rgb16.png", 2, 16)
    write_png("rgba16.png", 6, 16)
    write_png("gray_transparent.png", 0, 8, transparent=[17])
    write_png("rgb_transparent.png", 2, 8, transparent=[1, 2, 3])
    write_png("rgb16_transparent.png", 2, 16, transparent=[1000, 2000, 3000])
    write_png("interlaced.png", 2, 8, (9, 10), interlaced=True)
    write_png("interlaced_small.png", 0, 8, (1, 3), interlaced=True)
    write_png("interlaced16.png", 6, 16, (4, 5), interlaced=True)
    write_png("interlaced1.png", 0, 1, (6, 5), interlaced=True)
    write_palette("palette1.png", 1, False)
    write_palette("palette4.png", 4, False)
    write_palette("palette8.png", 8, True, interlaced=True)
    write_palette("palette2.png", 2, True)
    samples = RANDOM.integers(0, 256, (3, 2)).astype(numpy.uint8)
    turned = samples[::-1].T  # orientation 6: a quarter to the right
    write("turned.png", png(samples, 0, 8, before=[chunk(b"eXIf", exif(6, "<"))]), default=turned, stored=samples)
    write("turned_after.png", png(samples, 0, 8, after=[chunk(b"eXIf", exif(6, ">"))]), default=turned, stored=samples)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"nothing " * 100))
    write("text.png", png(samples, 0, 8, before=[text, chunk(b"gAMA", struct.pack(">I", 45455))]), default=samples)


# ---- JPEG, by Pillow

def scene(height, width):
    """Smooth colours with an edge: what a JPEG keeps."""
    y, x = numpy.mgrid[0:height, 0:width]
    planes = [(x * 255) // width, (y * 255) // height, ((x + y) % 23) * 11]
    planes[0][:, width // 2:] //= 3
    return numpy.dstack(planes).astype(numpy.uint8)


def jpeg(picture, **options):
    out = io.BytesIO()
    picture.save(out, "JPEG", **{"quality": 80, **options})
    return out.getvalue()


def write_jpeg(name, data, **more):
    picture = Image.open(io.BytesIO(data))
    pixels = numpy.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
    write(name, data, **{**variants(pixels, None), **more})


def jpegs():
    colours = Image.fromarray(scene(19, 21))
    gray = Image.fromarray(scene(19, 21)[..., 2])
    plain = jpeg(colours)
    write_jpeg("420.jpg", plain)
    write_jpeg("444.jpg", jpeg(colours, subsampling=0))
    write_jpeg("422.jpg", jpeg(colours, subsampling=1))
    write_jpeg("gray.jpg", jpeg(gray))
    write_jpeg("progressive.jpg", jpeg(colours, progressive=True))
    write_jpeg("restarts.jpg", jpeg(colours, restart_marker_blocks=1))
    write_jpeg("rgb.jpg", jpeg(colours, keep_rgb=True))
    for option in ["-arithmetic"], ["-arithmetic", "-progressive"]:
        done = subprocess.run(["jpegtran", *option], input=plain, capture_output=True, check=True)
        write("".join(option).strip("-").replace("-", "_") + ".jpg", done.stdout, default=numpy.asarray(
            Image.open(io.BytesIO(plain)).convert("RGB")))
    inks = numpy.dstack([scene(19, 21), scene(19, 21)[::-1, :, 1] // 2])
    cmyk = jpeg(Image.fromarray(inks, "CMYK"))
    write_jpeg("cmyk.jpg", cmyk)
    mark = cmyk.index(b"Adobe") + 11
    write_jpeg("ycck.jpg", cmyk[:mark] + b"\2" + cmyk[mark + 1:])
    uneven = Image.fromarray(scene(7, 11)[..., 2])
    for orientation in range(1, 9):
        data = jpeg(uneven, quality=50, exif=b"Exif\0\0" + exif(orientation, "<>"[orientation % 2]))
        picture = Image.open(io.BytesIO(data))
        write(f"turned{orientation}.jpg", data, default=numpy.asarray(ImageOps.exif_transpose(picture)),
              stored=numpy.asarray(picture))
    large = jpeg(Image.fromarray(scene(65, 34)), quality=50)
    halves = {}
    for divisor in 2, 4, 8:
        picture = Image.open(io.BytesIO(large))
        picture.draft("RGB", (34 // divisor, 65 // divisor))
        halves[f"part{divisor}"] = numpy.asarray(picture)
    write_jpeg("large.jpg", large, **halves)


def broken():
    """No picture at all."""
    whole = (SEEDS / "rgb.png").read_bytes()
    write("cut.png", whole[:-30])
    write("claim.png", whole[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)) + whole[33:])
    write("checksum.png", whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    write("cut.jpg", (SEEDS / "420.jpg").read_bytes()[:-60])
    write("cut_progressive.jpg", (SEEDS / "progressive.jpg").read_bytes()[:-2])
    arithmetic = (SEEDS / "arithmetic.jpg").read_bytes()
    size = arithmetic.index(b"\xff\xc9") + 5
    write("claim_arithmetic.jpg", arithmetic[:size] + struct.pack(">HH", 60000, 60000) + arithmetic[size + 4:])
    three = (SEEDS / "444.jpg").read_bytes()
    frame, scan = three.index(b"\xff\xc0"), three.index(b"\xff\xda")
    two = [three[:frame], b"\xff\xc0\0\x0e", three[frame + 4:frame + 9], b"\2", three[frame + 10:frame + 16],
           three[frame + 19:scan], b"\xff\xda\0\x0a\2", three[scan + 5:scan + 9], three[scan + 11:]]
    write("two_components.jpg", b"".join(two))
    turned = (SEEDS / "turned.png").read_bytes()
    length = turned.index(b"eXIf") - 4
    write("claim_exif.png", turned[:length] + struct.pack(">I", 2**27) + turned[length + 4:])
    write("picture.gif", b"GIF89a\1\0\1\0\0\0\0;")


def resized():
    """Numbers in other sizes, as Pillow's BILINEAR makes them of floats."""
    source = RANDOM.random((7, 5)).astype(numpy.float32)
    picture = Image.fromarray(source)
    sizes = [(7, 5), (3, 2), (14, 10), (1, 1), (9, 3), (2, 11)]
    results = [numpy.asarray(picture.resize((w, h), Image.BILINEAR)).tolist() for h, w in sizes]
    text = json.dumps({"source": source.tolist(), "sizes": sizes, "results": results})
    (FOLDER / "resized.json").write_text(text + "\n")


SEEDS.mkdir(exist_ok=True)
pngs()
jpegs()
broken()
resized()
lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(expected.items()))
(FOLDER / "expected.json").write_text("{" + lines + "}\n")
