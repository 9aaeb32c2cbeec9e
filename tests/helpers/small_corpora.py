"""Small corpora, and prepared folders whose damage is hidden."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from llada_lightning.data.manifest import data_fingerprint, read_manifest
from llada_lightning.support.files import file_sha256


def write_corpus(folder: Path, documents: int = 60, first: int = 0) -> Path:
    """Text files of arithmetic sentences: enough tokens for a few epochs of tiny runs."""
    folder.mkdir(parents=True)
    for n in range(first, first + documents):
        lines = [f"{n} plus {k} is {n + k}, and {n} times {k} is {n * k}." for k in range(25)]
        (folder / f"{n:04d}.txt").write_text("\n".join(lines))
    return folder


def seal(folder: Path) -> None:
    """Gives the manifest the checksums of the files, as somebody would who hides a damage."""
    manifest = read_manifest(folder)
    splits = {
        name: replace(
            split, shards=tuple(replace(shard, sha256=file_sha256(folder / shard.file)) for shard in split.shards)
        )
        for name, split in manifest.splits.items()
    }
    fingerprint = data_fingerprint(splits, manifest.tokenizer.fingerprint)
    (folder / "manifest.json").write_text(replace(manifest, splits=splits, fingerprint=fingerprint).to_json())


def forgetful_tokenizer(folder: Path) -> str:
    """A tokenizer.json like BERT's: it lowers capitals, joins white space, and knows the Latin letters only."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(0x21, 0x7F))]
    pieces = [*tokens, *(f"##{chr(code)}" for code in range(0x61, 0x7B))]
    model = models.WordPiece({token: n for n, token in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(tokens[:5])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")
