"""The corpora of a validation whose losses are told beside the total: sources of a mixture, and held-out corpora."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llada_lightning.data import TokenizerInfo
from llada_lightning.data.manifest import Manifest, bits_per_byte, check_sequence_length, read_manifest
from llada_lightning.data.shards import check_shards
from llada_lightning.support.errors import UserError
from llada_lightning.support.printing import shortened


@dataclass(frozen=True)
class ValidationCorpus:
    """A corpus that has a validation loss of its own.

    Args:
        name: The name by which its loss is logged and recorded.
        folder: The prepared folder, or its URL.
        manifest: The manifest of that folder, whose split ``val`` is validated on.
        first_document: The lowest number that a document of it has in the validation (``ValidationBatch.documents_B``):
            the documents of a mixture are numbered source by source.
    """

    name: str
    folder: str
    manifest: Manifest
    first_document: int = 0

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """The bits per byte of a loss on this corpus; None where its tokens do not decode to its text."""
        split = self.manifest.splits["val"]
        return bits_per_byte(nats_per_token, split.bytes_per_token, split.lost_share)


def mixture_sources(
    folders: Sequence[str], manifests: Sequence[Manifest], sequence_length: int
) -> list[ValidationCorpus]:
    """Returns the sources of a mixture in its order; none where there is one only, whose loss is the total.

    A source is named by the last part of its folder, or by the whole folder where another one ends alike.
    """
    if len(folders) < 2:
        return []
    short = [folder.rstrip("/").rpartition("/")[2] or folder for folder in folders]
    names = [name if short.count(name) == 1 else folder for name, folder in zip(short, folders, strict=True)]
    tokens = (manifest.splits["val"].items(sequence_length) * sequence_length for manifest in manifests)
    starts = accumulate(tokens, initial=0)
    return [ValidationCorpus(*each) for each in zip(names, folders, manifests, starts, strict=False)]


def held_out_corpora(
    folders: Mapping[str, str], tokenizer: TokenizerInfo, sequence_length: int
) -> list[ValidationCorpus]:
    """Returns the corpora of ``data.held_out``, checked as the training data are.

    Raises:
        UserError: A name cannot be the name of a file, or a folder is missing, damaged, of another tokenizer, or
            without a validation sequence.
    """
    found = []
    for name, folder in folders.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(
                f"data.held_out: '{shortened(name, 60)}' cannot name a corpus; a name has letters, digits, '.', '_' "
                "and '-', such as wiki"
            )
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            fix = " --tokenizer DATA (the training data)" * ("llada prepare" in str(error))
            raise UserError(f"data.held_out: {name}: {error}{fix}") from error
        if manifest.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.held_out: {name} ('{shortened(folder)}') was prepared with another tokenizer than the training "
                "data; prepare it again with --tokenizer of theirs"
            )
        check_shards(folder, manifest)
        check_sequence_length(manifest, sequence_length, ("val",))
        found.append(ValidationCorpus(name, folder, manifest))
    return found
