"""What is personal in a folder of files: user names, home folders, the name of this host, tokens.

Looked for in every file's name and text: as it is, and as it means once it is unescaped, decoded,
unpacked, or put together again.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import getpass
import gzip
import html
import io
import itertools
import json
import lzma
import re
import socket
import string
import unicodedata
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from lib.files import ParamsError

# Names that are no one's: accounts of containers and images, and words of every text.
COMMON = {
    "root",
    "user",
    "users",
    "admin",
    "ubuntu",
    "debian",
    "jovyan",
    "runner",
    "docker",
    "nobody",
    "guest",
    "default",
    "home",
    "host",
    "local",
    "localhost",
    "server",
    "linux",
    "test",
    "python",
    "model",
    "models",
}
SERVICES = (  # the token of each begins in a way of its own
    *(rf"{name}_(?:live|test)_[A-Za-z0-9]{{16,}}" for name in ("sk", "rk", "pk")),
    r"npm_[A-Za-z0-9]{30,}",
    r"pypi-[\w-]{40,}",
    r"nvapi-[\w-]{40,}",
    r"gsk_[A-Za-z0-9]{40,}",
    r"xai-[A-Za-z0-9]{40,}",
    r"pplx-[A-Za-z0-9]{40,}",
    *(rf"{name}_[A-Za-z0-9]{{20,}}" for name in ("r8", "fw", "rpa", "nfp", "ntn", "rnd")),
    r"do[opr]_v1_[a-f0-9]{60,}",
    r"dapi[a-f0-9]{32}",
    r"dckr_[a-z]{3}_[\w-]{20,}",
    r"SG\.[\w-]{20,}\.[\w-]{30,}",
    r"gl(?:sa|c)_[\w+/=-]{30,}",
    r"hv[sb]\.[\w-]{24,}",
    r"ya29\.[\w-]{20,}",
    r"GOCSPX-[\w-]{20,}",
    r":AA[\w-]{33}(?![\w-])",
    r"hooks\.slack\.com/services/\w+/\w+/\w+",
    r"discord(?:app)?\.com/api/webhooks/\d+/[\w-]{30,}",
    r"webhook\.office\.com/webhookb2/[\w@-]+/IncomingWebhook/\w+",
    r"(?<![\w.-])[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{38}(?![\w.-])",
    r"[?&](?:access_|auth_)?token=[\w-]{20,}",
    r"ATBB[A-Za-z0-9]{28,}",
    r"shp(?:at|ca|pa|ss)_[a-f0-9]{32}",
    r"lin_api_[A-Za-z0-9]{30,}",
    r"sbp_[a-f0-9]{40}",
    r"ATATT3[\w=-]{50,}",
    r"SK[a-f0-9]{32}(?![a-f0-9])",
    r"AccountKey=[A-Za-z0-9+/]{40,}",
    r"[?&]sig=[A-Za-z0-9%+/]{40,}",
    r"AGE-SECRET-KEY-1[A-Z0-9]{50,}",
)
# A word that says what follows, and a text that is none of any language: it has digits.
NAMED = (
    r"(?i:api_?-?key|secret|passw(?:or)?d|access_?-?key|(?:auth|session)_?-?token|hub_?token|login|bearer)\w*"
    r"[\"']?(?:\s*[:=]\s*|\s+)[\"']?(?=[A-Za-z/+_.-]*\d)(?=[\d/+_.-]*[A-Za-z])[\w/+.=-]{20,}"
)
PASSWORD = (  # shorter, where it is assigned
    r"(?i:passw(?:or)?d)[\"']?\s*[:=]\s*[\"']?(?=[^\s\"',;]*\d)(?=[^\s\"',;]*[A-Za-z])"
    r"[\w/+.!@#$%^&*-]{10,}"
)
TOKENS: dict[str, str | tuple[str, ...]] = {
    "Hugging Face token": r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}",
    "GitHub token": r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}",
    "GitLab token": r"gl(?:pat|ptt|dt|rt|cbt|ft|oas|agent)-[\w-]{20,}",
    "API key": r"(?<![A-Za-z0-9])sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}",
    "AWS key": r"(?<![A-Za-z0-9+/])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9+/])",
    "Google key": r"(?<![A-Za-z0-9+/])AIza[\w-]{35}",
    "Slack token": r"(?:xox[abeoprs]|xapp)-[\w-]{10,}",
    "token of a service": SERVICES,
    "secret by its name": (NAMED, PASSWORD),
    "private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File",
    "signed web token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "password in an address": r"(?<![a-z])[a-z]+://[^\s/:@\"'<>]+:[^\s/:@\"'<>]+@",
}
HOMES = r"/(?:home|Users|root)/[\w.-]+|[A-Za-z]:\\+Users\\+[\w.-]+"
ALONE = r"(?<![\w+/.~])"  # not inside a longer word, a relative path or base64
BASE64 = re.compile(r"[A-Za-z0-9+/]{120,}={0,2}")
CODED = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")  # base64 of either alphabet
HEX = re.compile(r"(?<![0-9a-fA-F])[0-9a-fA-F]{40,}")
BASE32 = re.compile(r"[A-Z2-7]{32,}={0,6}")
# Base 85 of either alphabet: its runs, and the letters of Python's b85 that its own stand for.
B85 = string.digits + string.ascii_uppercase + string.ascii_lowercase + "!#$%&()*+-;<=>?@^_`{|}~"
BASE85 = [
    (re.compile(f"[{re.escape(letters)}]{{20,}}"), str.maketrans(letters, B85))
    for letters in ("".join(map(chr, range(33, 118))), B85)
]
BEGINS = re.compile(r"[2-4A-Za-e]{4,}")  # the first letters of fives, where they hold ASCII
PRINTED = re.compile(rb"[\n -~]{15,}")
LINES = re.compile(r"(?<![ \t\r])[ \t\r]*\n\s*")
QUOTED = re.compile(r"=([0-9A-F]{2})")  # mail's way to write a letter
# Bytes one by one: 68 66 5f, 68:66:5f, 0x68, 0x66 or 104, 102, 95.
HEX_BYTES = re.compile(
    r"(?<![0-9a-fA-F])(?:(?:0x)?[0-9a-fA-F]{2}[\s,:;-]{1,3}){19,}(?:0x)?[0-9a-fA-F]{2}"
)
BYTES = re.compile(r"(?<!\d)(?:\d{2,3}[\s,;]{1,3}){19,}\d{2,3}")
RARE = re.compile("[!#$%&*;?@^`]")  # letters of base 85 that few words have
KEY = re.compile(r"""(?:["']?\w*["']?[=:(])?["']?""")  # before a code
# Between two texts of one line that a program puts together, or items of a list; not a value and
# the next key.
ADDED = re.compile(r"""["'][\s+,()\[\]]+[bfru]{0,2}["'](?![^"']*["']\s*:)""")
ESCAPE = re.compile(
    r'\\(u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{2,5}\}|U000[0-9a-fA-F]{5}|x[0-9a-fA-F]{2}|[0-3][0-7]{2}|[nrtbf"\'/\\])'
)
ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
# What is not seen in a text: colours and links of a terminal, tags, letters without width.
UNSEEN = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\)|<[^<>]{1,500}>|"
    "[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]"
)
MOST = 100_000_000  # bytes that a packed file may hold
PACKED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    **dict.fromkeys((b"x\x9c", b"x\xda"), lambda file: io.BytesIO(_inflated(file.read()))),
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
ZIP, PICTURE = b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)
# Between the lines of a text that was broken in two: quotes, commas and signs of continuation.
BREAK = re.compile(r"""(?:\\n[\s"',+\\()=]*|(?<![\s"',+\\()=])[\s"',+\\()=]*)\n[\s"',+()>#|]*""")


@dataclass(frozen=True)
class Leak:
    """Something personal in a file: where, which kind, and the text itself."""

    file: str
    line: int
    what: str
    text: str


def secrets(names: Iterable[tuple[str, str]] = ()) -> list[tuple[str, re.Pattern[str]]]:
    """What must not be inside: a pattern, and what it finds; `names` are words such as a user's."""
    patterns = [
        (what, re.compile(pattern))  # each by itself: a search for its first letters is fast
        for what, several in TOKENS.items()
        for pattern in ((several,) if isinstance(several, str) else several)
    ]
    patterns.append(("home folder", re.compile(rf"(?:file://|{ALONE})(?:{HOMES})")))
    for what, name in names:
        if len(name) > 2 and name.lower() not in COMMON:
            patterns.append((what, re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")))
    return patterns


def here() -> list[tuple[str, str]]:
    """Names of this machine and its user; a host counts with and without its domain."""
    host, home = socket.gethostname(), Path.home()
    names = [("host name", host), ("host name", host.split(".")[0])]
    with contextlib.suppress(KeyError, OSError):  # a user id may have no account
        names.append(("user name", getpass.getuser()))
    if len(home.parts) > 2:
        names += [("user name", home.name), ("home folder", str(home))]
    return list(dict.fromkeys(names))


def find(folder: Path, patterns: Sequence[tuple[str, re.Pattern[str]]]) -> list[Leak]:
    """Every match in the names and the texts of a folder's files, compressed ones too.

    A text is read as it is and as it means: without the escapes of JSON, HTML and addresses, out
    of base64 and other codes, and put together again where a line was broken or a list is split.
    """
    tokens = [pair for pair in patterns if pair[0] in TOKENS]
    matches = []
    for path in files(folder):
        name = path.relative_to(folder).as_posix()
        own = [
            Leak(name, *match) for match in _matches([(0, form) for form in views(name)], patterns)
        ]
        for text, binary in map(_text, _contents(path, name)):
            lines = [text] if binary else text.splitlines()
            forms = [(n, form) for n, line in enumerate(lines, start=1) for form in views(line)]
            own += [Leak(name, *one) for one in _matches(forms, tokens if binary else patterns)]
            broken = [Leak(name, *one) for one in (() if binary else _broken(text, tokens))]
            own += [one for one in broken if not any(leak.text in one.text for leak in own)]
        matches += dict.fromkeys(own)
    return matches


def _contents(path: Path, name: str) -> list[bytes]:
    """A file's bytes and what is packed in them; of a compressed text that text alone."""
    try:
        every = [*unpacked(path.read_bytes())]
    except UNREADABLE as error:
        raise ParamsError(f"not bundled, {name} cannot be looked through: {error}") from None
    return every[1:] if len(every) > 1 and path.suffix == ".gz" else every


def unpacked(data: bytes, depth: int = 3) -> Iterator[bytes]:
    """Bytes, and what they hold by gzip, bzip2, xz, deflate, zip or beside the pixels of a PNG.

    Raises one of UNREADABLE where they are damaged, locked, or larger than MOST.
    """
    yield data
    inner: list[bytes] = []
    if depth and data.startswith(PICTURE):
        inner = [*_beside_pixels(data)]
    elif depth and data.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                with archive.open(info) as file:
                    inner.append(_within(file, sum(map(len, inner))))
                inner.append(f"{info.filename} {info.comment.decode('latin-1')}".encode())
    for magic, opened in PACKED.items():
        if depth and data.startswith(magic):
            inner.append(_within(opened(io.BytesIO(data))))
    for bits in (15, -15) if depth and not inner and not _readable(data) else ():
        with contextlib.suppress(zlib.error):  # deflated at other levels, or without a head
            inner.append(_within(io.BytesIO(_inflated(data, bits))))
    for part in inner:
        yield from unpacked(part, depth - 1)


def _inflated(data: bytes, bits: int = 15) -> bytes:
    return zlib.decompressobj(bits).decompress(data, MOST + 1)


def _within(file: IO[bytes], before: int = 0) -> bytes:
    data = file.read(MOST - before + 1)
    if len(data) > MOST - before:
        raise OSError(f"it unpacks to more than {MOST / 1e6:.0f} MB")
    return data


def _beside_pixels(data: bytes) -> Iterator[bytes]:
    """The chunks of a PNG that are no pixels, those that are compressed as they mean."""
    at = len(PICTURE)
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : end]
        if kind != b"IDAT":
            yield body
        for match in re.finditer(rb"\0x", body) if kind in (b"zTXt", b"iTXt", b"iCCP") else ():
            with contextlib.suppress(zlib.error):
                yield zlib.decompressobj().decompress(body[match.start() + 1 :], MOST)
        at = end + 4


def _broken(text: str, patterns: Sequence[tuple[str, re.Pattern[str]]]) -> Iterator[tuple]:
    """Line, kind and text of what is there when lines and items are joined; line 1 where the place
    is lost by decoding."""
    whole, starts = _joined(text)
    lines = [whole[start:end] for start, end in itertools.pairwise([*starts, len(whole)])]
    coded = dict.fromkeys(one for form in (whole, text) for one in CODED.findall(form))
    forms = [*itertools.islice(views(whole), 1, None)]
    forms += [form for place in _places(text) for form in views(place)]
    forms += [decoded for data in _base85(LINES.sub("", text)) for decoded in _texts(data)]
    forms += [form for one in coded for form in _shifted(one)]
    yield from _matches([*enumerate(lines, start=1)], patterns, seam="")
    yield from _matches([(1, form) for form in forms], patterns)


def _places(text: str) -> list[str]:
    """Texts that stand in one place of a JSON, whatever its lists, or of its lines, put together:
    the sources of a notebook's cells, what they printed."""
    places: dict[tuple, list[str]] = {}

    def walk(value: Any, place: tuple) -> None:
        if isinstance(value, str):
            places.setdefault(place, []).append(_ends(value))
        for inner in value if isinstance(value, list) else ():
            walk(inner, place)
        for key, inner in value.items() if isinstance(value, dict) else ():
            walk(inner, (*place, key))

    for document in (text, *text.splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            walk(json.loads(document), ())
            if document is text:
                break
    return ["".join(texts) for texts in places.values() if len(texts) > 1]


def _ends(text: str, longest: int = 1000) -> str:
    """Both ends of a long text, which others are joined to; what is inside is found without."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}\n{text[-half:]}"


def _matches(
    forms: Sequence[tuple[int, str]],
    patterns: Sequence[tuple[str, re.Pattern[str]]],
    seam: str = "\n\0\n",
) -> Iterator[tuple]:
    """Line, kind and text of what the forms of lines hold, once for each line and kind; all are
    looked through as one text, for speed, with a seam that is part of no secret."""
    text = seam.join(form for _, form in forms)
    bare = BASE64.sub(lambda match: " " * len(match[0]), text)
    starts = [*itertools.accumulate((len(form) + len(seam) for _, form in forms), initial=0)]
    matches: dict[tuple[int, str], str] = {}
    for what, pattern in patterns:
        for match in pattern.finditer(text if what in TOKENS else bare):
            line, _ = forms[bisect_right(starts, match.start()) - 1]
            matches.setdefault((line, what), match.group())
    return ((*place, match) for place, match in matches.items())


def views(text: str, depth: int = 3) -> Iterator[str]:
    """A text and what it means when it is unescaped or decoded, once or several times."""
    yield text
    if not depth:
        return
    coded = dict.fromkeys(_coded(text))
    plainer = [*itertools.accumulate(PLAINER, lambda plain, step: step(plain), initial=text)]
    for plain in {*plainer} - {text, plainer[-1]}:  # before the next step cuts into a code
        coded |= dict.fromkeys(_base85(plain))
    if plainer[-1] != text:
        yield from views(plainer[-1], depth - 1)
    for decoded in itertools.chain.from_iterable(map(_texts, coded)):
        yield from views(decoded, depth - 1)


PLAINER: tuple[Callable[[str], str], ...] = (
    lambda text: html.unescape(text) if "&" in text else text,
    lambda text: ESCAPE.sub(_unescaped, text) if "\\" in text else text,
    lambda text: unquote(text) if "%" in text else text,
    lambda text: QUOTED.sub(lambda match: chr(int(match[1], 16)), text) if "=" in text else text,
    lambda text: ADDED.sub("", text),
    lambda text: text if text.isascii() else unicodedata.normalize("NFKC", text),
    lambda text: UNSEEN.sub("", text),
)


def _coded(text: str) -> Iterator[bytes]:
    """Bytes that a text writes in base 64, 32 or 85, or as numbers."""
    for code in CODED.findall(text):
        bare = code.rstrip("=").replace("-", "+").replace("_", "/")
        yield base64.b64decode(bare[: len(bare) - (len(bare) % 4 == 1)] + "==")
    for code in HEX.findall(text):
        for digits in (code, code[1:]):
            yield bytes.fromhex(digits[: len(digits) // 2 * 2])
    for code in HEX_BYTES.findall(text):
        yield bytes.fromhex(re.sub(r"0x|[\s,:;-]", "", code))
    for code in BYTES.findall(text):
        numbers = [int(number) for number in re.findall(r"\d+", code)]
        if max(numbers) < 128:
            yield bytes(numbers)
    for code in BASE32.findall(text):
        bare = code.rstrip("=")
        with contextlib.suppress(ValueError):
            yield base64.b32decode(bare + "=" * (-len(bare) % 8))
    yield from _base85(text)


def _base85(text: str) -> Iterator[bytes]:
    """Printed texts in base 85, wherever they begin in other letters, and what is packed in it."""
    for letters, own in BASE85:
        for run in letters.findall(text):
            code = run.translate(own)
            for shift in range(5):
                for match in BEGINS.finditer(code[shift::5]):
                    start, end = (shift + 5 * at for at in match.span())
                    if PRINTED.search(base64.b85decode(code[start : end - 5])):
                        for stop in range(end - 15, end + 1):  # letters behind it are none of it
                            yield from PRINTED.findall(base64.b85decode(code[start:stop]))
            for start in {0, KEY.match(run).end()} if RARE.search(run) else ():
                if _is_packed(code[start : start + 20]):
                    for stop in range(len(code) - 5, len(code) + 1):
                        with contextlib.suppress(ValueError):
                            yield base64.b85decode(code[start:stop])


def _is_packed(code: str) -> bool:
    """Whether letters of base 85 are the first ones of something compressed."""
    try:
        return len([*unpacked(base64.b85decode(code), 1)]) > 1
    except UNREADABLE:  # it is, and goes on
        return True
    except ValueError:
        return False


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if code[0].isdigit():
        return chr(int(code, 8))
    return chr(int(code[1:].strip("{}"), 16)) if len(code) > 1 else ESCAPED.get(code, code)


def _texts(data: bytes) -> Iterator[str]:
    """The texts that bytes are or hold, such as the CSVs that a report embeds."""
    with contextlib.suppress(*UNREADABLE):
        yield from filter(None, map(_readable, unpacked(data)))


def _readable(data: bytes) -> str:
    """Bytes as the text that they are; empty where they are none."""
    try:
        decoded = data.decode("utf-8")
    except ValueError:
        return ""
    return decoded if len(decoded) > 7 and decoded.isprintable() or "\n" in decoded else ""


def _shifted(text: str, longest: int = 20_000) -> list[str]:
    """What base64 holds, as characters: behind other letters where it is short, unpacked where it
    is a picture or an archive."""
    bare = text.rstrip("=").replace("-", "+").replace("_", "/")
    starts = range(4 if len(text) <= longest else 1)
    parts: list[bytes] = []
    for piece in (bare[i:] for i in starts):
        piece = piece[: len(piece) - (len(piece) % 4 == 1)]  # no bytes end so
        with contextlib.suppress(*UNREADABLE):
            parts += unpacked(base64.b64decode(piece + "=" * (-len(piece) % 4)))
    return [part.replace(b"\0", b"").decode("latin-1") for part in parts]


def _joined(text: str) -> tuple[str, list[int]]:
    """The text with its lines joined, of long ones the ends, and where in it each line begins."""
    starts, parts, length, last = [0], [], 0, 0
    for match in BREAK.finditer(text):
        parts.append(_ends(text[last : match.start()]))
        length, last = length + len(parts[-1]), match.end()
        starts += [length] * match.group().count("\n")
    return "".join([*parts, _ends(text[last:])]), starts


def _text(data: bytes) -> tuple[str, bool]:
    """The text that bytes are, and whether they are none: then as characters, without zeros."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace").replace("\0", ""), False
    if b"\0" in data:
        return data.replace(b"\0", b"").decode("latin-1"), True
    return data.decode("utf-8", errors="replace"), False


def files(folder: Path) -> list[Path]:
    """Every file below a folder, in the order of their names."""
    every = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(every, key=lambda path: path.relative_to(folder).as_posix())
