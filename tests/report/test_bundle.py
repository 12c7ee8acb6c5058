"""The zip to send: what is inside, that it is the same twice, and what it refuses to carry."""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import html
import io
import json
import lzma
import os
import random
import string
import struct
import time
import zipfile
import zlib
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from PIL import Image

from lib.__main__ import main
from lib.files import ROOT, ParamsError
from lib.report import bundle, document, leaks
from tests.browser import records_of
from tests.samples import records as sample

ANN = [("user name", "ann"), ("host name", "ann-laptop"), ("home folder", "/srv/people/ann")]
HOME, USERS = "home", "Users"  # no path of a machine is written in these files
JOB = "demo-moe/random-hf-eager/latency"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A demo, with a compressed trace and what a run leaves beside its results."""
    root = sample.write_demo(tmp_path_factory.mktemp("bundle") / "demo", models=("demo-moe",))
    (root / JOB / "trace-64.jsonl.gz").write_bytes(gzip.compress(b'{"t_s": 0}\n', mtime=0))
    (root / JOB / ".previous").mkdir()
    (root / JOB / ".previous" / "run.json").write_text("{}")
    (root / "plan.json").write_text(json.dumps({"jobs": [JOB]}))
    return root


@pytest.fixture(scope="module")
def archive(source) -> Path:
    return bundle.write(source, source.parent / "demo.zip", ANN)


def test_report_pages_tables_records_and_provenance_are_inside(archive):
    with zipfile.ZipFile(archive) as file:
        names = {name.removeprefix("demo/") for name in file.namelist()}
        provenance = json.loads(file.read("demo/provenance.json"))
    assert names >= {
        "report.html",
        "plan.json",
        "provenance.json",
        "SHA256SUMS",
        "tables/latency.csv",
        f"{JOB}/trace-64.jsonl.gz",
    }
    kinds = ("run.json", "records.jsonl", "notebook.ipynb", "notebook.html")
    assert names >= {f"{JOB}/{kind}" for kind in kinds}
    assert not [name for name in names if "/." in name or name.startswith("/")]
    assert provenance["jobs"][JOB]["git"]["commit"] == "0123456789abcdef"
    (env,) = provenance["environments"].values()
    assert env["cpu"] == "Test CPU"


def test_the_checksums_cover_every_other_file(archive):
    with zipfile.ZipFile(archive) as file:
        lines = file.read("demo/SHA256SUMS").decode().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        assert {f"demo/{name}" for name in sums} | {"demo/SHA256SUMS"} == {*file.namelist()}
        for name, digest in sums.items():
            assert hashlib.sha256(file.read(f"demo/{name}")).hexdigest() == digest


def test_folders_are_inside_and_a_report_can_be_built_from_it(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    soup = BeautifulSoup((tmp_path / "demo" / "report.html").read_text(), "html.parser")
    folders = {line["folder"] for line in records_of(soup).values()}
    assert folders and all((tmp_path / "demo" / f / "records.jsonl").exists() for f in folders)
    again = document.write(tmp_path / "demo", tmp_path / "x" / "demo")
    assert again.with_name("tables").is_dir()


def test_the_same_results_give_the_same_bytes(source, archive, tmp_path):
    again = bundle.write(source, tmp_path / "again.zip", ANN)
    assert again.read_bytes() == archive.read_bytes()
    with zipfile.ZipFile(archive) as file:
        assert {info.date_time for info in file.infolist()} == {bundle.STAMP}
        assert file.namelist() == sorted(file.namelist())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("by ann on a laptop", "user name"),
        ("read from /data/ann/models", "user name"),
        ("at ann-laptop:8888", "host name"),
        ("/srv/people/ann/x", "home folder"),
        ("/" + "home/someone/work", "home folder"),
        (f"file:///{USERS}/someone", "home folder"),
        ("C:\\\\Users\\\\someone", "home folder"),
        ("token hf_" + "a1B2" * 8, "Hugging Face token"),
        ("ghp_" + "a" * 36, "GitHub token"),
        ("key=sk-" + "a1" * 80, "API key"),
        ("AKIA" + "A" * 16, "AWS key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("https://ann:secret@example.org", "password in an address"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----", "private key"),
        ("PuTTY-User-Key-File-3: ssh-ed25519", "private key"),
        ("glrt-" + "a1B2" * 6, "GitLab token"),
        ("xapp-1-" + "A1" * 10, "Slack token"),
        *(
            (text, "token of a service")
            for text in (
                "sk_" + "live_" + "a1B2" * 6,
                "npm_" + "a1B2" * 9,
                "pypi-" + "a1B2" * 12,
                "nvapi-" + "a1B2" * 16,
                "gsk_" + "a1B2" * 13,
                "xai-" + "a1B2" * 20,
                "pplx-" + "a1B2" * 12,
                "r8_" + "a1B2" * 9,
                "dop_v1_" + "a1" * 32,
                "dapi" + "a1" * 16,
                "dckr_pat_" + "a1B2" * 7,
                "SG." + "a1B2" * 6 + "." + "a1B2" * 10,
                "glsa_" + "a1B2" * 9,
                "hvs." + "a1B2" * 8,
                "ya29." + "a1B2" * 8,
                "GOCSPX-" + "a1B2" * 7,
                "123456789:AA" + "a1B2" * 8 + "x",
                "https://hooks.slack.com/services/T1/B2/a1B2",
                "shpat_" + "a1" * 16,
                "AccountKey=" + "a1B2" * 21 + "==",
                "https://x.example/y?sv=1&sig=" + "a1B2" * 11,
                "AGE-SECRET-KEY-1" + "A1" * 29,
                "https://discord.com/api/webhooks/123456789/" + "a1B2" * 17,
                "https://x.webhook.office.com/webhookb2/a@b/IncomingWebhook/a1B2",
                "M" + "a1B2" * 6 + ".GaBcdE." + "a1" * 19,
                "http://127.0.0.1:8888/lab?token=" + "a1" * 24,
                "ATBB" + "a1B2" * 8,
            )
        ),
        *(
            (text, "secret by its name")
            for text in (
                "WANDB_API_KEY=" + "a1" * 20,
                "aws_secret_access_key = " + "wJ7/" * 10,
                "Authorization: Bearer " + "a1B2" * 6,
                "wandb login " + "a1" * 20,
                "'password': '" + "a1B2" * 6 + "'",
                "DB_PASSWORD=hunter2hunter2",
                "AWS_SESSION_TOKEN=" + "FwoG1" * 9,
            )
        ),
    ],
)
def test_what_is_personal_is_found_with_file_and_line(tmp_path, text, what):
    (tmp_path / "a.txt").write_text(f"good\n{text}\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(f"{text}\n".encode()))
    matches = leaks.find(tmp_path, leaks.secrets(ANN))
    assert ("a.txt", 2) in {(leak.file, leak.line) for leak in matches if leak.what == what}
    assert ("b.jsonl.gz", 1) in {(leak.file, leak.line) for leak in matches if leak.what == what}


TOKEN = "hf_" + "a1B2" * 8


def deflated(data: bytes) -> bytes:
    """Without the head and the sum of zlib."""
    return zlib.compress(data, wbits=-15)


CODED = base64.b64encode(f"login with {TOKEN} please".encode()).decode()
DEFLATED = deflated(f"login with {TOKEN}, please".encode())
HIDDEN = {
    "after a line's end in JSON": json.dumps(f"first line\n{TOKEN}"),
    "after a tab in JSON": json.dumps(f"first\t{TOKEN}"),
    "after a colour": json.dumps(f"\x1b[31m{TOKEN}\x1b[0m"),
    "after a slash": f"https://example.org/{TOKEN}",
    "after an underscore": f"my_{TOKEN}",
    "after a dot": f"token.{TOKEN}",
    "after a letter with an accent": f"clé{TOKEN}",
    "after a letter": f"x{TOKEN}",
    "in JSON in JSON": json.dumps(json.dumps(f"a\n{TOKEN}")),
    "as JSON's numbers of letters": "".join(f"\\u{ord(c):04x}" for c in TOKEN),
    "as numbers of bytes": "".join(f"\\x{ord(c):02x}" for c in TOKEN),
    "as HTML's numbers": "".join(f"&#{ord(c)};" for c in TOKEN),
    "partly as HTML's numbers": TOKEN.replace("_", "&#x5f;"),
    "as HTML in JSON": json.dumps(f"<a>\n{TOKEN.replace('_', '&lowbar;')}"),
    "in an address": TOKEN.replace("_", "%5F"),
    "in an address twice": TOKEN.replace("_", "%255F"),
    "in base64": CODED,
    "in base64 for addresses": base64.urlsafe_b64encode(f"??>>{TOKEN}".encode()).decode(),
    "in base64 alone": base64.b64encode(TOKEN.encode()).decode().rstrip("="),
    "in base64 twice": base64.b64encode(CODED.encode()).decode(),
    "in base64 of several lines": "\n".join(CODED[i : i + 20] for i in range(0, len(CODED), 20)),
    "in two lines": f"{TOKEN[:12]}\n{TOKEN[12:]}",
    "in two lines with a backslash": f"{TOKEN[:12]}\\\n    {TOKEN[12:]}",
    "in two lines of a notebook": f'"{TOKEN[:12]}\\n",\n   "{TOKEN[12:]}"',
    "behind a link of a terminal": f"\x1b]8;;x\x1b\\{TOKEN[:9]}\x1b]8;;\x07{TOKEN[9:]}",
    "between signs of a terminal": f"{TOKEN[:9]}\x1b[K{TOKEN[9:]}",
    "between tags": f"<span>{TOKEN[:9]}</span><wbr><span>{TOKEN[9:]}</span>",
    "with a hyphen that is not seen": f"{TOKEN[:9]}\u00ad{TOKEN[9:]}",
    "with a space without width": f"{TOKEN[:9]}\u200b{TOKEN[9:]}",
    "in wide letters": "".join(chr(ord(c) + 0xFEE0) for c in TOKEN),
    "in hexadecimal": f"token {TOKEN}".encode().hex(),
    "as octal numbers": "".join(f"\\{ord(c):03o}" for c in TOKEN),
    "as long numbers of letters": "".join(f"\\U{ord(c):08x}" for c in TOKEN),
    "in base64 of compressed lines": base64.b64encode(gzip.compress(TOKEN.encode())).decode(),
    "in two texts of a line": f'"{TOKEN[:12]}" + "{TOKEN[12:]}"',
    "in two texts side by side": f"'{TOKEN[:12]}' '{TOKEN[12:]}'",
    "in base32": base64.b32encode(TOKEN.encode()).decode(),
    "in bytes of a dump": TOKEN.encode().hex(" "),
    "in bytes with colons": TOKEN.encode().hex(":"),
    "in bytes of a program": ", ".join(f"{byte:#04x}" for byte in TOKEN.encode()),
    "as a list of numbers": json.dumps([*TOKEN.encode()]),
    "as a mail writes it": f"=68=66=5F{TOKEN[3:]}",
    "as JavaScript's numbers of letters": "".join(f"\\u{{{ord(c):x}}}" for c in TOKEN),
    "in base64 of deflated lines": base64.b64encode(zlib.compress(TOKEN.encode())).decode(),
    "in two texts of a program": f'"{TOKEN[:12]}" +\n    "{TOKEN[12:]}"',
    **{
        f"in {name}{what}": json.dumps(code(data).decode())
        for name, code in {"a85": base64.a85encode, "b85": base64.b85encode}.items()
        for what, data in {
            " alone": TOKEN.encode(),
            " behind a word": f"my {TOKEN} is this\n".encode(),
            " behind a line": f"one\n{TOKEN}\nthree\n".encode(),
            " of base64": CODED.encode(),
            " of compressed lines": zlib.compress(f"login {TOKEN}".encode()),
            " of raw deflate": deflated(f"login {TOKEN}".encode()),
        }.items()
    },
    "in a85 of Adobe": base64.a85encode(f"as {TOKEN}".encode(), adobe=True).decode(),
    "in b85 of a program": f"x=b85decode({base64.b85encode(f'by {TOKEN}'.encode())})",
    "in a85 of HTML": html.escape(base64.a85encode(f"in {TOKEN} here".encode()).decode()),
    "in base64 of b85": base64.b64encode(base64.b85encode(TOKEN.encode())).decode(),
    "in a85 of several lines": base64.a85encode(f"x {TOKEN}".encode(), wrapcol=20).decode(),
    "in base64 of raw deflate": base64.b64encode(DEFLATED).decode(),
    "in hexadecimal of raw deflate": DEFLATED.hex(),
    "in base64 of fast deflate": base64.b64encode(zlib.compress(TOKEN.encode(), 1)).decode(),
    "in base64 of stored deflate": base64.b64encode(zlib.compress(TOKEN.encode(), 0)).decode(),
    "in a list": json.dumps([TOKEN[:12], TOKEN[12:]]),
    "in a list of many": json.dumps([*TOKEN]),
    "in a list between others": json.dumps(["x ", TOKEN[:12], TOKEN[12:], " y"]),
    "in a list of lists": json.dumps([[TOKEN[:12]], [TOKEN[12:]]]),
    "in a list of a program": f"x = ''.join(('{TOKEN[:12]}', f'{TOKEN[12:]}'))",
    "in a list in JSON": json.dumps(f'"".join(["{TOKEN[:12]}", "{TOKEN[12:]}"])'),
    "in base64 in a list": json.dumps([CODED[:33], CODED[33:]]),
}


def notebook(*cells: dict) -> str:
    return json.dumps({"nbformat": 4, "cells": cells, "metadata": {}}, indent=1)


def printed(*texts) -> dict:
    streams = [{"name": "stdout", "output_type": "stream", "text": text} for text in texts]
    return {"cell_type": "code", "outputs": streams, "source": []}


SPLIT = {
    "between lines of a cell": notebook({"source": ["a = 1\n", TOKEN[:9], TOKEN[9:]]}),
    "between cells": notebook({"source": [TOKEN[:9]]}, {"source": [TOKEN[9:]]}),
    "between texts of cells": notebook({"source": TOKEN[:9]}, {"source": TOKEN[9:]}),
    "between outputs": notebook(printed([TOKEN[:9]], [TOKEN[9:]])),
    "between outputs of cells": notebook(printed(TOKEN[:9]), printed(TOKEN[9:])),
    "between outputs of one letter": notebook(printed(*TOKEN)),
    "between long outputs": notebook(printed("x " * 9000 + TOKEN[:9], TOKEN[9:] + " x" * 9000)),
    "between results": notebook(
        {"outputs": [{"data": {"text/plain": [t]}} for t in (TOKEN[:9], TOKEN[9:])]}
    ),
    "between lines of JSON": json.dumps({"a": TOKEN[:9]}) + "\n" + json.dumps({"a": TOKEN[9:]}),
    "between rows of a table": json.dumps({"rows": [[1, TOKEN[:9]], [2, TOKEN[9:]]]}),
    "between cells in base64": notebook({"source": CODED[:25]}, {"source": CODED[25:]}),
}


@pytest.mark.parametrize("case", SPLIT)
def test_a_secret_is_found_however_a_json_splits_it(tmp_path, case):
    (tmp_path / "a.ipynb").write_text(SPLIT[case])
    matches = leaks.find(tmp_path, leaks.secrets(ANN))
    assert {leak.what for leak in matches} == {"Hugging Face token"}


@pytest.mark.parametrize("shift", range(12))
@pytest.mark.parametrize("code", [base64.a85encode, base64.b85encode])
def test_base85_is_read_behind_and_before_any_letters(tmp_path, code, shift):
    """No start, no end and no neighbour may hide it; the shortest token that there is."""
    for number in range(20):
        letters = "".join(random.Random(number).choices(string.ascii_letters, k=19))
        token = f"hf_{letters}{'aA0'[number % 3]}"  # what a letter too many turns into no letter
        behind = ("',", "'))))]", "',,,,,,,,")[number % 3]
        text = f"{'x' * shift}='{code(f'{number} {token}'.encode()).decode()}{behind}"
        (tmp_path / f"{number}.txt").write_text(text)
    assert len({leak.file for leak in leaks.find(tmp_path, leaks.secrets())}) == 20


@pytest.mark.parametrize("case", HIDDEN)
def test_a_secret_is_found_however_it_is_written(tmp_path, case):
    (tmp_path / "a.txt").write_text(f"good\n{HIDDEN[case]}\n")
    matches = leaks.find(tmp_path, leaks.secrets(ANN))
    assert "Hugging Face token" in {leak.what for leak in matches}
    assert 2 in {leak.line for leak in matches} or "lines" in case or "texts" in case


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-8-sig", "utf-32"])
def test_a_secret_is_found_in_other_codes_and_in_bytes(tmp_path, code):
    (tmp_path / "a.txt").write_bytes(f"good {TOKEN}".encode(code))
    (tmp_path / "b.bin").write_bytes(b"\x00\x01\x02" + TOKEN.encode() + b"\x00")
    files = {leak.file for leak in leaks.find(tmp_path, leaks.secrets(ANN))}
    assert files == {"a.txt", "b.bin"}


LONG = ['"' + " " * 40_000, '" ' * 20_000, "a" * 40_000, '["a", ' * 4000]


@pytest.mark.parametrize("text", LONG)
def test_no_text_takes_long(tmp_path, text):
    """Where each letter began a search to the end, these took a second or more."""
    (tmp_path / "a.txt").write_text(text)
    start = time.process_time()
    leaks.find(tmp_path, leaks.secrets())
    assert time.process_time() - start < 0.6


def picture(kind: bytes, body: bytes) -> bytes:
    """A PNG of noise, of some size, with one more chunk."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    noise = random.Random(1).randbytes(3 * 100 * 100)
    file = io.BytesIO()
    Image.frombytes("RGB", (100, 100), noise).save(file, "png")
    return file.getvalue()[:33] + chunk + file.getvalue()[33:]


def zipped(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


TEXT, NOISE = TOKEN.encode(), random.Random(2).randbytes(9000)
PACKED = {
    "a.jsonl.gz": gzip.compress(b"x" * 9000) + gzip.compress(TEXT),  # in the second part
    "a.gz": gzip.compress(gzip.compress(TEXT)),
    "a.bz2": bz2.compress(TEXT),
    "a.xz": lzma.compress(TEXT),
    "a.npz": zipped("x.npy", TEXT),
    "b.zip": zipped(f"{TOKEN}.txt", b""),
    "text.png": picture(b"tEXt", b"Comment\0" + TEXT),
    "packed.png": picture(b"zTXt", b"Comment\0\0" + zlib.compress(TEXT)),
    "many.png": picture(b"iTXt", b"Comment\0\1\0en\0\0" + zlib.compress(TEXT)),
    "exif.png": picture(b"eXIf", TEXT),
    "late.txt": b"x" * 20_000 + "\n".join(TOKEN).encode().replace(b"\n", b"\0"),
    "other-name.txt": gzip.compress(NOISE + TEXT),
    "deflated.txt": deflated(NOISE + TEXT),
    "deflated.gz": gzip.compress(deflated(TEXT)),
    "deflated.png": picture(b"prVt", deflated(TEXT)),
    "fast.bin": zlib.compress(NOISE + TEXT, 1),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_secret_is_found_in_what_is_packed(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name])
    assert {leak.file for leak in leaks.find(tmp_path, leaks.secrets(ANN))} == {name}


@pytest.mark.parametrize("name", [name for name in PACKED if name.endswith("png")])
def test_a_secret_is_found_in_a_picture_of_a_notebook(tmp_path, name):
    coded = base64.b64encode(PACKED[name]).decode()
    assert len(coded) > 20_000
    output = {"output_type": "display_data", "data": {"image/png": coded + "\n"}}
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"cells": [{"outputs": [output]}]}))
    assert leaks.find(tmp_path, leaks.secrets(ANN))


UNREADABLE = {
    "bomb.jsonl.gz": gzip.compress(bytes(3_000_000)),
    "bomb.bz2": bz2.compress(bytes(3_000_000)),
    "bomb.zip": zipped("a", bytes(3_000_000)),
    "bombs.gz": gzip.compress(gzip.compress(bytes(3_000_000))),
    "half.gz": gzip.compress(NOISE)[:4000],
    "half.zip": zipped("a", NOISE)[:4000],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_looked_through_is_not_sent(tmp_path, monkeypatch, name):
    monkeypatch.setattr(leaks, "MOST", 2_000_000)
    (tmp_path / name).write_bytes(UNREADABLE[name])
    with pytest.raises(ParamsError, match=f"not bundled, {name} cannot be looked through: "):
        leaks.find(tmp_path, leaks.secrets(ANN))


ROWS = b"model,folder\n" * 9 + b"m,results of ann\n"
ESCAPED = {
    "line": "a\nann",
    "tab": "a\tann-laptop",
    "home": f"x\n/{HOME}/someone",
    "tag": "<b>ann</b>",
    "packed CSV": base64.b64encode(gzip.compress(ROWS, mtime=0)).decode(),
}


@pytest.mark.parametrize("text", ESCAPED.values(), ids=ESCAPED)
def test_a_name_is_found_behind_an_escape(tmp_path, text):
    (tmp_path / "a.json").write_text(json.dumps([text]))
    assert leaks.find(tmp_path, leaks.secrets(ANN))


@pytest.mark.parametrize(
    "text",
    [
        "planned by annotation; annex",
        "the root of the repository, user time",
        "data:image/png;base64," + "iVBOR/ann/" * 20 + f"/{HOME}/ann",
        f"https://example.org/{HOME}/page",
        "outputs/paper/Qwen3-32B/latency",
        "hf_eager sk-learn <out>/x ~/models/y",
        "api_key=None; the secret of a_long_name_with_1_digit_or_two",
        "login with the_name_of_your_account_and_nothing",
        "password: at least 12 letters, passwords=2, password=None",
        "token_s: [0.01, 0.02] ids: [104, 102, 95, 65] " + "10, 20, 30, 40, 50, 60, 70, " * 9,
        "http://127.0.0.1:8888/lab?token=...",
        "00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 10 11 12 13 14 15",
        json.dumps({"hub_token": "None", "a_long_model_name_with_1_digit": "secret=", "b2": "c"}),
        json.dumps(["0a" * 20, "1b" * 20, "hf_", "eager", "sk-", "learn"]),
        "max_new_tokens=12345678901234567890123 pad_token=x sha256 " + "0a" * 32,
    ],
)
def test_what_is_not_personal_is_let_through(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert leaks.find(tmp_path, leaks.secrets([*ANN, ("user name", "root")])) == []


def test_a_leak_is_refused_named_and_no_secret_is_printed(source, tmp_path, capsys, monkeypatch):
    root = tmp_path / "mine"
    token = "hf_" + "a1B2" * 8
    sample.write_demo(root, models=("demo-moe",))
    with (root / JOB / "notebook.ipynb").open("r+") as file:
        text = file.read().replace("repeats = 11", f"repeats = 11  # {token} of ann")
        file.seek(0)
        file.write(text)
    monkeypatch.setattr(leaks, "here", lambda: ANN)
    target = tmp_path / "x.zip"
    assert main(["bundle", str(root), "--out", str(target)]) == 2
    message = capsys.readouterr().err
    assert f"{JOB}/notebook.ipynb, line" in message and "user name 'ann'" in message
    assert "Hugging Face token 'hf_a1B...'" in message and token not in message
    assert not target.exists()
    assert main(["bundle", str(source), "--out", str(target)]) == 0 and target.exists()


def test_a_word_can_be_allowed(tmp_path, monkeypatch, capsys):
    root = sample.write_demo(tmp_path / "demo", models=("ann",))
    monkeypatch.setattr(leaks, "here", lambda: ANN[:1])
    arguments = [str(root), "--out", str(tmp_path / "x.zip")]
    assert main(["bundle", *arguments]) == 2
    assert main(["bundle", *arguments, "--allow", "ann"]) == 0


def test_bad_input(tmp_path):
    with pytest.raises(ParamsError, match="no results in"):
        bundle.write(tmp_path, tmp_path / "x.zip", [])
    with pytest.raises(ParamsError, match="is released"):
        bundle.write(tmp_path, ROOT / "outputs/released/x.zip", [])


def test_this_machine_has_a_name_and_a_user():
    assert {"host name", "user name"} <= {what for what, _ in leaks.here()}


def test_the_released_set_can_be_shared():
    released = ROOT / "outputs" / "released"
    assert leaks.find(released, leaks.secrets()) == []


def test_what_is_no_file_is_not_replaced(source, tmp_path):
    """A pipe here, as a device would be: the zip takes the place of what it is written to."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ParamsError, match="pipe is no file; OUT takes a file"):
        bundle.write(source, tmp_path / "pipe", ANN)
    assert (tmp_path / "pipe").is_fifo()
