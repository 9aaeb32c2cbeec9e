"""``llada prepare``: the command around :func:`llada_lightning.data.prepare.prepare`."""

from __future__ import annotations

from typing import Any

from llada_lightning.data.manifest import COPY_AGAIN, Manifest, few_documents_note, loss_note
from llada_lightning.support.command_line import CommandParser, print_json, unescaped
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import people_console, warn


def prepare_parser() -> CommandParser:
    """The options of ``llada prepare``."""
    parser = CommandParser(
        prog="llada prepare",
        description="Turns a corpus into token shards, a tokenizer and a manifest. Run again, it does nothing.",
    )
    add = parser.add_argument_group("corpus").add_argument
    add(
        "--source",
        type=str,
        default="python-stdlib",
        help="python-stdlib; a text or .jsonl file (also .gz .xz .bz2 .zst), a folder or a pattern of them; "
        "hf:NAME[:CONFIG][@SPLIT] or hf:FOLDER, a Hugging Face dataset; igsm:COUNT[@SEED], generated problems; "
        "facts:COUNT[@SEED], invented facts, each in one order only",
    )
    add("--text-field", type=str, default="text", help="field (JSONL) or column (hf:) with the text")
    add(
        "--document-separator",
        type=str,
        help=r"splits each text (a text file, a line of JSONL, a row of a dataset) into documents, e.g. '\n\n'; "
        "without it a text is one document",
    )
    add("--max-documents", type=int, help="read no more documents than these")
    add("--max-bytes", type=int, help="read no more bytes of text than these")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--vocab-size", type=int, default=4096, help="words of the byte-level BPE to train, with [EOS] and [MASK]")
    add("--tokenizer-bytes", type=int, default=1 << 24, help="bytes of training text that it is trained on")
    add(
        "--tokenizer",
        type=str,
        help="train none, take this: tokenizer.json, a folder with one (also a prepared one), or a name on the hub",
    )
    add("--mask-token", type=str, help="the taken tokenizer's mask token")
    add("--add-mask-token", action="store_true", help="add a mask token to a tokenizer without one")
    add("--eos-token", type=str, help="the taken tokenizer's end-of-text token")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=str, help="folder to write; it appears when it is complete")
    add("--val-fraction", type=float, default=0.02, help="share of the documents kept for validation")
    add("--shard-tokens", type=int, default=1 << 20, help="tokens of a shard, at least 1000 sequences")
    add(
        "--verify",
        type=str,
        metavar="DIR",
        help="write nothing: read all of a prepared folder (or URL), and name each file that is damaged",
    )
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def main(argv: list[str]) -> int:
    """Runs ``llada prepare`` with its arguments; returns the exit code."""
    parser = prepare_parser()
    options = vars(parser.parse_args(argv))
    as_json, quiet, verified = options.pop("json"), options.pop("quiet"), options.pop("verify")
    if (options["out"] is None) == (verified is None):
        parser.error("the following arguments are required: out, or verify, and not both")
    if verified is not None:
        return _verify(verified, as_json=as_json, quiet=quiet)
    if options["document_separator"] is not None:
        options["document_separator"] = unescaped(options["document_separator"])
    from llada_lightning.data.display import prepared_table
    from llada_lightning.data.prepare import prepare  # after the parser, so that --help answers at once

    manifest = prepare(**options, progress=not quiet)
    if as_json:
        print_json(summary(manifest, options["out"]))
    else:
        people_console().print(prepared_table(manifest, options["out"]))
    val = manifest.splits["val"]
    for note in (few_documents_note(val.documents), loss_note(val.lost_share)):
        if note is not None:
            warn(note)
    return 0


def _verify(folder: str, *, as_json: bool, quiet: bool) -> int:
    """Name every damaged file in a table or JSON object, and the first one in the error."""
    from llada_lightning.data.display import verification_table, verify_with_progress

    found = verify_with_progress(folder, quiet=quiet)
    if as_json:
        print_json({"folder": folder, **found.as_dict()})
    else:
        people_console().print(verification_table(folder, found))
    if found.damaged:
        first, *more = found.damaged
        also = f", and {len(more)} more file{'s' * (len(more) > 1)}" if more else ""
        raise UserError(f"'{folder}' is damaged: {first.file} {first.problem}{also}; {COPY_AGAIN}")
    return 0


def summary(manifest: Manifest, out: str) -> dict[str, Any]:
    """A prepared folder in plain values: what ``--json`` prints."""
    counts = ("documents", "tokens", "bytes", "bytes_per_token", "lost_bytes")
    return {
        "out": out,
        "fingerprint": manifest.fingerprint,
        "tokenizer": vars(manifest.tokenizer),
        "dtype": manifest.dtype,
        "source": manifest.source,
        "settings": manifest.settings,
        "splits": {
            name: {count: getattr(split, count) for count in counts} | {"shards": len(split.shards)}
            for name, split in manifest.splits.items()
        },
    }
