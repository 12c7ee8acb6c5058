"""A tokenizer whose every word is a token, as files that transformers reads.

With bytes for tokens a server holds back what is no character yet, and a special token is not shown
at all: of random weights the first chunk may then come at the end of the answer.
"""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def write(folder: Path, size: int) -> Path:
    """Write a tokenizer of `size` words, w0 to w<size - 1>; returns the folder.

    Any other word is w0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(size)}, "unk_token": "w0"}
    whole = {"version": "1.0", "added_tokens": [], "model": model}
    whole |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder
